"""Seconds of steps that run while weights are read, as planning should see them."""

import dataclasses

from memsched.cost import CostModel
from memsched.machine import Machine
from memsched.plan import Action, Run
from memsched.program import Program

# Where steps compute in main memory, the threads that read and check weights take their cores and
# their memory. A layer of the 2B model takes 3 ms alone and up to 6 beside them. A plan that
# does not know it reads too little ahead: 0.74 s a token at 2 GB instead of 0.67, on two cores.
SLOWDOWN = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class WhileReading:
    """Another cost model, for steps beside reading. What a plan of no copies takes, it overrates:
    that changes no such plan, but predictions should come from the model itself.
    """

    alone: CostModel

    def seconds(self, action: Action, program: Program, machine: Machine) -> float:
        """Seconds of one action."""
        seconds = self.alone.seconds(action, program, machine)
        return SLOWDOWN * seconds if isinstance(action, Run) and machine.device_is_host else seconds
