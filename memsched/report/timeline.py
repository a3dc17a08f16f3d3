"""A plan over time: what each tier holds, and what each lane is busy with.

What a tier holds is counted along the list of actions, as the referee does. Each action then has a
moment: a step when it starts, a Free when it is carried out, a Copy as soon as it is issued. So
the levels in time have the peaks of the list, whenever the copies themselves are under way.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from memsched.cost import CostModel, Span, is_steady, lane_of, simulate, simulate_rounds
from memsched.machine import DEVICE, NVME, Machine, Tier, rounded
from memsched.plan import Copy, Free, Plan, Residence, Run
from memsched.program import Program
from memsched.report.occupancy import IDLE, WORKSPACE

PINNED, STREAMED = "pinned weights", "streamed weights"
KIND_PARTS = {
    "cache": "cache",
    "feature": "features",
    "input": "inputs",
    "embedding": "inputs",
    "activation": "activations",
}
PARTS = (PINNED, STREAMED, IDLE, "cache", "features", "inputs", "activations", WORKSPACE)
_PLACE = {part: place for place, part in enumerate(PARTS)}
# A plan that follows itself has settled by its third round.
_ROUNDS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Stairs:
    """Levels of a tier over equal columns of time, a row for each stretch without a change.

    Stretch i begins with column `starts[i]` and holds `nbytes[i]`, in the order of `PARTS`: the
    fullest moment of its columns.
    """

    starts: NDArray[np.int64]
    nbytes: NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """Actions of one lane that are shown as one: `count` of them, from `first` to `last`."""

    start_s: float
    end_s: float
    busy_s: float
    first: int
    last: int
    count: int
    nbytes: int


def usual_spans(
    plan: Plan, program: Program, machine: Machine, cost: CostModel
) -> tuple[Span, ...]:
    """The spans of a plan; if it can follow itself those of a later round.

    Second 0 is then the end of the round before, and what is fetched ahead starts before it.
    """
    runs = [index for index, action in enumerate(plan.actions) if isinstance(action, Run)]
    if not runs or not is_steady(plan, program):
        return simulate(plan, program, machine, cost)
    *_, before, spans = simulate_rounds(plan, program, machine, cost, _ROUNDS)
    zero_s = before[runs[-1]].end_s
    return tuple(Span(one.index, one.start_s - zero_s, one.end_s - zero_s) for one in spans)


def time_range(chapters_spans: Iterable[Sequence[Span]], seconds: float) -> tuple[float, float]:
    """From the first start to the last end, and at least from 0 to `seconds`."""
    spans = [span for spans in chapters_spans for span in spans]
    starts, ends = [span.start_s for span in spans], [span.end_s for span in spans]
    return min([0.0, *starts]), max([seconds, *ends])


# ---- what tiers hold ----


def levels(plan: Plan, program: Program, machine: Machine) -> dict[str, NDArray[np.int64]]:
    """Bytes in use of each tier: row 0 before the first action, row i + 1 at action i, a column
    for each of `PARTS`.
    """
    rows = len(plan.actions) + 1
    found = {tier.name: np.zeros((rows, len(PARTS)), np.int64) for tier in machine.tiers}
    arena = {tier.name: np.zeros(rows, np.int64) for tier in machine.tiers}
    offsets: dict[tuple[str, str], int | None] = {}
    pinned = pinned_weights(plan)

    def change(tier: str, name: str, row: int, sign: int) -> None:
        nbytes = sign * _counted_bytes(machine.tier(tier), program, name)
        found[tier][row, _PLACE[_part(program, name, (name, tier) in pinned)]] += nbytes
        if offsets[name, tier] is not None:
            arena[tier][row] += nbytes

    for rest in plan.entry:
        offsets[rest.array, rest.tier] = rest.offset
        change(rest.tier, rest.array, 0, 1)
    for row, action in enumerate(plan.actions, start=1):
        match action:
            case Run(step=name):
                for array in program.step(name).writes:
                    offsets[array, DEVICE] = None
                    change(DEVICE, array, row, 1)
            case Copy(array=array, target=tier):
                offsets[array, tier] = plan.slots.get(row - 1)
                change(tier, array, row, 1)
            case Free(array=array, tier=tier):
                change(tier, array, row, -1)
    for tier, nbytes in found.items():
        np.cumsum(nbytes, axis=0, out=nbytes)
        nbytes[:, _PLACE[IDLE]] = (
            _arena_bytes(plan, program, machine.tier(tier)) - arena[tier].cumsum()
        )
    for row, action in enumerate(plan.actions, start=1):
        if isinstance(action, Run):
            found[DEVICE][row, _PLACE[WORKSPACE]] = program.step(action.step).workspace_bytes
    return found


def pinned_weights(plan: Plan) -> set[tuple[str, str]]:
    """Array and tier of all that a plan never moves away."""
    freed = {(one.array, one.tier) for one in plan.actions if isinstance(one, Free)}
    before, after = ({(one.array, one.tier) for one in rests} for rests in (plan.entry, plan.exit))
    return (before & after) - freed


def moments(plan: Plan, spans: Sequence[Span], start_s: float) -> NDArray[np.float64]:
    """When each row of `levels` begins to hold, in seconds; they never go back."""
    times = np.full(len(spans) + 1, start_s)
    for row, (action, span) in enumerate(zip(plan.actions, spans, strict=True), start=1):
        match action:
            case Run():
                times[row] = span.start_s
            case Free():
                times[row] = span.end_s
    return np.maximum.accumulate(times)


def stairs(
    nbytes: NDArray[np.int64],
    times_s: NDArray[np.float64],
    range_s: tuple[float, float],
    columns: int,
) -> Stairs:
    """Levels as a picture of so many columns has room for them: the fullest moment of each."""
    start_s, end_s = range_s
    width_s = (end_s - start_s) / columns
    inside = ((times_s - start_s) / width_s if width_s else np.zeros_like(times_s)).astype(int)
    column = np.clip(inside, 0, columns - 1)
    total = nbytes.sum(axis=1)
    shown = np.zeros(columns, np.int64)
    last = 0
    bounds = np.searchsorted(column, np.arange(columns + 1))
    for place, (first, after) in enumerate(itertools.pairwise(bounds)):
        # What the column before ends with is still there when this one begins.
        among = np.r_[last, first:after] if place else np.arange(first, after)
        shown[place] = among[np.argmax(total[among])]
        last = after - 1
    rows = nbytes[shown]
    starts = np.flatnonzero(np.r_[True, (rows[1:] != rows[:-1]).any(axis=1)])
    return Stairs(starts, rows[starts])


def _part(program: Program, name: str, stays: bool) -> str:
    kind = program.arrays[name].kind
    if kind == "weight":
        return PINNED if stays else STREAMED
    return KIND_PARTS[kind]


def _counted_bytes(tier: Tier, program: Program, name: str) -> int:
    """What an array takes of a budget: weights lie on disk anyway."""
    array = program.arrays[name]
    if tier.name == NVME and array.kind == "weight":
        return 0
    return rounded(array.nbytes, tier.alignment_bytes)


def _arena_bytes(plan: Plan, program: Program, tier: Tier) -> int:
    """Bytes of the union of all ranges that a plan ever uses in a tier's arena."""
    rests = [*plan.entry, *plan.exit]
    for index, offset in plan.slots.items():
        if isinstance(action := plan.actions[index], Copy):
            rests.append(Residence(action.array, action.target, offset=offset))
    ranges = {
        (
            rest.offset,
            rest.offset + rounded(program.arrays[rest.array].nbytes, tier.alignment_bytes),
        )
        for rest in rests
        if rest.tier == tier.name and rest.offset is not None
    }
    total = reached = 0
    for start, end in sorted(ranges):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


