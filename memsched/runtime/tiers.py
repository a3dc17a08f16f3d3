"""What lies in each tier, and the threads that bring it there."""

import dataclasses
import functools
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from memsched.cost.contention import READS_AT_ONCE
from memsched.errors import PlanError
from memsched.machine import DEVICE, HOST, NVME, Link, Machine
from memsched.program import ArraySpec
from memsched.runtime.operations import CopyOp, FreeOp
from memsched.runtime.ranges import Range, without
from memsched.runtime.schedule import arena_tier
from memsched.runtime.transfer import Transfer
from memsched.stores.arena import Arena
from memsched.stores.blocks import Bytes, StoredArray
from memsched.stores.device import (
    Sharding,
    default_kind,
    filled,
    memory_of,
    over_memory,
    owned,
    put,
    settled,
)
from memsched.stores.reader import Reader
from memsched.stores.spill import Spill

BLOCK_BYTES = 4 << 20
WRITES_AT_ONCE = 4


@dataclasses.dataclass(frozen=True, slots=True)
class SealedArray:
    """An array in the spill file that is read like a weight, as often as plans say."""

    nbytes: int
    generation: int


Sources = dict[str, StoredArray | SealedArray]


class Tiers:
    """Arrays by tier and name; owns the arena, the reader, the spill file and all threads.

    `values` has what has arrived: arrays on "device" and "host", the generation of what was moved
    out to "nvme". `arriving` has what is on its way. All methods are called from one thread.
    """

    def __init__(
        self,
        machine: Machine,
        sources: Sources,
        device: jax.Device,
        nvme_dir: Path | None,
        nvme_space_bytes: int | None,
    ) -> None:
        names = [tier.name for tier in machine.tiers]
        self.values: dict[str, dict[str, Any]] = {name: {} for name in names}
        self.arriving: dict[str, dict[str, Transfer]] = {name: {} for name in names}
        self._leaving: dict[tuple[str, str], list[Transfer]] = {}
        self._sources = sources
        kinds = {DEVICE: default_kind(device), HOST: "pinned_host"}
        self._shardings = {
            tier: Sharding(device, memory_kind=kind)
            for tier, kind in kinds.items()
            if tier in names
        }
        self._arena_tier = arena_tier(machine)
        arena = machine.tier(self._arena_tier)
        self._arena = Arena(arena.capacity_bytes, arena.alignment_bytes)
        self._touched: tuple[Range, ...] = ()
        self._over: dict[tuple[ArraySpec, int], Any] = {}
        self._reader = Reader(*_requests(machine.link(NVME, self._arena_tier), READS_AT_ONCE))
        self._spill: Spill | None = None
        self._spill_lock = threading.Lock()
        self._generation = 0
        self._lanes: dict[tuple[str, str], ThreadPoolExecutor] = {}
        try:
            for name, stored in sources.items():
                if isinstance(stored, StoredArray):
                    self._reader.record(name, stored)
            if nvme_dir is not None:
                most_bytes = machine.tier(NVME).capacity_bytes
                if nvme_space_bytes is not None:
                    most_bytes = nvme_space_bytes
                depth, block_bytes = _requests(machine.link(self._arena_tier, NVME), WRITES_AT_ONCE)
                self._spill = Spill(
                    nvme_dir,
                    nvme_space_bytes or 0,
                    limit_bytes=most_bytes,
                    queue_depth=depth,
                    block_bytes=block_bytes,
                )
        except BaseException:
            self.close()
            raise

    @property
    def read_bytes(self) -> int:
        """What was read from disk so far."""
        return self._reader.read_bytes + (self._spill.read_bytes if self._spill else 0)

    @property
    def written_bytes(self) -> int:
        """What was written to disk so far."""
        return self._spill.written_bytes if self._spill else 0

    @property
    def spilled_bytes(self) -> int:
        """What the spill file holds now."""
        return self._spill.used_bytes if self._spill else 0

    @property
    def device_sharding(self) -> Sharding:
        """The placement of all arrays that steps read."""
        return self._shardings[DEVICE]

    @property
    def can_spill(self) -> bool:
        """Whether arrays can be moved out to disk."""
        return self._spill is not None

    def use(self, ranges: tuple[Range, ...]) -> None:
        """Give back all pages of the arena outside these ranges: the next plan never touches them.

        Nothing may lie there any more.
        """
        if ranges != self._touched:
            for first, end in without(self._touched, ranges):
                self._arena.release(first, end - first)
            self._touched = ranges

    @property
    def arena_bytes(self) -> int:
        """How far offsets in the arena can reach."""
        return self._arena.nbytes

    def limit(self, arena_bytes: int, ranges: tuple[Range, ...]) -> None:
        """Give back all pages of the arena outside these ranges, where everything lies.

        If offsets are to reach further than they can, the arena is made anew: it must be empty.

        Raises:
            PlanError: something does.
            StoreError: the system has no address space left; the arena is as it was, but empty.
        """
        self.use(ranges)
        # Slots of plans that are gone; what lies in the arena is also in `values`.
        self._over.clear()
        if arena_bytes > self._arena.nbytes:
            if ranges:
                raise PlanError(
                    f"an arena of {self._arena.nbytes:,} B holds weights and cannot grow to "
                    f"{arena_bytes:,} B: run a bridge that frees them first"
                )
            larger = Arena(arena_bytes, self._arena.alignment)
            self._arena.close()
            self._arena, self._touched = larger, ()

    def take_over(self, tier: str, name: str, value: Any) -> None:
        """An array from outside."""
        self.values[tier][name] = owned(value, self._shardings[tier])

    def copy(self, op: CopyOp) -> Transfer:
        """Hand in a Copy; it goes on in the background."""
        name, source, target = op.action.array, op.action.source, op.action.target
        transfer = Transfer(op)
        if source == NVME and op.offset is not None:
            over = self._slot_array(op.spec, op.offset)
            view = self._arena.view(op.offset, op.spec.nbytes)
            transfer.follow(self._fetch(name, view), over)
        else:
            before = self.arriving[source].get(name)
            value = self.values[source].get(name)
            if target == NVME:
                self._generation += 1
            job = functools.partial(
                self._carry, op, value, before, self._generation, transfer.times_s
            )
            transfer.follow(self._lane(source, target).submit(job))
            leaving = self._leaving.setdefault((name, source), [])
            leaving[:] = [*(other for other in leaving if not other.done), transfer]
        self.arriving[target][name] = transfer
        return transfer

    def reserve(self, nbytes: int) -> int:
        """Make room for arrays to seal, as far as the budget allows; returns what is free then.

        Raises:
            PlanError: there is no directory for them.
            StoreError: the disk has less space.
        """
        with self._spill_lock:
            return self._spilling().reserve(nbytes)

    def seal(self, name: str, array: jax.Array) -> None:
        """Write an array to disk: it is a source from then on. It may change after this.

        Raises:
            PlanError: there is a source of this name, or no directory to write to.
            StoreError: the disk refused.
        """
        if name in self._sources:
            raise PlanError(f"array {name!r} cannot be sealed: there is a source of this name")
        self.reserve(array.nbytes)
        self._generation += 1
        self._write(name, self._generation, memory_of(array))
        self._sources[name] = SealedArray(array.nbytes, self._generation)
        # Plans are made anew around it, and nothing grows: slots that lie full are in `values`.
        self._over.clear()

    def release(self, name: str) -> None:
        """Forget a sealed array, wherever it lies; its space on disk is used again."""
        for tier, values in self.values.items():
            if name in self.arriving[tier]:
                self.arriving[tier].pop(name).settle()
            self.leave(tier, name)
            values.pop(name, None)
        del self._sources[name]
        self._over.clear()
        self._free_spilled(name)

    def arrive(self, tier: str, name: str) -> None:
        """Wait until an array that is on its way has arrived."""
        self.values[tier][name] = self.arriving[tier][name].result()
        del self.arriving[tier][name]

    def leave(self, tier: str, name: str) -> None:
        """Wait until nobody copies an array from a tier any more."""
        for transfer in self._leaving.pop((name, tier), ()):
            transfer.result()

    def free(self, op: FreeOp) -> None:
        """Forget an array that nothing uses any more."""
        tier, name = op.action.tier, op.action.array
        if name in self.arriving[tier]:
            self.arrive(tier, name)
        self.leave(tier, name)
        value = self.values[tier].pop(name)
        if tier == NVME:
            self._free_spilled(name)
        elif op.offset is None and isinstance(value, jax.Array):
            value.delete()

    def under_way(self) -> tuple[Transfer, ...]:
        """What is still on its way."""
        return tuple(transfer for transfer in self._transfers() if not transfer.done)

    def abandon(self) -> None:
        """Let everything under way end, and forget all arrays."""
        transfers = self._transfers()
        for leaving in self._leaving.values():
            transfers += leaving
        for transfer in transfers:
            transfer.settle()
        for name in (*self.values.get(NVME, ()), *self.arriving.get(NVME, ())):
            self._free_spilled(name)
        for tier in (*self.values.values(), *self.arriving.values()):
            tier.clear()
        self._leaving.clear()

    def close(self) -> None:
        """End all threads, remove the spill file, give the memory back."""
        self._reader.close()
        if self._spill:
            self._spill.close()
        for lane in self._lanes.values():
            lane.shutdown(wait=True, cancel_futures=True)
        for tier in (*self.values.values(), *self.arriving.values()):
            tier.clear()
        self._leaving.clear()
        self._over.clear()
        # Arrays over it may wait for Python's collector; its pages do not.
        self._arena.release(0, self._arena.nbytes)
        self._arena.close()

    def _transfers(self) -> list[Transfer]:
        """All that were asked for and not yet taken."""
        return [transfer for tier in self.arriving.values() for transfer in tier.values()]

    def _fetch(self, name: str, target: Bytes) -> Future[None]:
        """Begin to read a source."""
        source = self._sources[name]
        if isinstance(source, StoredArray):
            return self._reader.read(name, source, target)
        with self._spill_lock:
            return self._spilling().read(name, source.generation, target)

    def _slot_array(self, spec: ArraySpec, offset: int) -> Any:
        """The array over a slot, made once: streaming allocates nothing."""
        key = (spec, offset)
        if key not in self._over:
            view = self._arena.view(offset, spec.nbytes)
            self._over[key] = over_memory(view, spec, self._shardings[self._arena_tier])
        return self._over[key]

    def _lane(self, source: str, target: str) -> ThreadPoolExecutor:
        """The thread of a link: its transfers follow one another."""
        key = (source, target)
        if key not in self._lanes:
            self._lanes[key] = ThreadPoolExecutor(1, f"memsched-{source}-{target}")
        return self._lanes[key]

    def _carry(
        self,
        op: CopyOp,
        value: Any,
        before: Transfer | None,
        generation: int,
        times_s: list[float],
    ) -> Any:
        """One Copy, on its link's thread: gives the array in its new place."""
        if before is not None:
            value = before.result()
        times_s[0] = time.perf_counter()
        if op.action.target == NVME:
            self._write(op.action.array, generation, memory_of(value))
            return generation
        sharding = self._shardings[op.action.target]
        if op.action.source == NVME:
            fill = functools.partial(self._read, op.action.array, value)
            return filled(op.spec, sharding, fill)
        if op.offset is not None:
            self._arena.view(op.offset, op.spec.nbytes)[:] = memory_of(value)
            return self._slot_array(op.spec, op.offset)
        return settled(put(value, sharding))

    def _write(self, name: str, generation: int, data: Bytes) -> None:
        with self._spill_lock:
            written = self._spilling().write(name, generation, data)
        written.result()

    def _read(self, name: str, generation: int, target: Bytes) -> None:
        with self._spill_lock:
            read = self._spilling().read(name, generation, target)
        read.result()

    def _free_spilled(self, name: str) -> None:
        with self._spill_lock:
            self._spilling().free(name)

    def _spilling(self) -> Spill:
        if self._spill is None:
            raise PlanError("the plan moves arrays out to disk: give the executor an nvme_dir")
        return self._spill


def _requests(link: Link | None, most: int) -> tuple[int, int]:
    """How many requests are under way on a link to or from a disk, and their bytes."""
    return (1, BLOCK_BYTES) if link is None else (min(link.queue_depth, most), link.block_bytes)
