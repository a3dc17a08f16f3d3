"""A plan made ready: everything that can be known before it is carried out.

Three verbs stay three verbs. What is added are sizes, who waits for whom, and the arena.
"""

import dataclasses
from collections.abc import Mapping

from memsched.plan import Copy, Free, Residence, Run
from memsched.program import ArraySpec
from memsched.runtime.ranges import Range


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One step: its kernel, and the arrays that it takes and gives."""

    kernel: str
    inputs: tuple[str, ...]
    results: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class RunOp:
    """One dispatch: a step, or several as one XLA program.

    `made_bytes` are in use from then on, `passing_bytes` on top of them while it runs. `number`
    counts dispatches. It `follows` if it cannot begin before the dispatch ahead of it has ended;
    `witness` is the result whose arrival says that it has ended itself. It `settles` if there is no
    room for the workspace of the one ahead beside its own. `others` are the indices of the actions
    that disappeared into it.
    """

    index: int
    action: Run
    calls: tuple[Call, ...]
    inputs: tuple[str, ...]
    results: tuple[str, ...]
    updates: tuple[str, ...]
    made_bytes: int
    passing_bytes: int
    others: tuple[int, ...] = ()
    number: int = 0
    witness: int = 0
    follows: bool = False
    settles: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class CopyOp:
    """One transfer. `taken_bytes` are in use from its issue on, beside the arena."""

    index: int
    action: Copy
    spec: ArraySpec
    offset: int | None
    taken_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class FreeOp:
    """One release, after dispatch `after_run` has ended (-1: after none)."""

    index: int
    action: Free
    offset: int | None
    freed_bytes: int
    after_run: int = -1


Op = RunOp | CopyOp | FreeOp
# (array, tier) -> the residence
Rests = Mapping[tuple[str, str], Residence]


@dataclasses.dataclass(frozen=True, slots=True)
class Schedule:
    """A plan made ready for one program and machine.

    `ranges` are all bytes of the arena that it uses. `weights_before` and `weights_after` are the
    residences of weights outside "nvme", `given` what the caller gives and `returned` what it gets.
    `start_bytes` is in use per tier before the first action.
    """

    ops: tuple[Op, ...]
    ranges: tuple[Range, ...]
    weights_before: Rests
    weights_after: Rests
    given: tuple[ArraySpec, ...]
    returned: tuple[str, ...]
    start_bytes: Mapping[str, int]
    actions: int
