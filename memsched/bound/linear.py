"""The bound as a linear program, and what its constraints are worth.

In a plan that follows itself a weight is copied to the device in a pass, or lies there all the
time. So with x of a class kept on the device and y of it in the device or the host, at all times:

- every lane is busy for the copies of what is not kept, and that is no longer than the pass;
- while a step runs, the device holds what is kept, all weights of the step, and its values;
- both tiers together hold what is kept in either, and twice what goes on from "nvme" to the device.

Caches and features stay, too, unless they are copied out and back. Recomputing, prefetching and
the order of steps change nothing here: the pass is bounded whatever the schedule.
Source: a relaxation of placement as a multiple-choice knapsack; its dual values are the prices.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from memsched.bound.masses import Masses, WeightClass
from memsched.machine import DEVICE, HOST

COMPUTE = "compute"
GB = 10**9
# HiGHS keeps constraints to 1e-7; a bound must not be above the truth.
SAFE = 1 - 1e-7
MOST_PASSING = 12


@dataclasses.dataclass(frozen=True, slots=True)
class Solution:
    """The least seconds of a pass.

    `seconds_per_gb`: by how much the bound falls per GB of a tier, for the first byte.
    `seconds_of_lane`: a lane that is 1 % faster lowers the bound by 1 % of these; a lane with none
    sets no part of it.
    """

    seconds: float
    seconds_per_gb: Mapping[str, float]
    seconds_of_lane: Mapping[str, float]


Row = npt.NDArray[np.float64]
Numbers = Sequence[int | float]


@dataclasses.dataclass(frozen=True, slots=True)
class Columns:
    """Variables: x and y of each class of weights, u of each class of values, and the seconds T.

    Bytes and seconds are divided by a unit each, so that tiny programs are solved as exactly as
    large ones.
    """

    masses: Masses
    byte_unit: float
    second_unit: float

    @property
    def width(self) -> int:
        """How many there are."""
        return 2 * len(self.masses.weights) + len(self.masses.values) + 1

    def row(
        self,
        kept: Numbers = (),
        near: Numbers = (),
        spilled: Numbers = (),
        seconds: float = 0.0,
    ) -> Row:
        """Coefficients of x, y, u and T; those of y are 0 where there is no host."""
        count = len(self.masses.weights)
        row = np.zeros(self.width)
        row[: len(kept)] = kept
        row[count : count + len(near)] = near
        row[2 * count : 2 * count + len(spilled)] = spilled
        row[-1] = seconds
        return row


@dataclasses.dataclass(slots=True)
class Problem:
    """Constraints `rows @ x <= limits`. `tags` are the tiers in a limit, or the lane of a row."""

    columns: Columns
    rows: list[Row] = dataclasses.field(default_factory=list)
    limits: list[float] = dataclasses.field(default_factory=list)
    tags: list[tuple[str, ...]] = dataclasses.field(default_factory=list)

    def hold(self, row: Row, room_bytes: int | float, *tiers: str) -> None:
        """Bytes within a room. Nothing runs with less than none: then it is taken to be enough."""
        self.rows.append(row / self.columns.byte_unit)
        self.limits.append(max(0.0, room_bytes) / self.columns.byte_unit)
        self.tags.append(tiers if room_bytes > 0 else ())

    def add(self, row: Row, limit_bytes: int | float) -> None:
        """Any other limit in bytes."""
        self.rows.append(row / self.columns.byte_unit)
        self.limits.append(limit_bytes / self.columns.byte_unit)
        self.tags.append(())

    def busy(self, lane: str, saved: Row, whole_s: int | float) -> None:
        """A lane is busy for `whole_s` less what is saved, and no longer than T."""
        row = saved / self.columns.second_unit
        row[-1] = -1.0
        self.rows.append(row)
        self.limits.append(-whole_s / self.columns.second_unit)
        self.tags.append((lane,))


def solve(masses: Masses) -> Solution:
    """The bound of all schedules."""
    best: Solution | None = None
    for passing in _passing(masses):
        found = _solve(masses, passing)
        if found is not None and (best is None or found.seconds < best.seconds):
            best = found
    assert best is not None, "with the largest weight passing there is always a solution"
    return best


def _passing(masses: Masses) -> Iterator[int | None]:
    """Bytes of the largest weight that comes from "nvme", and has to have room in the host.

    All larger ones are kept then: there is nothing to try where they do not fit. Not to know (None)
    makes the bound lower, not wrong.
    """
    sizes = sorted({one.host_bytes for one in masses.weights}, reverse=True)
    if masses.host_capacity_bytes is None or len(sizes) > MOST_PASSING:
        yield None
        return
    room = masses.device_capacity_bytes + masses.host_capacity_bytes
    for size in (*sizes, 0):
        kept = sum(_least(one) * one.count for one in masses.weights if one.host_bytes > size)
        if size == max(sizes, default=0) or kept <= room:
            yield size


def least_busy_s(masses: Masses) -> dict[str, float]:
    """How long each lane is busy at least, were it the only one that counts."""
    problem = problem_of(masses, None)
    found = {COMPUTE: masses.compute_s}
    for row, limit, tags in zip(problem.rows, problem.limits, problem.tags, strict=True):
        if row[-1] and tags != (masses.out_lane,):
            goal = row.copy()
            goal[-1] = 0.0
            best = _minimum(problem, goal, [])
            assert best is not None, "nothing kept is always a solution"
            busy_s = problem.columns.second_unit * (float(best.fun) - limit)
            found[tags[0]] = SAFE * max(0.0, busy_s)
    return found


def _solve(masses: Masses, passing: int | None) -> Solution | None:
    """The bound where no weight larger than this passes through the host; None if none can."""
    problem = problem_of(masses, passing)
    large = [
        index
        for index, one in enumerate(masses.weights)
        if passing is not None and one.host_bytes > passing
    ]
    found = _minimum(problem, problem.columns.row(seconds=1.0), large)
    return None if found is None else _solution(problem, found)


def _minimum(problem: Problem, goal: Row, kept: Sequence[int]) -> Any | None:
    """HiGHS' answer, None if there is none. Classes `kept` stay on the device or in the host."""
    # SciPy's optimisers take as long to import as a small model to plan.
    from scipy.optimize import linprog

    columns = problem.columns
    only = [_only(index, len(columns.masses.weights)) for index in kept]
    found = linprog(
        goal,
        A_ub=np.array(problem.rows),
        b_ub=np.array(problem.limits),
        A_eq=np.array([columns.row(one, one) for one in only]) if only else None,
        b_eq=np.ones(len(only)) if only else None,
        bounds=bounds_of(columns),
        method="highs",
    )
    return found if found.status == 0 else None


