"""Where weights rest on a machine, and through which ranges the others pass."""

import dataclasses
from collections.abc import Mapping

from memsched.passes.lower.fifo import Wrap


@dataclasses.dataclass(frozen=True, slots=True)
class Pool:
    """The part of a tier that belongs to weights.

    `pinned` weights never leave; each lies at its offset. All others pass through the ring, the
    `ring_bytes` from `ring_offset` on. Offsets mean nothing where the tier places arrays itself.
    """

    pinned: Mapping[str, int]
    ring_offset: int
    ring_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """The device's pool and, on a machine with three tiers, the host's.

    `wrap` says when a ring turns over, `gap` how many steps a weight waits in it for its next use.
    """

    device: Pool
    host: Pool | None = None
    wrap: Wrap = "array"
    gap: int = 1
