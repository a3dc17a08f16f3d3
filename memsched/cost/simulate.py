"""Lays a plan out in time, as the runtime would carry it out.

Actions are issued in order. Each link and the compute unit is a lane that works its actions off one
after another; an action starts when its lane is idle and its arrays have arrived. Only a Free makes
the issue wait, until the last action that uses the array has finished. A cost model that knows how
steps and copies slow each other down is taken at its word (`sharing`).
"""

import dataclasses
import itertools
import operator
from collections.abc import Sequence

from memsched.cost.reading import Reader
from memsched.cost.remembered import Remembered
from memsched.cost.roofline import CostModel
from memsched.cost.sharing import FREE, Task, share
from memsched.cost.span import Span
from memsched.machine import Machine
from memsched.plan import Plan, Run
from memsched.program import Program

# A repeated plan settles in its second round: the third is compared with the second.
STEADY_ROUNDS = 3
_LANE, _TAKES, _GIVES, _SLOWDOWN = map(operator.attrgetter, ("lane", "takes", "gives", "slowdown"))


@dataclasses.dataclass(slots=True)
class _Clock:
    """How far time has come: the issue, every lane, each place's arrival and last use."""

    issue: float
    lanes: list[float]
    ready: list[float]
    used: list[float]


def simulate(plan: Plan, program: Program, machine: Machine, cost: CostModel) -> tuple[Span, ...]:
    """The spans of a plan's actions, everything in its entry being there at time 0."""
    return simulate_rounds(plan, program, machine, cost, 1)[0]


def simulate_rounds(
    plan: Plan, program: Program, machine: Machine, cost: CostModel, rounds: int
) -> tuple[tuple[Span, ...], ...]:
    """The spans of a plan that follows itself `rounds` times. Times count from the first start."""
    found = _rounds(_read(plan, program, machine, cost), rounds)
    return tuple(tuple(Span(index, *times) for index, times in enumerate(one)) for one in found)


def plan_seconds(plan: Plan, program: Program, machine: Machine, cost: CostModel) -> float:
    """Seconds of one plan, or of one round if it can follow itself.

    A round ends with its last step. What it fetches for the next one may still be under way.
    """
    tasks = _read(plan, program, machine, cost)
    backwards = reversed(range(len(plan.actions)))
    last = next((index for index in backwards if isinstance(plan.actions[index], Run)), None)
    if last is None or not is_steady(plan, program):
        (times,) = _rounds(tasks, 1)
        return max((end for _, end in times), default=0.0)
    # What the round after fetches slows the last steps of a round down.
    more = 1 if _contending(tasks) else 0
    ends = [times[last][1] for times in _rounds(tasks, STEADY_ROUNDS + more)]
    return ends[STEADY_ROUNDS - 1] - ends[STEADY_ROUNDS - 2]


def is_steady(plan: Plan, program: Program) -> bool:
    """Whether weights lie after the plan as they lay before it, so that it can follow itself."""
    moved = set(plan.entry) ^ set(plan.exit)
    return all(program.arrays[one.array].kind != "weight" for one in moved)


def _rounds(tasks: Sequence[Task], rounds: int) -> list[list[tuple[float, float]]]:
    """Start and end of every task, for tasks that follow themselves so many times."""
    if _contending(tasks):
        times = share([*tasks] * rounds)
        return [times[first : first + len(tasks)] for first in range(0, len(times), len(tasks))]
    lanes = 1 + max(map(_LANE, tasks), default=0)
    used = itertools.chain(map(_TAKES, tasks), map(_GIVES, tasks))
    places = 1 + max(itertools.chain.from_iterable(used), default=0)
    clock = _Clock(0.0, [0.0] * lanes, [0.0] * places, [0.0] * places)
    return [_advance(clock, tasks) for _ in range(rounds)]


def _contending(tasks: Sequence[Task]) -> bool:
    return not {1.0}.issuperset(map(_SLOWDOWN, tasks))


def _advance(clock: _Clock, tasks: Sequence[Task]) -> list[tuple[float, float]]:
    """Start and end of every action, from where the clock stands."""
    ready, used, lanes = clock.ready, clock.used, clock.lanes
    issue = clock.issue
    times = []
    for lane, seconds, takes, gives, *_ in tasks:
        if lane == FREE:
            place = takes[0]
            if used[place] > issue:
                issue = used[place]
            ready[place] = used[place] = 0.0
            times.append((issue, issue))
            continue
        start = lanes[lane]
        if issue > start:
            start = issue
        for place in takes:
            if ready[place] > start:
                start = ready[place]
        for place in gives:
            # What is written in place may still be read by a copy.
            if used[place] > start:
                start = used[place]
        end = lanes[lane] = start + seconds
        for place in takes:
            if used[place] < end:
                used[place] = end
        for place in gives:
            ready[place] = used[place] = end
        times.append((start, end))
    clock.issue = issue
    return times


def _read(plan: Plan, program: Program, machine: Machine, cost: CostModel) -> tuple[Task, ...]:
    """The actions of a plan."""
    if isinstance(cost, Remembered):
        reader = cost.reader(program, machine)
    else:
        reader = Reader(program, machine, cost)
    return reader.tasks(plan.actions)