def _solution(problem: Problem, found: Any) -> Solution:
    """Reads an answer. A marginal is what T gains per unit of a limit."""
    masses, unit = problem.columns.masses, problem.columns.second_unit
    per_gb = {DEVICE: 0.0} | ({} if masses.host_capacity_bytes is None else {HOST: 0.0})
    of_lane = {COMPUTE: max(0.0, float(found.lower.marginals[-1])) * masses.compute_s}
    for row, limit, tags, marginal in zip(
        problem.rows, problem.limits, problem.tags, found.ineqlin.marginals, strict=True
    ):
        worth = max(0.0, -float(marginal))
        if row[-1]:
            busy_s = unit * (float(row[:-1] @ found.x[:-1]) - limit)
            of_lane[tags[0]] = worth * busy_s
            continue
        for tier in tags:
            per_gb[tier] += worth * unit * GB / problem.columns.byte_unit
    return Solution(max(masses.compute_s, SAFE * unit * float(found.fun)), per_gb, of_lane)


def problem_of(masses: Masses, passing: int | None) -> Problem:
    """All constraints but bounds."""
    weights, values = masses.weights, masses.values
    copies_s = [one.count * (one.arrival_s + one.staging_s) for one in weights]
    unit_s = masses.compute_s + sum(copies_s) or 1.0
    unit_bytes = float(sum(one.count * one.device_bytes for one in weights) or 1)
    problem = Problem(Columns(masses, unit_bytes, unit_s))
    columns = problem.columns
    arrival = [one.count * one.arrival_s for one in weights]
    back = [one.count * one.back_s for one in values]
    problem.busy(masses.arrival_lane, columns.row([-s for s in arrival], (), back), sum(arrival))
    problem.busy(
        masses.out_lane, columns.row((), (), [one.count * one.out_s for one in values]), 0.0
    )
    if masses.staging_lane is not None:
        staging = [one.count * one.staging_s for one in weights]
        saved = [-s for s in staging]
        problem.busy(masses.staging_lane, columns.row(saved, saved), sum(staging))
    _hold_shares(problem)
    _hold_windows(problem)
    _hold_between(problem, passing)
    return problem


