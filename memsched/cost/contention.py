"""Steps and copies share memory and cores: how much slower each is while the other is busy."""

import dataclasses
from typing import Protocol, runtime_checkable

from memsched.cost.roofline import CostModel
from memsched.machine import NVME, Machine
from memsched.plan import Action, Run
from memsched.program import Program

# A core checks so many bytes in a second (google-crc32c, measured); each byte read from disk is
# written to memory and read again.
CHECKED_BYTES_PER_S = 2.8e9
PASSES_OVER_MEMORY = 2
# Enough to keep a disk busy. Blocks that are read together end together: with 32 of them what the
# next step waits for comes as late as what is read ahead, and nothing is left to read while the
# step runs. Decoding the 2B model at 2 GB takes 0.80 s a token with 4 or 6, 0.89 with 8 and 32.
READS_AT_ONCE = 6
MOST_SLOWDOWN = 3.0


@runtime_checkable
class Contending(Protocol):
    """A cost model that knows how steps and copies slow each other down."""

    def seconds(self, action: Action, program: Program, machine: Machine) -> float:
        """Seconds of one action, nothing else being busy."""
        ...

    def slowdown(self, action: Action, program: Program, machine: Machine) -> float:
        """How many times as long it takes while the other side is busy: steps, or links."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class BesideCopies:
    """Another cost model, for steps beside copies, as planning should see them.

    What a plan of no copies takes, it overrates: that changes no such plan, but predictions should
    come from the model itself.
    """

    alone: CostModel

    def seconds(self, action: Action, program: Program, machine: Machine) -> float:
        """Seconds of one action."""
        seconds = self.alone.seconds(action, program, machine)
        if not isinstance(action, Run):
            return seconds
        return seconds * step_slowdown(self.alone, action, program, machine)


def step_slowdown(cost: CostModel, action: Run, program: Program, machine: Machine) -> float:
    """How many times as long a step takes while its machine reads.

    Where steps compute in main memory, reading and checking weights takes cores and memory from
    them; elsewhere it takes nothing. What nobody measured follows from the rates.
    """
    if not machine.device_is_host:
        return 1.0
    if isinstance(cost, Contending):
        return cost.slowdown(action, program, machine)
    return physical_slowdown(machine)


def physical_slowdown(machine: Machine) -> float:
    """What reading at the disk's full rate leaves of memory's rate and of the processors' time."""
    rate = max((link.bytes_per_s for link in machine.links if link.source == NVME), default=0.0)
    memory = 1.0 - PASSES_OVER_MEMORY * rate / machine.compute.bytes_per_s
    threads = 1.0 - rate / (CHECKED_BYTES_PER_S * max(1, machine.compute.threads))
    left = max(memory, 0.0) * max(threads, 0.0)
    return 1.0 / max(left, 1.0 / MOST_SLOWDOWN)
