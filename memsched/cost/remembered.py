"""A cost model that is asked again and again about one program on one machine, as planning does."""

from memsched.cost.reading import Reader
from memsched.cost.roofline import CostModel
from memsched.machine import Machine
from memsched.plan import Action
from memsched.program import Program


class Remembered:
    """Another cost model, asked once per action of one program on one machine."""

    def __init__(self, cost: CostModel) -> None:
        self._asked = _Asked(cost)
        self._reader: Reader | None = None

    def seconds(self, action: Action, program: Program, machine: Machine) -> float:
        """Seconds of one action."""
        return self._asked.seconds(action, program, machine)

    def reader(self, program: Program, machine: Machine) -> Reader:
        """What has been read of plans of this program."""
        if self._reader is None:
            # It holds no `Remembered`: a cycle would keep all of it until Python looks for cycles.
            self._reader = Reader(program, machine, self._asked)
        return self._reader


class _Asked:
    """A cost model and its answers."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._known: dict[Action, float] = {}

    def seconds(self, action: Action, program: Program, machine: Machine) -> float:
        """Seconds of one action."""
        known = self._known.get(action)
        if known is None:
            known = self._known[action] = self._cost.seconds(action, program, machine)
        return known
