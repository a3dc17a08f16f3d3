"""The machine at hand: what it has free right now, and how fast it is.

Main memory is the smallest of what is free, what control groups leave and what the process's own
limits leave. A part stays with the process itself (`RESERVE_BYTES`) and a sixteenth of everything
stays free, because others come and go.
"""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from memsched.detection.disk_rate import DiskRate, free_bytes, measure_disk
from memsched.detection.memory_limits import ROOT, Room, main_memory
from memsched.errors import DoesNotFitError, ProgramError
from memsched.machine import DEVICE, HOST, NVME, Compute, Link, Machine, Tier
from memsched.profiles import PLATFORMS
from memsched.sizes import LARGEST_BYTES, format_size

if TYPE_CHECKING:
    import jax

RESERVE_BYTES = 256 << 20
"""Main memory that is never planned: compiled programs, buffers of reads, Python itself."""

FREE_PART = 16
BLOCK_BYTES = 4 << 20
QUEUE_DEPTH = 32
# Files are read into whole pages without a second copy. Accelerators allocate in their own units.
PAGE_BYTES = 4096
DEVICE_ALIGNMENT_BYTES = {"cpu": PAGE_BYTES, "gpu": 256, "tpu": 512}

# Where nothing is measured: figures of a middling machine of each kind.
ASSUMED_COMPUTE = {
    "cpu": Compute(1e11, 2e10, 5e-6),
    "gpu": Compute(5e13, 5e11, 1e-5),
    "tpu": Compute(1.4e14, 7e11, 1e-5),
}
ASSUMED_DISK = DiskRate(1e9, 5e8, direct=False)
ASSUMED_TRANSFER_BYTES_PER_S = 1e10
DISK_LATENCY_S = 1e-4
TRANSFER_LATENCY_S = 1e-5


@dataclasses.dataclass(frozen=True, slots=True)
class _Rates:
    compute: Compute
    disk: DiskRate
    to_device_bytes_per_s: float
    to_host_bytes_per_s: float


def detect(nvme_dir: Path | None = None, *, measure_s: float = 1.0, root: Path = ROOT) -> Machine:
    """The machine of JAX's first device, with capacities that are free now.

    Args:
        nvme_dir: where spilled arrays would go; the directory of temporary files if None.
        measure_s: about how long each of disk, processor and transfers is measured, the latter
            two once in a process; with 0 nothing is, and rates are assumed.
        root: where /proc and /sys are found.

    Raises:
        ProgramError: a platform we do not know, or a device that keeps its memory to itself.
        DoesNotFitError: less is free than the process itself needs.
        StoreError: the directory cannot be written.
    """
    import jax

    if not measure_s >= 0:
        raise ProgramError(f"measure_s must be at least 0, found {measure_s}")
    directory = Path(tempfile.gettempdir()) if nvme_dir is None else nvme_dir
    device = jax.local_devices()[0]
    if device.platform not in PLATFORMS:
        raise ProgramError(f"platform {device.platform!r} is unknown; give a machine file")
    rates = _measured(device, directory, measure_s) if measure_s else _assumed(device.platform)
    # What is free is read last: measuring has taken what it takes.
    return Machine(
        name=f"this-{device.platform}",
        platform=device.platform,
        tiers=_tiers(device, directory, root),
        links=_links(device.platform, rates),
        compute=_rounded(rates.compute),
    )


def with_limits(machine: Machine, limits: Mapping[str, int]) -> Machine:
    """The machine with budgets that somebody asked for, tier by tier.

    Raises:
        ProgramError: a tier that it has not.
    """
    if HOST in limits and machine.device_is_host:
        raise ProgramError(
            f"machine {machine.name!r} computes in main memory: it has no host tier;"
            " limit its device memory instead"
        )
    return machine.with_capacities(limits)


def plannable(room: Room, tier: str, reserve_bytes: int) -> int:
    """What a plan may use of some room: all but the reserve and a sixteenth.

    Raises:
        DoesNotFitError: nothing is left.
    """
    nbytes = room.nbytes - reserve_bytes - room.nbytes // FREE_PART
    nbytes -= nbytes % PAGE_BYTES
    if nbytes < BLOCK_BYTES:
        wanted = (reserve_bytes + BLOCK_BYTES) * FREE_PART // (FREE_PART - 1) + PAGE_BYTES
        raise DoesNotFitError(
            f"{room.limit} leaves {format_size(room.nbytes)}; {format_size(wanted)} is the least"
            f" for tier {tier!r}, {format_size(reserve_bytes)} of it for the process itself",
            {tier: BLOCK_BYTES},
        )
    return nbytes


