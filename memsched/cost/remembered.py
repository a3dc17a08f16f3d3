"""A cost model that is asked again and again about one program on one machine, as planning does."""

from memsched.cost.reading import Reader
from memsched.cost.roofline import CostModel
from memsched.machine import Machine
from memsched.plan import Action
from memsched.program import Program


class Remembered:
    """Another cost model, asked once per action of one program on one machine."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._known: dict[Action, float] = {}
        self._reader: Reader | None = None

    def seconds(self, action: Action, program: Program, machine: Machine) -> float:
        """Seconds of one action."""
        known = self._known.get(action)
        if known is None:
            known = self._known[action] = self._cost.seconds(action, program, machine)
        return known

    def reader(self, program: Program, machine: Machine) -> Reader:
        """What has been read of plans of this program."""
        if self._reader is None:
            self._reader = Reader(program, machine, self)
        return self._reader
