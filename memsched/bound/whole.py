"""The program that gives the bound, for plans in which weights stay or move as a whole.

While a step runs, the device holds all that it streams. The linear program spreads that evenly over
all steps, down to parts of arrays; but some step streams the most, and that is a sum of whole
arrays. So every such sum is tried: then no step streams more, what is kept leaves room for it, and
numbers of arrays are integers.

That is no bound of all schedules: of three equal weights with room for two a plan that keeps one
copies two in a pass; one that keeps another in every pass copies three in two.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from memsched.bound.masses import Masses
from memsched.bound.problem import Problem, bounds_of, problem_of

# Weights smaller than this share of the largest may be streamed beside any sum.
TINY = 0.01
# Sums are put together to so many ranges. A step of too many is taken to stream what it likes.
MOST_RANGES = 12
MOST_SUMS = 20_000
# Of larger classes the share is divisible: that makes no difference to see.
MOST_COUNTED = 1000
# Integers are looked for in so many nodes; what is found by then will do.
MOST_NODES = 200
# HiGHS' word for it, in SciPy's numbers.
IMPOSSIBLE = 2


@dataclasses.dataclass(frozen=True, slots=True)
class _Range:
    """The most that a step streams is from `least_bytes` to `most_bytes`, tiny ones aside."""

    least_bytes: int
    most_bytes: int


def by_seconds(problems: Iterable[Problem]) -> list[Problem]:
    """Problems that can be solved, the least seconds first, arrays being divisible."""
    solved = [(minimum(problem, integers=False), problem) for problem in problems]
    possible = [
        (float(found.fun or 0.0) * problem.columns.second_unit, problem)
        for found, problem in solved
        if found.status != IMPOSSIBLE
    ]
    return [problem for _, problem in sorted(possible, key=lambda one: one[0])]


def narrowed(masses: Masses) -> Iterator[tuple[int, Problem]]:
    """The linear program for each range in which the most that a step streams can be.

    With the least of that range. Together they have all plans that keep the same in every pass.
    """
    sums = [_sums(masses, window) for window in range(len(masses.windows))]
    for one in _ranges(sums):
        yield one.least_bytes, _narrowed(masses, sums, one)


def _sums(masses: Masses, window: int) -> tuple[int, ...]:
    """All that a step can stream, but tiny weights: sums of the others. None if they are many."""
    tiny_bytes = _tiny_bytes(masses)
    counts: dict[int, float] = {}
    for one in masses.weights:
        if one.device_bytes > tiny_bytes:
            share = one.count * one.shares.get(window, 0.0)
            counts[one.device_bytes] = counts.get(one.device_bytes, 0.0) + share
    found = {0}
    for size, count in counts.items():
        more = [size * times for times in range(round(count) + 1)]
        if len(found) * len(more) > MOST_SUMS:
            return ()
        found = {one + other for one, other in itertools.product(found, more)}
    return tuple(sorted(found))


def _tiny_bytes(masses: Masses) -> float:
    return TINY * max((one.device_bytes for one in masses.weights), default=0)


def _ranges(sums: Sequence[tuple[int, ...]]) -> Iterator[_Range]:
    """All sums of all windows, in few ranges."""
    found = sorted({one for window in sums for one in window})
    stride = -(-len(found) // MOST_RANGES) or 1
    for first in range(0, len(found), stride):
        last = min(first + stride, len(found)) - 1
        yield _Range(found[first], found[last])


def _narrowed(masses: Masses, sums: Sequence[tuple[int, ...]], one: _Range) -> Problem:
    """The linear program for schedules in which the most that a step streams is in a range."""
    problem = problem_of(masses).with_passing(None)
    columns = problem.columns
    tiny_bytes = _tiny_bytes(masses)
    rooms = []
    for index, (window, known) in enumerate(zip(masses.windows, sums, strict=True)):
        if not known:
            continue
        if known[-1] >= one.least_bytes:
            rooms.append(window.touched_bytes + window.idle_bytes)
        most = known[bisect.bisect_right(known, one.most_bytes) - 1]
        streamed = [
            weight.count * weight.shares.get(index, 0.0) * weight.device_bytes
            if weight.device_bytes > tiny_bytes
            else 0.0
            for weight in masses.weights
        ]
        limit = most - sum(streamed)
        problem.add(columns.row([-nbytes for nbytes in streamed]), limit)
    if rooms:
        kept = [weight.count * weight.device_bytes for weight in masses.weights]
        stays = [-value.count * value.device_bytes for value in masses.values]
        room = masses.device_capacity_bytes - min(rooms) - one.least_bytes
        problem.add(columns.row(kept, (), stays), room)
    return problem


def minimum(problem: Problem, *, integers: bool) -> Any:
    """HiGHS' answer: the least T. Of weights, numbers of arrays take the place of shares."""
    # SciPy's optimisers take as long to import as a small model to plan.
    from scipy.optimize import Bounds, LinearConstraint, milp

    columns = problem.columns
    counts = _counts(columns.masses)
    lower, upper = (np.array(one, float) for one in zip(*bounds_of(columns), strict=True))
    upper[np.isnan(upper)] = np.inf
    upper[:-1] *= counts
    return milp(
        columns.row(seconds=1.0),
        integrality=np.array([*(counts <= MOST_COUNTED), False], int) if integers else None,
        bounds=Bounds(lower, upper),
        constraints=LinearConstraint(
            np.array(problem.rows) / np.array([*counts, 1.0]), -np.inf, np.array(problem.limits)
        ),
        options={"node_limit": MOST_NODES, "mip_rel_gap": 1e-4} if integers else None,
    )


def _counts(masses: Masses) -> npt.NDArray[np.float64]:
    """How many arrays a share of 1 is, for all variables but the seconds."""
    weights = [one.count for one in masses.weights]
    return np.array([*weights, *weights, *(one.count for one in masses.values)], float)
