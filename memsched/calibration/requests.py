"""How large requests to a disk are best made, and how many at a time: with nothing else, and while
steps compute. Both move the same bytes through memory, so what is best alone need not be best.
"""

import contextlib
import dataclasses
import math
import statistics
import threading
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from memsched.calibration.scratch import Scratch
from memsched.cost.contention import READS_AT_ONCE
from memsched.cost.observations import CopyObservation
from memsched.machine import NVME, Link, Machine
from memsched.program import ArraySpec
from memsched.stores.blocks import Bytes
from memsched.stores.buffers import pages
from memsched.stores.reader import Reader

BLOCK_BYTES = (1 << 20, 2 << 20, 4 << 20)
QUEUE_DEPTHS = (1, 2, 4, READS_AT_ONCE)
USUAL = BLOCK_BYTES[-1], QUEUE_DEPTHS[-1]
# Another setting is taken only if it is so many times as fast as the usual one.
BETTER = 1.1
FEWEST = 3
ARRAYS, ARRAY_BYTES = 3, 8 << 20
# What computes meanwhile reads a matrix of so many rows and columns (32 MiB), as decoding does.
SIDE = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """Arrays read in requests of `block_bytes`, so many at a time: seconds of each try."""

    block_bytes: int
    queue_depth: int
    alone_s: tuple[float, ...]
    beside_s: tuple[float, ...]

    @property
    def alone_bytes_per_s(self) -> float:
        """The median with nothing else running."""
        return ARRAYS * ARRAY_BYTES / statistics.median(self.alone_s)

    @property
    def beside_bytes_per_s(self) -> float:
        """The median while steps compute."""
        return ARRAYS * ARRAY_BYTES / statistics.median(self.beside_s)


def measure_requests(scratch: Scratch, *, seconds: float) -> tuple[Reading, ...]:
    """All settings in turn until the time is over; a slow disk may take three times as long.

    Raises:
        StoreError: the disk has no room, or refused.
    """
    settings = [(size, depth) for size in BLOCK_BYTES for depth in QUEUE_DEPTHS]
    alone: dict[tuple[int, int], list[float]] = {one: [] for one in settings}
    beside: dict[tuple[int, int], list[float]] = {one: [] for one in settings}
    room = _room()
    _read_s(scratch, USUAL, room)
    start, rounds = time.perf_counter(), 0
    while True:
        for one in settings:
            alone[one].append(_read_s(scratch, one, room))
        with _computing():
            for one in settings:
                beside[one].append(_read_s(scratch, one, room))
        rounds += 1
        taken_s = time.perf_counter() - start
        if taken_s > (seconds if rounds >= FEWEST else FEWEST * seconds):
            break
    return tuple(Reading(*one, tuple(alone[one]), tuple(beside[one])) for one in settings)


def best_of(readings: Sequence[Reading]) -> Reading:
    """The usual setting, unless another one is clearly faster: every time that both were tried."""
    usual = next(one for one in readings if (one.block_bytes, one.queue_depth) == USUAL)

    def gains(one: Reading) -> list[float]:
        before = zip(usual.alone_s, usual.beside_s, strict=True)
        after = zip(one.alone_s, one.beside_s, strict=True)
        return [math.prod(then) / math.prod(now) for then, now in zip(before, after, strict=True)]

    if len(usual.alone_s) < FEWEST:
        return usual
    middle = {one: statistics.median(gains(one)) for one in readings if min(gains(one)) > 1.0}
    best = max(middle, key=lambda one: middle[one], default=usual)
    return best if middle.get(best, 0.0) > BETTER**2 else usual


def with_requests(machine: Machine, chosen: Reading) -> Machine:
    """The machine with a link from its disk that reads blocks of this size, so many at a time."""

    def changed(link: Link) -> Link:
        if link.source != NVME:
            return link
        return dataclasses.replace(
            link, block_bytes=chosen.block_bytes, queue_depth=chosen.queue_depth
        )

    return dataclasses.replace(machine, links=tuple(changed(link) for link in machine.links))


def observations_of(
    readings: Sequence[Reading], machine: Machine, chosen: Reading
) -> Iterator[CopyObservation]:
    """What other sizes of requests say of the link from the disk, as many being under way."""
    link = next((link for link in machine.links if link.source == NVME), None)
    for one in readings:
        if link is None or one.queue_depth != chosen.queue_depth:
            continue
        blocks = ARRAYS * ARRAY_BYTES // one.block_bytes
        for share, some in ((0.0, one.alone_s), (1.0, one.beside_s)):
            for taken_s in some:
                yield CopyObservation(
                    "requests",
                    f"{link.source}->{link.target}",
                    ARRAYS,
                    blocks,
                    ARRAYS * ARRAY_BYTES,
                    share,
                    taken_s,
                )


def requests_text(readings: Sequence[Reading], chosen: Reading) -> str:
    """A table of MB/s; a star is what was chosen."""
    rows = ["read from disk, MB/s   at a time    alone   beside steps"]
    rows += [
        f"{one.block_bytes >> 20:>13} MiB blocks{one.queue_depth:>9}"
        f"{one.alone_bytes_per_s / 1e6:>11,.0f}{one.beside_bytes_per_s / 1e6:>15,.0f}"
        f"{' *' if one is chosen else ''}"
        for one in readings
    ]
    return "\n".join(rows)


def _room() -> Bytes:
    """Where some arrays arrive: its pages are there before any clock runs."""
    memory, first = pages(ARRAYS * ARRAY_BYTES)
    room = np.frombuffer(memory, np.uint8)[first : first + ARRAYS * ARRAY_BYTES]
    room[:] = 0
    return room


def _read_s(scratch: Scratch, setting: tuple[int, int], room: Bytes) -> float:
    """Seconds in which some arrays arrive there."""
    block_bytes, queue_depth = setting
    arrays = {
        f"{index}": ArraySpec(f"{index}", (ARRAY_BYTES,), "uint8", "weight")
        for index in range(ARRAYS)
    }
    sources = scratch.sources(arrays)
    reader = Reader(queue_depth, block_bytes)
    try:
        start = time.perf_counter()
        found = [
            reader.read(name, stored, part)
            for (name, stored), part in zip(sources.items(), np.split(room, ARRAYS), strict=True)
        ]
        for one in found:
            one.result()
        return time.perf_counter() - start
    finally:
        reader.close()


@jax.jit
def _product(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    return jnp.tanh(matrix @ vector)


@contextlib.contextmanager
def _computing() -> Iterator[None]:
    """Steps that read memory, on a thread of their own, for as long as this is open."""
    matrix, vector = jnp.full((SIDE, SIDE), 1e-3, jnp.bfloat16), jnp.ones(SIDE, jnp.bfloat16)
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            _product(matrix, vector).block_until_ready()

    _product(matrix, vector).block_until_ready()
    thread = threading.Thread(target=work, name="memsched-compute")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
