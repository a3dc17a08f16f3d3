"""Where arrays can rest and how fast they move: tiers, links, and the compute between them."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping

from memsched.errors import ProgramError

DEVICE, HOST, NVME = "device", "host", "nvme"


@dataclasses.dataclass(frozen=True, slots=True)
class Tier:
    """A place that holds arrays.

    Every array in it takes a multiple of `alignment_bytes`; none may be larger than
    `max_array_bytes`.
    """

    name: str
    capacity_bytes: int
    max_array_bytes: int
    alignment_bytes: int = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """One direction between two tiers. Transfers over it follow one another.

    `block_bytes` is the size of one request and `queue_depth` how many are under way.
    """

    source: str
    target: str
    bytes_per_s: float
    latency_s: float = 0.0
    block_bytes: int = 4 << 20
    queue_depth: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Compute:
    """The processor that reads the device tier."""

    flops_per_s: float
    bytes_per_s: float
    latency_s: float = 0.0
    threads: int = 1
    threads_per_block: int = 0
    shared_bytes_per_block: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A GPU as its compiler sees it, for compiling where there is none.

    It has a CUDA `compute_capability` ("6.1") and the figures of one of its `cores` (streaming
    multiprocessors).
    """

    compute_capability: str
    cores: int
    clock_hz: float
    l2_cache_bytes: int
    threads_per_core: int
    registers_per_core: int
    shared_bytes_per_core: int
    float32_units_per_core: int


@dataclasses.dataclass(frozen=True)
class Machine:
    """Tiers from the fastest to the largest, and the links between them.

    Steps read the tier "device". Where there is no tier "host" (`device_is_host`), the device
    computes in main memory, and a link leads from "nvme" straight to it. `target` is what programs
    are compiled for ahead of time; no plan depends on it.
    """

    name: str
    platform: str
    tiers: tuple[Tier, ...]
    links: tuple[Link, ...]
    compute: Compute
    target: Target | None = None

    def tier(self, name: str) -> Tier:
        """The tier of this name.

        Raises:
            ProgramError: there is none.
        """
        if (tier := self._tiers.get(name)) is not None:
            return tier
        known = ", ".join(self._tiers)
        raise ProgramError(f"machine {self.name!r} has no tier {name!r}; it has {known}")

    def has_tier(self, name: str) -> bool:
        """Whether there is a tier of this name."""
        return name in self._tiers

    @functools.cached_property
    def _tiers(self) -> dict[str, Tier]:
        return {tier.name: tier for tier in self.tiers}

    @functools.cached_property
    def _links(self) -> dict[tuple[str, str], Link]:
        return {(link.source, link.target): link for link in self.links}

    @property
    def device_is_host(self) -> bool:
        """Whether device memory is main memory."""
        return not self.has_tier(HOST)

    def link(self, source: str, target: str) -> Link | None:
        """The link between two tiers, if there is one."""
        return self._links.get((source, target))

    def with_capacities(self, capacities: Mapping[str, int]) -> "Machine":
        """The same machine with other budgets.

        Raises:
            ProgramError: it has no such tier.
        """
        for name in capacities:
            self.tier(name)
        tiers = tuple(
            dataclasses.replace(tier, capacity_bytes=capacities.get(tier.name, tier.capacity_bytes))
            for tier in self.tiers
        )
        return dataclasses.replace(self, tiers=tiers)

    @functools.cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that change with anything that plans depend on."""
        body = dataclasses.asdict(self) | {"name": ""}
        del body["target"]
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def rounded(nbytes: int, alignment_bytes: int) -> int:
    """`nbytes` rounded up to a multiple of the alignment: what an array takes in a tier."""
    return -(-nbytes // alignment_bytes) * alignment_bytes
