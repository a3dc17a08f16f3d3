"""Seconds of one action from the machine's rates alone."""

from typing import Protocol, runtime_checkable

from memsched.errors import ProgramError
from memsched.machine import Machine
from memsched.plan import Action, Copy, Free, Run
from memsched.program import Program


@runtime_checkable
class CostModel(Protocol):
    """Says how long an action is busy on its lane, everything it needs being there."""

    def seconds(self, action: Action, program: Program, machine: Machine) -> float:
        """Seconds of one action."""
        ...


class Roofline:
    """A step takes the longer of computing and touching its arrays; a copy latency plus bytes."""

    def seconds(self, action: Action, program: Program, machine: Machine) -> float:
        """Seconds of one action.

        Raises:
            ProgramError: the machine has no link for this copy.
        """
        match action:
            case Run(step=name):
                step, compute = program.step(name), machine.compute
                touched = (*step.reads, *step.writes, *step.updates)
                nbytes = sum(program.arrays[array].nbytes for array in touched)
                flop_s = step.flops / compute.flops_per_s
                return compute.latency_s + max(flop_s, nbytes / compute.bytes_per_s)
            case Copy(array=array, source=source, target=target):
                link = machine.link(source, target)
                if link is None:
                    raise ProgramError(f"machine {machine.name!r} has no link {source}->{target}")
                return link.latency_s + program.arrays[array].nbytes / link.bytes_per_s
            case Free():
                return 0.0
