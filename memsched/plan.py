"""A plan: a list of actions, and nothing else.

Three verbs carry everything. `Copy` moves, `Run` computes or computes again, and `Free` is the
only way in which memory comes back. A technique is a way of choosing these three.

Actions and residences are tuples: a large plan has 100,000 of each, and frozen dataclasses take
twice as long to make and five times as long to look up.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple


class Run(NamedTuple):
    """Compute a step. Its results appear in the device tier."""

    step: str


class Copy(NamedTuple):
    """Bring an array to another tier, in the form `codec`. The source stays.

    The target counts from here on; its bytes may arrive at any time before the first action that
    reads them.
    """

    array: str
    source: str
    target: str
    codec: str = "raw"


class Free(NamedTuple):
    """Forget an array in a tier, once all earlier actions that use it there have finished."""

    array: str
    tier: str


Action = Run | Copy | Free


class Residence(NamedTuple):
    """An array in a tier, before or after a plan.

    `offset` is where it lies in the tier's arena; None where the tier places it itself.
    """

    array: str
    tier: str
    codec: str = "raw"
    offset: int | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Actions in the order of their issue, between two states of all tiers.

    `slots` gives, for the index of a Copy, the offset in the target tier's arena. Arrays without
    an offset are placed by their tier: what steps make, and what rests in files.
    """

    program: str
    machine: str
    entry: tuple[Residence, ...]
    actions: tuple[Action, ...]
    exit: tuple[Residence, ...]
    slots: Mapping[int, int] = dataclasses.field(default_factory=dict)
