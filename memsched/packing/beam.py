"""One beam search: packings built from the bottom, many of them side by side in one array.

Every state has placed some items for good. It looks at its lowest section (the fullest of several)
and decides which item comes next there: one that can lie right on the floor, or none of them, and
then they rise to where the next could begin. These choices reach every packing in which each item
rests on another or on the ground, and so a best one. What a state wastes is seen at once: a section
cannot end below its floor plus the sizes that are still to come.

Source: the canonical packings and the bound follow M. D. Moffitt, MiniMalloc, ASPLOS 2023; the
choice of the section, the beam and its score are ours.
"""

import dataclasses
import time

import numpy as np

from memsched.packing.sections import Problem


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How a search chooses what to leave out.

    `width` states are kept at every step, and of the items that could come next the first
    `choices`. States are compared by the sum over sections of exp(sharpness x (how full they will
    at least be, as a part of the capacity)).
    """

    width: int
    choices: int
    sharpness: float


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """What a search found, in the problem's unit.

    `exhausted`: it left nothing out and found nothing, so there is no such packing.
    """

    offsets: np.ndarray | None
    exhausted: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class _States:
    """Columns are states.

    `lowest[item]`: the lowest offset that it can still have, `far` once it is placed.
    `floor[section]`: the lowest of these in it. `left[section]`: sum of the sizes to come.
    """

    lowest: np.ndarray
    floor: np.ndarray
    left: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True)
class _Moves:
    """From state `parent`: `item` goes to `offset`; or, where it is -1, its rivals rise to it."""

    parent: np.ndarray
    item: np.ndarray
    offset: np.ndarray


def beam_search(problem: Problem, capacity: int, settings: Settings, deadline_s: float) -> Trial:
    """Look for a packing that ends at `capacity` (in units) or below.

    Ends without one when `time.monotonic()` passes the deadline.
    """
    states, history, exhausted = _start(problem), [], True
    while time.monotonic() < deadline_s:
        moves, ready, complete = _next_moves(problem, states, settings.choices)
        exhausted &= complete
        states = _after(problem, states, moves, ready)
        kept, complete = _best(problem, states, capacity, settings)
        exhausted &= complete
        if not kept.size:
            return Trial(None, exhausted)
        states = _States(states.lowest[:, kept], states.floor[:, kept], states.left[:, kept])
        history.append(_Moves(moves.parent[kept], moves.item[kept], moves.offset[kept]))
        finished = np.flatnonzero(states.left.max(0) == 0)
        if finished.size:
            found = [_offsets(problem, history, int(column)) for column in finished]
            return Trial(min(found, key=lambda offsets: int((offsets + problem.size).max())))
    return Trial(None)


def _start(problem: Problem) -> _States:
    """Nothing is placed."""
    lowest = np.maximum(problem.fixed, 0)[:, None]
    _step_over_fixed(problem, lowest)
    return _States(
        lowest, problem.spans.lowest(lowest, problem.far), problem.load.sum(1, keepdims=True)
    )


def _next_moves(problem: Problem, states: _States, choices: int) -> tuple[_Moves, np.ndarray, bool]:
    """All moves, which items are rivals in which state, and whether none was left out."""
    here, level = _lowest_section(problem, states)
    ready = here & (states.lowest == level)
    able = ready.copy()
    # Of equal items the earlier goes first.
    twins = np.flatnonzero(problem.twin >= 0)
    able[twins] &= ~ready[problem.twin[twins]]
    tried = able & (np.cumsum(able, axis=0, dtype=np.int32) <= choices)
    item, parent = np.nonzero(tried)
    rise = _rise(problem, states, here, ready)
    rising = np.flatnonzero(rise < problem.far)
    moves = _Moves(
        np.concatenate((parent, rising)),
        np.concatenate((item, np.full(len(rising), -1))),
        np.concatenate((level[parent], rise[rising])),
    )
    return moves, ready, len(item) == int(able.sum())


def _lowest_section(problem: Problem, states: _States) -> tuple[np.ndarray, np.ndarray]:
    """For each state which items the section covers where it goes on, and that section's floor."""
    floor = np.where(states.left > 0, states.floor, problem.far)
    level = floor.min(0)
    section = np.where(floor == level, states.left, -1).argmax(0)
    return problem.covers[:, section], level


