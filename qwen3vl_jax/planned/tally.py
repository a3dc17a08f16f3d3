"""How often a plan was carried out, and what the disk did meanwhile."""

import dataclasses

from memsched.cost import Span
from memsched.machine import NVME
from memsched.plan import Copy, Plan
from memsched.program import Program
from memsched.runtime import Executor, Outcome

# The phase of a plan that only moves weights to where the next one expects them.
MOVING = "moving"


@dataclasses.dataclass(slots=True)
class Tally:
    """Passes of one plan of a phase, and bytes that the system read and wrote during them.

    `spans` are those of the newest pass but the first, which is cold, and `carried_s` the seconds
    of it in which transfers of the pass before went on. What a plan that moves weights reads may
    still arrive during the pass after it.
    """

    phase: str
    plan: Plan
    program: Program
    passes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    spans: tuple[Span, ...] = ()
    carried_s: float = 0.0

    @property
    def planned_bytes(self) -> tuple[int, int]:
        """Bytes that one pass reads from disk, and writes there, by its plan."""
        copies = [action for action in self.plan.actions if isinstance(action, Copy)]
        sizes = self.program.arrays
        read = sum(sizes[copy.array].nbytes for copy in copies if copy.source == NVME)
        return read, sum(sizes[copy.array].nbytes for copy in copies if copy.target == NVME)

    def add(
        self,
        executor: Executor,
        read_before: int,
        written_before: int,
        outcome: Outcome | None,
    ) -> None:
        """One more pass has ended, with an outcome if it computed something."""
        self.passes += 1
        if outcome is not None and self.passes > 1:
            self.spans, self.carried_s = outcome.spans, outcome.carried_s
        self.read_bytes += executor.read_bytes - read_before
        self.written_bytes += executor.written_bytes - written_before
