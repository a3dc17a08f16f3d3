"""Which batch gives the most tokens/s: some are planned, fewer and fewer apart around the best.

Weights that stream are read once for all rows, so a larger batch is faster until rows take the time
of computing, or caches the room of weights.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from memsched.report.rendering import Group, RenderableType, columns, line
from memsched.report.text import number_text, seconds_text
from qwen3vl_jax.planned.sweep import Point

MOST_ROWS = 1024
# A doubling that gains less is dull; after two of them no larger batch is tried.
WORTH_DOUBLING, MOST_DULL = 1.01, 2
# In the end neighbours of the best are so near to it, in shares of its rows.
NEAR = 16
COMPUTE, MEMORY = "compute", "memory"


@dataclasses.dataclass(frozen=True, slots=True)
class Batches:
    """Batches that were planned, the smallest first, and the one with the most tokens/s.

    `binds` is why it is no larger one, "compute" or "memory", and `why` says it in a sentence.
    """

    points: tuple[Point, ...]
    chosen: Point
    binds: str
    why: str


def choose_batch(plan: Callable[[int], Point]) -> Batches | None:
    """The fastest batch that fits; None if not even one row does.

    Args:
        plan: the figures of a batch of so many rows.
    """
    tried: dict[int, Point] = {}
    _double(plan, tried)
    if not tried[1].fits:
        return None
    while between := _between(tried):
        tried |= {rows: plan(rows) for rows in between}
    chosen = tried[best_rows(tried)]
    points = tuple(tried[rows] for rows in sorted(tried))
    return Batches(points, chosen, *_reason(chosen, points))


def _double(plan: Callable[[int], Point], tried: dict[int, Point]) -> None:
    """Tries 1, 2, 4 and so on, until one is refused or more rows gain nothing."""
    rows, dull, most = 1, 0, 0.0
    while rows <= MOST_ROWS and dull < MOST_DULL:
        tried[rows] = plan(rows)
        rate = tried[rows].tokens_per_s
        if rate is None:
            return
        dull = 0 if rate >= WORTH_DOUBLING * most else dull + 1
        most = max(most, rate)
        rows *= 2


def best_rows(tried: Mapping[int, Point]) -> int:
    """The batch with the most tokens/s; of equal ones the smallest."""
    return max(tried, key=lambda rows: (tried[rows].tokens_per_s or 0.0, -rows))


def _between(tried: Mapping[int, Point]) -> list[int]:
    """Half way from the best to its neighbours, unless they are near."""
    best = best_rows(tried)
    beside = (
        max((rows for rows in tried if rows < best), default=best),
        min((rows for rows in tried if rows > best), default=best),
    )
    return [(best + other) // 2 for other in beside if abs(other - best) > max(1, best // NEAR)]


def _reason(chosen: Point, points: tuple[Point, ...]) -> tuple[str, str]:
    """What keeps the best batch from being larger, in a word and as a sentence."""
    larger = next((point for point in points if point.value > chosen.value), None)
    if larger is None:
        binds = COMPUTE if chosen.limited_by == COMPUTE else MEMORY
        return binds, f"larger ones are not tried; the limit is {chosen.limited_by}"
    if not larger.fits:
        return MEMORY, f"a batch of {larger.value:,} does not fit"
    if larger.arriving_bytes > chosen.arriving_bytes:
        return MEMORY, (
            f"beside caches of {larger.value:,} a pass brings {larger.arriving_bytes:,} B, "
            f"not {chosen.arriving_bytes:,} B"
        )
    binds = COMPUTE if larger.limited_by == COMPUTE else MEMORY
    return binds, f"a batch of {larger.value:,} gives no more; its limit is {larger.limited_by}"


def batches_text(found: Batches) -> str:
    """The choice in one line."""
    return f"{_choice(found)}: {found.why}"


def _choice(found: Batches) -> str:
    return f"the best batch is {found.chosen.value:,}, {found.binds} binds"


def batches_view(found: Batches) -> RenderableType:
    """The choice, and a row for every batch that was planned."""
    rows = [_row(point) for point in found.points]
    heads = (
        "<batch",
        ">tokens/s",
        ">seconds per token",
        ">first token",
        ">device peak, B",
        "<limited by",
    )
    said, why = line(_choice(found), "bold"), line(f"  {found.why}")
    return Group(said, why, line(""), columns(heads, rows), line(""))


def _row(point: Point) -> tuple[str, ...]:
    rate, first_s = point.tokens_per_s, point.first_token_s
    if rate is None or first_s is None:
        return f"{point.value:,}", "-", "-", "-", "-", "does not fit"
    speed = number_text(rate), seconds_text(point.value / rate), seconds_text(first_s)
    return f"{point.value:,}", *speed, f"{point.needed_bytes:,}", point.limited_by


def batches_dict(found: Batches) -> dict[str, Any]:
    """As data, for JSON."""
    points = [{"fits": point.fits, **dataclasses.asdict(point)} for point in found.points]
    return {
        "chosen": found.chosen.value,
        "binds": found.binds,
        "why": found.why,
        "points": points,
    }
