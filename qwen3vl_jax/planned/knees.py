"""Where more of something stops to help: what to buy, and what to set."""

import dataclasses
import itertools
from collections.abc import Sequence

from memsched.report.text import number_text, seconds_text
from qwen3vl_jax.planned.sweep import TIERS, Point, Sweep

# As fast as the best one, and nearly so.
SAME, NEARLY = 0.99, 0.9


@dataclasses.dataclass(frozen=True, slots=True)
class Knee:
    """A value at which something changes, and what in words."""

    value: int
    what: str


def knees(sweep: Sweep, points: Sequence[Point]) -> tuple[Knee, ...]:
    """In the order of their values."""
    fitting = [point for point in points if point.fits]
    found = _refusals(sweep, points)
    # What a single point would gain from more, nobody has planned.
    if len(fitting) > 1:
        found += _saturation(sweep, fitting) + _first_token(sweep, fitting)
        found += _limits(sweep, fitting)
        last = fitting[-1].value
        text = f"up to {value_text(sweep, last)} more of it gives more tokens/s: sweep further"
        found = found or [Knee(last, text)]
    return tuple(sorted(found, key=lambda knee: knee.value))


def value_text(sweep: Sweep, value: int | float) -> str:
    """A value with its unit."""
    if not sweep.unit:
        return f"{value:,.0f}"
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if value >= scale:
            return f"{number_text(value / scale)} {unit}{sweep.unit[1:]}"
    return f"{value:,.0f} {sweep.unit}"


def _refusals(sweep: Sweep, points: Sequence[Point]) -> list[Knee]:
    refused = [point for point in points if not point.fits]
    if not refused:
        return []
    if sweep.axis in TIERS:
        tier = TIERS[sweep.axis]
        least = max((point.smallest_bytes.get(tier, 0) for point in refused), default=0)
        if least > refused[-1].value:
            return [Knee(least, f"below {value_text(sweep, least)} it is refused")]
    fitting = [point.value for point in points if point.fits]
    if not fitting:
        return [Knee(refused[0].value, "all of them are refused")]
    if refused[0].value > fitting[-1]:
        return [Knee(fitting[-1], f"beyond {value_text(sweep, fitting[-1])} it is refused")]
    return [Knee(fitting[0], f"below {value_text(sweep, fitting[0])} it is refused")]


def _saturation(sweep: Sweep, fitting: Sequence[Point]) -> list[Knee]:
    """The first of those that are as fast as any, and the first that is nearly so."""
    rates = [point.tokens_per_s or 0.0 for point in fitting]
    best = max(rates)
    if best < 1.01 * rates[0]:
        return [Knee(fitting[0].value, "more of it gives no more tokens/s")]
    found = []
    first = _saturated(rates)
    nearly = next(i for i, rate in enumerate(rates) if rate >= NEARLY * best)
    if first + 1 < len(fitting):
        point, where = fitting[first], value_text(sweep, fitting[first].value)
        whole = sweep.axis == "device-memory" and not point.arriving_bytes
        why = "all weights that a token reads fit" if whole else f"{point.limited_by} is the limit"
        found.append(Knee(point.value, f"beyond {where} no more tokens/s: {why}"))
    if nearly < first:
        point = fitting[nearly]
        share = rates[nearly] / best
        where = value_text(sweep, point.value)
        found.append(Knee(point.value, f"{where} has {share:.0%} of the best tokens/s"))
    return found


def _saturated(rates: Sequence[float]) -> int:
    """Which is the first that is as fast as any."""
    best = max(rates)
    return next(i for i, rate in enumerate(rates) if rate >= SAME * best)


def _first_token(sweep: Sweep, fitting: Sequence[Point]) -> list[Knee]:
    """Until where the first token comes sooner, if there are no more tokens/s before that."""
    seconds = [point.first_token_s or 0.0 for point in fitting]
    enough = _saturated([point.tokens_per_s or 0.0 for point in fitting])
    soonest = next(i for i, first_s in enumerate(seconds) if SAME * first_s <= min(seconds))
    if soonest <= enough:
        return []
    value = fitting[soonest].value
    less = f"{seconds_text(seconds[enough])} to {seconds_text(seconds[soonest])}"
    what = f"up to {value_text(sweep, value)} the first token comes sooner: from {less}"
    return [Knee(value, what)]


def _limits(sweep: Sweep, fitting: Sequence[Point]) -> list[Knee]:
    """Where another lane begins to set the bound."""
    return [
        Knee(
            after.value,
            f"between {value_text(sweep, before.value)} and {value_text(sweep, after.value)} the "
            f"limit changes from {before.limited_by} to {after.limited_by}",
        )
        for before, after in itertools.pairwise(fitting)
        if before.limited_by != after.limited_by
    ]
