"""Lays a plan out in time, as the runtime would carry it out.

Actions are issued in order. Each link and the compute unit is a lane that works its actions off one
after another; an action starts when its lane is idle and its arrays have arrived. Only a Free makes
the issue wait, until the last action that uses the array has finished.
"""

import dataclasses
from collections.abc import Sequence

from memsched.cost.roofline import CostModel
from memsched.cost.span import Span
from memsched.machine import DEVICE, Machine
from memsched.plan import Copy, Free, Plan, Run
from memsched.program import Program

COMPUTE = "compute"
# A repeated plan settles in its second round: the third is compared with the second.
STEADY_ROUNDS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class _Task:
    """An action, read once. Lanes and places (an array in a tier) are numbers; a Free has lane -1.

    `takes` are the places that must be ready, `gives` those that become ready at its end.
    """

    lane: int
    seconds: float
    takes: tuple[int, ...]
    gives: tuple[int, ...]


@dataclasses.dataclass(slots=True)
class _Clock:
    """How far time has come: the issue, every lane, each place's arrival and last use."""

    issue: float
    lanes: list[float]
    ready: list[float]
    used: list[float]


def lane_of(action: Copy | Run) -> str:
    """The name of the lane that works an action off: "compute", or "nvme->device" and so on."""
    return COMPUTE if isinstance(action, Run) else f"{action.source}->{action.target}"


def simulate(plan: Plan, program: Program, machine: Machine, cost: CostModel) -> tuple[Span, ...]:
    """The spans of a plan's actions, everything in its entry being there at time 0."""
    return simulate_rounds(plan, program, machine, cost, 1)[0]


def simulate_rounds(
    plan: Plan, program: Program, machine: Machine, cost: CostModel, rounds: int
) -> tuple[tuple[Span, ...], ...]:
    """The spans of a plan that follows itself `rounds` times. Times count from the first start."""
    clock, tasks = _read(plan, program, machine, cost)
    return tuple(
        tuple(Span(index, *times) for index, times in enumerate(_advance(clock, tasks)))
        for _ in range(rounds)
    )


def plan_seconds(plan: Plan, program: Program, machine: Machine, cost: CostModel) -> float:
    """Seconds of one plan, or of one round if it can follow itself.

    A round ends with its last step. What it fetches for the next one may still be under way.
    """
    clock, tasks = _read(plan, program, machine, cost)
    runs = [index for index, action in enumerate(plan.actions) if isinstance(action, Run)]
    if not runs or not is_steady(plan, program):
        return max((end for _, end in _advance(clock, tasks)), default=0.0)
    ends = [_advance(clock, tasks)[runs[-1]][1] for _ in range(STEADY_ROUNDS)]
    return ends[-1] - ends[-2]


def is_steady(plan: Plan, program: Program) -> bool:
    """Whether weights lie after the plan as they lay before it, so that it can follow itself."""
    if plan.entry == plan.exit:
        return True
    before, after = (
        {one for one in residences if program.arrays[one.array].kind == "weight"}
        for residences in (plan.entry, plan.exit)
    )
    return before == after


def _advance(clock: _Clock, tasks: Sequence[_Task]) -> list[tuple[float, float]]:
    """Start and end of every action, from where the clock stands."""
    ready, used, lanes = clock.ready, clock.used, clock.lanes
    issue = clock.issue
    times = []
    for task in tasks:
        if task.lane < 0:
            place = task.takes[0]
            issue = max(issue, used[place])
            ready[place] = used[place] = 0.0
            times.append((issue, issue))
            continue
        start = max(issue, lanes[task.lane])
        for place in task.takes:
            if ready[place] > start:
                start = ready[place]
        for place in task.gives:
            # What is written in place may still be read by a copy.
            if used[place] > start:
                start = used[place]
        end = lanes[task.lane] = start + task.seconds
        for place in task.takes:
            if used[place] < end:
                used[place] = end
        for place in task.gives:
            ready[place] = used[place] = end
        times.append((start, end))
    clock.issue = issue
    return times


def _read(
    plan: Plan, program: Program, machine: Machine, cost: CostModel
) -> tuple[_Clock, tuple[_Task, ...]]:
    """The tasks of a plan, and a clock at 0."""
    places: dict[tuple[str, str], int] = {}
    lanes: dict[str, int] = {}
    tasks = []

    def place(array: str, tier: str) -> int:
        return places.setdefault((array, tier), len(places))

    for action in plan.actions:
        match action:
            case Free(array=array, tier=tier):
                tasks.append(_Task(-1, 0.0, (place(array, tier),), ()))
                continue
            case Copy(array=array, source=source, target=target):
                takes: tuple[int, ...] = (place(array, source),)
                gives: tuple[int, ...] = (place(array, target),)
            case Run(step=name):
                step = program.step(name)
                takes = tuple(place(array, DEVICE) for array in step.inputs)
                gives = tuple(place(array, DEVICE) for array in step.results)
        lane = lanes.setdefault(lane_of(action), len(lanes))
        tasks.append(_Task(lane, cost.seconds(action, program, machine), takes, gives))
    clock = _Clock(0.0, [0.0] * len(lanes), [0.0] * len(places), [0.0] * len(places))
    return clock, tuple(tasks)