def _hold_shares(problem: Problem) -> None:
    """No weight is kept twice."""
    for index in range(len(problem.columns.masses.weights)):
        only = _only(index, len(problem.columns.masses.weights))
        problem.rows.append(problem.columns.row(only, only))
        problem.limits.append(1.0)
        problem.tags.append(())


def _hold_windows(problem: Problem) -> None:
    """While a step runs: on the device, and in both tiers together."""
    masses, columns = problem.columns.masses, problem.columns
    stays = [-one.count * one.device_bytes for one in masses.values]
    for index, window in enumerate(masses.windows):
        apart = [one.count * (1 - one.shares.get(index, 0.0)) for one in masses.weights]
        read = sum(
            one.count * one.shares.get(index, 0.0) * one.device_bytes for one in masses.weights
        )
        room = masses.device_capacity_bytes - window.touched_bytes - window.idle_bytes - read
        kept = [share * one.device_bytes for share, one in zip(apart, masses.weights, strict=True)]
        # Without idle values there is nothing to gain from spilling.
        spilled = stays if window.idle_bytes else ()
        problem.hold(columns.row(kept, (), spilled), room, DEVICE)
        if masses.host_capacity_bytes is not None:
            either = [share * _least(one) for share, one in zip(apart, masses.weights, strict=True)]
            room += masses.host_capacity_bytes
            problem.hold(columns.row(either, either, spilled), room, DEVICE, HOST)


def _hold_between(problem: Problem, passing: int | None) -> None:
    """Between two passes, and while the largest passing weight goes from the host to the device:
    then it takes room in both.
    """
    masses, columns = problem.columns.masses, problem.columns
    room = masses.device_capacity_bytes - masses.between_bytes
    kept = [one.count * one.device_bytes for one in masses.weights]
    problem.hold(columns.row(kept), room, DEVICE)
    if masses.host_capacity_bytes is None:
        return
    either = [one.count * _least(one) for one in masses.weights]
    room += masses.host_capacity_bytes
    problem.hold(columns.row(either, either), room, DEVICE, HOST)
    stays = [-one.count * one.device_bytes for one in masses.values]
    passing_bytes = [
        one.host_bytes + one.device_bytes for one in masses.weights if one.host_bytes == passing
    ]
    room += masses.between_bytes - masses.stays_bytes - min(passing_bytes, default=0)
    problem.hold(columns.row(either, either, stays), room, DEVICE, HOST)


def bounds_of(columns: Columns) -> list[tuple[float, float | None]]:
    """All are shares from 0 to 1, and T is no less than the compute."""
    masses = columns.masses
    bounds: list[tuple[float, float | None]] = [(0.0, 1.0)] * (columns.width - 1)
    if masses.host_capacity_bytes is None:
        first = len(masses.weights)
        bounds[first : 2 * first] = [(0.0, 0.0)] * first
    return [*bounds, (masses.compute_s / columns.second_unit, None)]


def _least(one: WeightClass) -> int:
    """What a weight takes at least, in the device or the host."""
    return min(one.device_bytes, one.host_bytes)


def _only(index: int, count: int) -> list[float]:
    return [float(other == index) for other in range(count)]
