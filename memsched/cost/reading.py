"""The actions of plans as tasks of numbers, for laying them out in time; each is read once."""

from collections.abc import Iterable, Sequence

from memsched.cost.contention import READS_AT_ONCE, Contending
from memsched.cost.roofline import CostModel
from memsched.cost.sharing import COMPUTE_LANE, FREE, Task
from memsched.machine import DEVICE, NVME, Machine
from memsched.plan import Action, Copy, Free, Run
from memsched.program import Program

COMPUTE = "compute"


def lane_of(action: Copy | Run) -> str:
    """The name of the lane that works an action off: "compute", or "nvme->device" and so on."""
    return COMPUTE if isinstance(action, Run) else f"{action.source}->{action.target}"


def from_disk(actions: Iterable[Action]) -> set[str]:
    """The arrays that a plan reads from disk to where steps take them."""
    copies = (one for one in actions if isinstance(one, Copy))
    return {one.array for one in copies if (one.source, one.target) == (NVME, DEVICE)}


class Reader:
    """Numbers places and lanes of one program on one machine, whatever plans are read."""

    def __init__(self, program: Program, machine: Machine, cost: CostModel) -> None:
        self._program, self._machine, self._cost = program, machine, cost
        self._contending = cost if isinstance(cost, Contending) else None
        self._places: dict[tuple[str, str], int] = {}
        self._lanes = {COMPUTE: COMPUTE_LANE}
        self._tasks: dict[Action, Task] = {}

    def tasks(self, actions: Sequence[Action]) -> tuple[Task, ...]:
        """The actions of one plan as tasks."""
        known = self._tasks
        found = tuple(known.get(action) or self._read(action) for action in actions)
        if self._contending is None:
            return found
        fetched = from_disk(actions)
        pairs = zip(actions, found, strict=True)
        return tuple(self._slowed(action, task, fetched) for action, task in pairs)

    def _read(self, action: Action) -> Task:
        task = self._tasks[action] = self._task(action)
        return task

    def _slowed(self, action: Action, task: Task, fetched: set[str]) -> Task:
        """A step that takes what came from disk is slow all along, whatever is copied meanwhile."""
        match action:
            case Run(step=name) if not fetched.isdisjoint(self._program.step(name).inputs):
                return task._replace(seconds=task.seconds * task.slowdown, slowdown=1.0)
            case _:
                return task

    def _task(self, action: Action) -> Task:
        match action:
            case Free(array=array, tier=tier):
                return Task(FREE, 0.0, (self._place(array, tier),), ())
            case Copy(array=array, source=source, target=target):
                takes: tuple[int, ...] = (self._place(array, source),)
                gives: tuple[int, ...] = (self._place(array, target),)
            case Run(step=name):
                step = self._program.step(name)
                takes = tuple(self._place(array, DEVICE) for array in step.inputs)
                gives = tuple(self._place(array, DEVICE) for array in step.results)
        lane = self._lanes.setdefault(lane_of(action), len(self._lanes))
        seconds = self._cost.seconds(action, self._program, self._machine)
        if self._contending is None:
            return Task(lane, seconds, takes, gives)
        slowdown = self._contending.slowdown(action, self._program, self._machine)
        return Task(lane, seconds, takes, gives, slowdown, *self._served(action))

    def _place(self, array: str, tier: str) -> int:
        return self._places.setdefault((array, tier), len(self._places))

    def _served(self, action: Action) -> tuple[int, int]:
        """In how many blocks an action is served, and how many of them at a time."""
        if not isinstance(action, Copy) or action.source != NVME:
            return 1, 1
        link = self._machine.link(action.source, action.target)
        if link is None:
            return 1, 1
        blocks = -(-self._program.arrays[action.array].nbytes // link.block_bytes)
        return max(1, blocks), min(link.queue_depth, READS_AT_ONCE)