def _tiers(device: "jax.Device", directory: Path, root: Path) -> tuple[Tier, ...]:
    main = main_memory(root)
    nvme_bytes = free_bytes(directory)
    alignment_bytes = DEVICE_ALIGNMENT_BYTES[device.platform]
    nvme = Tier(NVME, nvme_bytes - nvme_bytes // FREE_PART, LARGEST_BYTES, PAGE_BYTES)
    if device.platform == "cpu":
        capacity_bytes = plannable(main, DEVICE, RESERVE_BYTES)
        return Tier(DEVICE, capacity_bytes, LARGEST_BYTES, alignment_bytes), nvme
    capacity_bytes = plannable(_device_room(device), DEVICE, 0)
    host_bytes = plannable(main, HOST, RESERVE_BYTES)
    return (
        Tier(DEVICE, capacity_bytes, LARGEST_BYTES, alignment_bytes),
        Tier(HOST, host_bytes, LARGEST_BYTES, PAGE_BYTES),
        nvme,
    )


def _device_room(device: "jax.Device") -> Room:
    """What JAX's allocator may still give of an accelerator's memory."""
    found = device.memory_stats() or {}
    if "bytes_limit" not in found:
        raise ProgramError(
            f"device {device.device_kind!r} does not say how much memory it has;"
            " give a machine file"
        )
    nbytes = found["bytes_limit"] - found.get("bytes_in_use", 0)
    return Room(nbytes, f"JAX's allocator on {device.device_kind!r}")


def _measured(device: "jax.Device", directory: Path, measure_s: float) -> _Rates:
    disk = measure_disk(directory, seconds=measure_s)
    return _Rates(
        _measured_compute(device, measure_s), disk, *_measured_transfers(device, measure_s)
    )


@functools.cache
def _measured_compute(device: "jax.Device", measure_s: float) -> Compute:
    """Once in a process: a model of a level asks twice, and two models are planned alike."""
    from memsched.detection.compute_rate import measure_compute

    return measure_compute(device, seconds=measure_s)


@functools.cache
def _measured_transfers(device: "jax.Device", measure_s: float) -> tuple[float, float]:
    """To the device and back; 0 where it computes in main memory."""
    from memsched.detection.compute_rate import measure_transfers

    if device.platform == "cpu":
        return 0.0, 0.0
    rates = measure_transfers(device, seconds=measure_s)
    return rates.to_device_bytes_per_s, rates.to_host_bytes_per_s


def _assumed(platform: str) -> _Rates:
    compute = dataclasses.replace(ASSUMED_COMPUTE[platform], threads=len(os.sched_getaffinity(0)))
    rate = ASSUMED_TRANSFER_BYTES_PER_S
    return _Rates(compute, ASSUMED_DISK, rate, rate)


def _rounded(compute: Compute) -> Compute:
    return dataclasses.replace(
        compute,
        flops_per_s=_short(compute.flops_per_s),
        bytes_per_s=_short(compute.bytes_per_s),
        latency_s=_short(compute.latency_s),
    )


def _links(platform: str, rates: _Rates) -> tuple[Link, ...]:
    near = DEVICE if platform == "cpu" else HOST

    def disk_link(source: str, target: str, rate: float) -> Link:
        return Link(source, target, _short(rate), DISK_LATENCY_S, BLOCK_BYTES, QUEUE_DEPTH)

    links = (
        disk_link(NVME, near, rates.disk.read_bytes_per_s),
        disk_link(near, NVME, rates.disk.write_bytes_per_s),
    )
    if platform == "cpu":
        return links
    return (
        *links,
        Link(HOST, DEVICE, _short(rates.to_device_bytes_per_s), TRANSFER_LATENCY_S),
        Link(DEVICE, HOST, _short(rates.to_host_bytes_per_s), TRANSFER_LATENCY_S),
    )


def _short(rate: float) -> float:
    """Two digits: the next measurement differs in the second."""
    return float(f"{rate:.2g}")
