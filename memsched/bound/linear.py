"""The bound as a linear program, and what its constraints are worth.

In a plan that follows itself a weight is copied to the device in a pass, or lies there all the
time. So with x of a class kept on the device and y of it in the device or the host, at all times:

- every lane is busy for the copies of what is not kept, and that is no longer than the pass;
- while a step runs, the device holds what is kept, all weights of the step, and its values;
- both tiers together hold what is kept in either, and twice what goes on from "nvme" to the device;
- what comes while a step runs has room beside all this; what has none comes while no step runs, and
  the pass is as long as all of that and all steps.

Caches and features stay, too, unless they are copied out and back. Recomputing, prefetching and
the order of steps change nothing here: the pass is bounded whatever the schedule.
Source: a relaxation of placement as a multiple-choice knapsack; its dual values are the prices.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from memsched.bound.flights import flights, lanes
from memsched.bound.masses import Masses
from memsched.bound.problem import (
    COMPUTE,
    Problem,
    Row,
    bounds_of,
    least_bytes,
    only,
    problem_of,
)
from memsched.machine import DEVICE, HOST

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


def solve(masses: Masses) -> Solution:
    """The bound of all schedules."""
    best: Solution | None = None
    problem = problem_of(masses, flights(masses))
    for passing in _passing(masses):
        found = _solve(problem.with_passing(passing), passing)
        if found is not None and (best is None or found.seconds < best.seconds):
            best = found
            if best.seconds <= masses.compute_s:
                break  # no pass is shorter than its steps
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
        kept = sum(least_bytes(one) * one.count for one in masses.weights if one.host_bytes > size)
        if size == max(sizes, default=0) or kept <= room:
            yield size


def least_busy_s(masses: Masses) -> dict[str, float]:
    """How long each lane is busy at least, were it the only one that counts."""
    problem = problem_of(masses).with_passing(None)
    found = {COMPUTE: masses.compute_s}
    for part in (part for parts in problem.parts for part in parts):
        if part.lane != masses.out_lane:
            unit_s = problem.columns.second_unit
            best = _minimum(problem, part.row / unit_s, [])
            assert best is not None, "nothing kept is always a solution"
            found[part.lane] = SAFE * max(0.0, unit_s * float(best.fun) - part.limit)
    return found


def _solve(problem: Problem, passing: int | None) -> Solution | None:
    """The bound where no weight larger than this passes through the host; None if none can."""
    large = [
        index
        for index, one in enumerate(problem.columns.masses.weights)
        if passing is not None and one.host_bytes > passing
    ]
    found = _minimum(problem, problem.columns.row(seconds=1.0), large)
    return None if found is None else _solution(problem, found)


def _minimum(problem: Problem, goal: Row, kept: Sequence[int]) -> Any | None:
    """HiGHS' answer, None if there is none. Classes `kept` stay on the device or in the host."""
    # SciPy's optimisers take as long to import as a small model to plan.
    from scipy.optimize import linprog

    columns = problem.columns
    fixed = [only(index, len(columns.masses.weights)) for index in kept]
    found = linprog(
        goal,
        A_ub=np.array(problem.rows),
        b_ub=np.array(problem.limits),
        A_eq=np.array([columns.row(one, one) for one in fixed]) if fixed else None,
        b_eq=np.ones(len(fixed)) if fixed else None,
        bounds=bounds_of(columns),
        method="highs",
    )
    return found if found.status == 0 else None


def _solution(problem: Problem, found: Any) -> Solution:
    """Reads an answer. A marginal is what T gains per unit of a limit."""
    masses, unit = problem.columns.masses, problem.columns.second_unit
    per_gb = {DEVICE: 0.0} | ({} if masses.host_capacity_bytes is None else {HOST: 0.0})
    of_lane = dict.fromkeys((masses.out_lane, *lanes(masses)), 0.0)
    of_lane[COMPUTE] = max(0.0, float(found.lower.marginals[-1])) * masses.compute_s
    for tiers, parts, marginal in zip(
        problem.tiers, problem.parts, found.ineqlin.marginals, strict=True
    ):
        worth = max(0.0, -float(marginal))
        for part in parts:
            of_lane[part.lane] += worth * (float(part.row @ found.x) - part.limit)
        for tier in tiers:
            per_gb[tier] += worth * unit * GB / problem.columns.byte_unit
    of_lane = {lane: max(0.0, seconds) for lane, seconds in of_lane.items()}
    return Solution(max(masses.compute_s, SAFE * unit * float(found.fun)), per_gb, of_lane)
