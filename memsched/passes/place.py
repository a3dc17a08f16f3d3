"""Which weights stay, and which are streamed so that the link is busy evenly.

Reading is cyclic: what is kept saves its bytes in every round, whichever it is. So a round is
shortest when the streamed bytes are spread evenly over compute time, and when no step streams much
more than the others, because the ring must hold a step's streamed weights at once. Weights that
cost more than their bytes (read several times, or so small that latency counts) stay first.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from memsched.passes.needs import Needs

# Evenly over the seconds of compute, over the bytes, or all at the end ("the tail is spilled").
Spread = Literal["time", "bytes", "tail"]
# A weight whose bytes cost this much more link time than the cheapest stays before the others.
WORTH_KEEPING = 1.5
MOST_ROUNDS = 4
MOST_REPAIRS = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Candidates:
    """Weights that may stay in a tier, in order of use, with what decides about them.

    `sizes` are bytes in that tier, `ends` how far (0 to 1) a round is when a weight has been read,
    `steps` its first reader. Those that save the most link time per byte are `dear`, dearest first.
    """

    names: tuple[str, ...]
    sizes: Mapping[str, int]
    ends: Mapping[Spread, tuple[float, ...]]
    steps: tuple[int, ...]
    dear: tuple[str, ...]


def candidates(
    needs: Needs, names: Collection[str], sizes: Mapping[str, int], seconds: Mapping[str, float]
) -> Candidates:
    """Reads off what decides who stays in a tier; each weight reaches it in its `seconds`."""
    chosen = set(names)
    order = tuple(name for name in needs.weights if name in chosen)
    steps = tuple(needs.uses[name][0] for name in order)
    worth = {name: len(needs.uses[name]) * seconds[name] / max(1, sizes[name]) for name in order}
    least = min((worth[name] for name in order if sizes[name]), default=0.0)
    dear = [name for name in order if not sizes[name] or worth[name] > WORTH_KEEPING * least]
    ends: dict[Spread, tuple[float, ...]] = {
        "time": _time_ends(needs, order, steps, sizes),
        "bytes": _shares([sizes[name] for name in order]),
    }
    return Candidates(order, sizes, ends, steps, tuple(sorted(dear, key=lambda n: -worth[n])))


def pinned(
    found: Candidates,
    budget_bytes: int,
    largest_bytes: int,
    spread: Spread,
    lead: float = 0.5,
) -> frozenset[str] | None:
    """Weights that stay within a budget. None if those too large for streaming do not fit.

    Args:
        found: who may stay.
        budget_bytes: what they may take together.
        largest_bytes: anything larger must stay.
        spread: how the streamed are spread over a round.
        lead: by what share of itself a weight may be streamed too early.
    """
    large = [name for name in found.names if found.sizes[name] > largest_bytes]
    used = sum(found.sizes[name] for name in large)
    if used > budget_bytes:
        return None
    first = set(large)
    for name in found.dear:
        if name not in first and used + found.sizes[name] <= budget_bytes:
            first.add(name)
            used += found.sizes[name]
    rest = [index for index, name in enumerate(found.names) if name not in first]
    excess = sum(found.sizes[found.names[index]] for index in rest) - (budget_bytes - used)
    if excess <= 0:
        return frozenset(found.names)
    if spread == "tail":
        streamed = _tail(found, rest, excess)
    else:
        streamed = _even(found, rest, excess, spread, lead)
        _repair(found, rest, streamed, excess)
    return frozenset(found.names) - {found.names[index] for index in streamed}


def _even(
    found: Candidates, rest: Sequence[int], excess: int, spread: Spread, lead: float
) -> set[int]:
    """Streams a weight whenever the streamed bytes lag behind their share of the round."""
    ends, size = found.ends[spread], [found.sizes[name] for name in found.names]
    largest = max(size[index] for index in rest)
    factor, streamed = 1.0, set(rest)
    for _ in range(MOST_ROUNDS):
        total, now = 0, set()
        for index in rest:
            if total + (1 - lead) * size[index] <= factor * excess * ends[index]:
                now.add(index)
                total += size[index]
        streamed = now
        if total > excess - 2 * largest:
            break
        # Where nothing can be streamed the target runs ahead, and may not be reached any more.
        factor *= excess / max(total, 1)
    return streamed


def _tail(found: Candidates, rest: Sequence[int], excess: int) -> set[int]:
    """Streams the last ones."""
    streamed, total = set(), 0
    for index in reversed(rest):
        if total >= excess:
            break
        streamed.add(index)
        total += found.sizes[found.names[index]]
    return streamed


def _repair(found: Candidates, rest: Sequence[int], streamed: set[int], excess: int) -> None:
    """Streams more until it is enough, then keeps what need not be streamed."""
    size = [found.sizes[name] for name in found.names]
    load = [0] * (1 + max(found.steps))
    for index in streamed:
        load[found.steps[index]] += size[index]
    total = sum(size[index] for index in streamed)
    kept = sorted((i for i in rest if i not in streamed and size[i]), key=lambda i: (size[i], i))
    while total < excess:
        at = min(bisect.bisect_left(kept, excess - total, key=lambda i: size[i]), len(kept) - 1)
        chosen = min(
            (i for i in kept[at:] if size[i] == size[kept[at]]),
            key=lambda i: (load[found.steps[i]], i),
        )
        kept.remove(chosen)
        streamed.add(chosen)
        load[found.steps[chosen]] += size[chosen]
        total += size[chosen]
    for _ in range(MOST_REPAIRS):
        spare = [i for i in streamed if size[i] <= total - excess]
        if not spare:
            break
        chosen = max(spare, key=lambda i: (size[i], load[found.steps[i]], i))
        streamed.remove(chosen)
        load[found.steps[chosen]] -= size[chosen]
        total -= size[chosen]


def _time_ends(
    needs: Needs, order: Sequence[str], steps: Sequence[int], sizes: Mapping[str, int]
) -> tuple[float, ...]:
    """Share of the round's compute time when a weight has been read; a step is shared by bytes."""
    reached = [0.0, *itertools.accumulate(needs.step_s)]
    whole = reached[-1] or 1.0
    in_step: dict[int, int] = {}
    for name, step in zip(order, steps, strict=True):
        in_step[step] = in_step.get(step, 0) + sizes[name]
    so_far: dict[int, int] = {}
    ends = []
    for name, step in zip(order, steps, strict=True):
        so_far[step] = so_far.get(step, 0) + sizes[name]
        part = so_far[step] / max(1, in_step[step])
        ends.append((reached[step] + part * needs.step_s[step]) / whole)
    return tuple(ends)


def _shares(sizes: Sequence[int]) -> tuple[float, ...]:
    total = max(1, sum(sizes))
    return tuple(reached / total for reached in itertools.accumulate(sizes))