def _rise(problem: Problem, states: _States, here: np.ndarray, ready: np.ndarray) -> np.ndarray:
    """The next offset at which an item can begin in the section, if none begins at its floor.

    It rests either on something placed, or on an item outside the section that collides with it.
    """
    first = np.where(ready, problem.first[:, None], problem.covers.shape[1]).min(0)
    last = np.where(ready, problem.last[:, None], 0).max(0)
    near = (problem.first[:, None] < last) & (first < problem.last[:, None])
    tops = np.where(near, states.lowest + problem.size[:, None], problem.far)
    begins = np.where(ready, problem.far, states.lowest)
    rise = np.where(states.lowest >= problem.far, problem.far, np.where(here, begins, tops)).min(0)
    stuck = (ready & (problem.fixed >= 0)[:, None]).any(0)
    return np.where(stuck, problem.far, rise)


def _after(problem: Problem, states: _States, moves: _Moves, ready: np.ndarray) -> _States:
    """The states that the moves lead to."""
    count = int((moves.item >= 0).sum())  # placements come first
    item, parent = moves.item[:count], moves.parent
    lowest, left = states.lowest[:, parent], states.left[:, parent]
    tops = moves.offset[:count] + problem.size[item]
    pushed = np.where(problem.collides[:, item], tops, 0)
    np.maximum(lowest[:, :count], pushed, out=lowest[:, :count])
    lowest[item, np.arange(count)] = problem.far
    left[:, :count] -= problem.load[:, item]
    risen = ready[:, parent[count:]]
    lowest[:, count:] = np.where(risen, moves.offset[count:], lowest[:, count:])
    _step_over_fixed(problem, lowest)
    return _States(lowest, problem.spans.lowest(lowest, problem.far), left)


def _step_over_fixed(problem: Problem, lowest: np.ndarray) -> None:
    """Aligns the offsets; what does not fit below a fixed item goes above it. In place."""
    free = np.flatnonzero((problem.alignment > 1) & (problem.fixed < 0))
    alignment, size = problem.alignment[:, None], problem.size[:, None]
    lowest[free] = -(-lowest[free] // alignment[free]) * alignment[free]
    obstacles = np.flatnonzero(problem.fixed >= 0)
    for obstacle in obstacles[np.argsort(problem.fixed[obstacles])]:
        start, top = problem.fixed[obstacle], problem.fixed[obstacle] + problem.size[obstacle]
        rows = np.flatnonzero(problem.collides[obstacle] & (problem.fixed < 0))
        meets = (lowest[rows] < top) & (lowest[rows] + size[rows] > start)
        above = -(-top // alignment[rows]) * alignment[rows]
        lowest[rows] = np.where(meets, above, lowest[rows])


def _best(
    problem: Problem, states: _States, capacity: int, settings: Settings
) -> tuple[np.ndarray, bool]:
    """Columns of the states to keep, best first, and whether all that can succeed are kept."""
    least = np.where(states.left > 0, states.floor + states.left, 0)
    tops = np.where(states.lowest < problem.far, states.lowest + problem.size[:, None], 0)
    able = np.flatnonzero((least.max(0) <= capacity) & (tops.max(0) <= capacity))
    excess = (least[:, able].astype(np.float32) - capacity) * (settings.sharpness / capacity)
    able = able[np.argsort(np.exp(excess).sum(0), kind="stable")]
    # Several orders of the same choices lead to one state: keep it once.
    _, first = np.unique(problem.mixing @ states.lowest[:, able], return_index=True)
    distinct = able[np.sort(first)]
    return distinct[: settings.width], len(distinct) <= settings.width


def _offsets(problem: Problem, history: list[_Moves], column: int) -> np.ndarray:
    """Follows a state back to the start."""
    offsets = np.zeros(len(problem.size), np.int64)
    for moves in reversed(history):
        if moves.item[column] >= 0:
            offsets[moves.item[column]] = moves.offset[column]
        column = moves.parent[column]
    return offsets