# ---- what lanes do ----


def lane_spans(plan: Plan, spans: Iterable[Span]) -> dict[str, list[Span]]:
    """Spans of Runs and Copies by lane, in the order of time; none begins before the last ends."""
    lanes: dict[str, list[Span]] = {}
    for span in spans:
        if isinstance(action := plan.actions[span.index], Run | Copy):
            lanes.setdefault(lane_of(action), []).append(span)
    return {lane: _one_by_one(found) for lane, found in lanes.items()}


def _one_by_one(spans: list[Span]) -> list[Span]:
    found: list[Span] = []
    reached_s = float("-inf")
    for span in sorted(spans, key=lambda one: (one.start_s, one.end_s, one.index)):
        start_s = max(span.start_s, reached_s)
        reached_s = max(span.end_s, start_s)
        found.append(Span(span.index, start_s, reached_s))
    return found


def lane_blocks(
    plan: Plan, program: Program, spans: Iterable[Span], most: int
) -> dict[str, list[Block]]:
    """Every lane as about `most` blocks or fewer: short neighbours are put together."""
    sizes: Mapping[int, int] = {
        index: program.arrays[action.array].nbytes
        for index, action in enumerate(plan.actions)
        if isinstance(action, Copy)
    }
    return {lane: _blocks(found, sizes, most) for lane, found in lane_spans(plan, spans).items()}


def _blocks(spans: Sequence[Span], sizes: Mapping[int, int], most: int) -> list[Block]:
    # Two neighbours always take more than this together, so there are at most `most` of them.
    fine_s = 2 * (spans[-1].end_s - spans[0].start_s) / most if len(spans) > most else 0.0
    found: list[Block] = []
    for span in spans:
        took_s, nbytes = span.end_s - span.start_s, sizes.get(span.index, 0)
        if fine_s and found and span.end_s - found[-1].start_s <= fine_s:
            last = found[-1]
            found[-1] = Block(
                last.start_s,
                span.end_s,
                last.busy_s + took_s,
                last.first,
                span.index,
                last.count + 1,
                last.nbytes + nbytes,
            )
        else:
            found.append(Block(span.start_s, span.end_s, took_s, span.index, span.index, 1, nbytes))
    return found
