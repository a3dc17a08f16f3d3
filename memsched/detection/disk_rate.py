"""How fast a disk reads and writes: measured with a small file that has no name, or with others.

Blocks bypass the page cache (O_DIRECT). Where the file system refuses that, the cache is emptied
as far as the kernel lets us, every block is read once, and the result says so.
"""

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from memsched.errors import StoreError
from memsched.stores.blocks import Bytes
from memsched.stores.buffers import pages
from memsched.stores.direct import EndOfFileError, open_direct

BLOCK_BYTES = 4 << 20
WORKERS = 8
LARGEST_BYTES = 256 << 20
# Never more than this part of what is free.
FREE_PART = 8

_Block = TypeVar("_Block")


@dataclasses.dataclass(frozen=True, slots=True)
class DiskRate:
    """`direct` is whether the page cache was bypassed; else `read_bytes_per_s` may flatter."""

    read_bytes_per_s: float
    write_bytes_per_s: float
    direct: bool


def free_bytes(directory: Path) -> int:
    """What this user may still write there.

    Raises:
        StoreError: there is no such directory.
    """
    try:
        found = os.statvfs(directory)
    except OSError as error:
        raise StoreError(f"directory {directory}: {error.strerror}") from error
    return found.f_bavail * found.f_frsize


def measure_disk(directory: Path, *, seconds: float) -> DiskRate:
    """Writes for a third of the time, then reads that for the rest. Nothing is left behind.

    Raises:
        StoreError: the directory is missing, full, or not ours to write.
    """
    blocks = min(LARGEST_BYTES, free_bytes(directory) // FREE_PART) // BLOCK_BYTES
    if blocks < 1:
        raise StoreError(
            f"directory {directory}: less than {FREE_PART * BLOCK_BYTES:,} B free;"
            " free some, or give another one"
        )
    try:
        with _nameless_file(directory) as (file, direct):
            return _measure(file, _buffers(), blocks, seconds, direct=direct)
    except OSError as error:
        raise StoreError(f"directory {directory}: {error.strerror}; give another one") from error


@dataclasses.dataclass(frozen=True, slots=True)
class FileBlock:
    """A part of a file, no larger than `BLOCK_BYTES`."""

    path: Path
    offset: int
    nbytes: int


def file_blocks(paths: Iterable[Path]) -> list[FileBlock]:
    """All blocks of some files."""
    return [
        FileBlock(path, offset, min(BLOCK_BYTES, size - offset))
        for path, size in ((path, path.stat().st_size) for path in paths)
        for offset in range(0, size, BLOCK_BYTES)
    ]


def measure_reading(blocks: Iterable[FileBlock], *, seconds: float) -> float:
    """Bytes per second of reading blocks of files that are there, past the page cache.

    As many blocks are read as take that time, at least one. An iterator goes on where it stopped
    when it is measured again.

    Raises:
        StoreError: a file cannot be read, or ended before a block did.
    """

    def read(block: FileBlock, buffer: Bytes) -> int:
        try:
            file = open_direct(block.path, os.O_RDONLY)
            try:
                return file.read([buffer], block.offset, block.nbytes)
            finally:
                file.close()
        except EndOfFileError as error:
            raise StoreError(f"{block.path}: {error}; it was cut while it was read") from None
        except OSError as error:
            raise StoreError(f"{block.path}: {error.strerror}; restore it") from None

    buffers = _buffers()
    start = time.perf_counter()
    return _move(read, blocks, buffers, seconds) / (time.perf_counter() - start)


def _measure(
    file: int, buffers: list[Bytes], blocks: int, seconds: float, *, direct: bool
) -> DiskRate:
    def write(block: int, buffer: Bytes) -> int:
        return os.pwritev(file, [buffer.data], block * BLOCK_BYTES)

    def read(block: int, buffer: Bytes) -> int:
        return os.preadv(file, [buffer.data], block * BLOCK_BYTES)

    start = time.perf_counter()
    written = _move(write, range(blocks), buffers, seconds / 3)
    os.fsync(file)
    between = time.perf_counter()
    order: Iterable[int] = range(written // BLOCK_BYTES)
    if direct:
        order = itertools.cycle(order)
    else:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    read_bytes = _move(read, order, buffers, 2 * seconds / 3)
    end = time.perf_counter()
    return DiskRate(read_bytes / (end - between), written / (between - start), direct)


def _move(
    move: Callable[[_Block, Bytes], int],
    order: Iterable[_Block],
    buffers: list[Bytes],
    seconds: float,
) -> int:
    """Bytes moved by one worker per buffer until the time or the order is over."""
    deadline = time.perf_counter() + seconds
    todo, lock = iter(order), threading.Lock()

    def work(buffer: Bytes) -> int:
        moved = 0
        while (block := _next(todo, lock)) is not None:
            moved += move(block, buffer)
            if time.perf_counter() > deadline:
                break
        return moved

    with ThreadPoolExecutor(len(buffers)) as pool:
        return sum(pool.map(work, buffers))


def _next(todo: Iterator[_Block], lock: threading.Lock) -> _Block | None:
    """The next block; None after the last. Not every iterator can be shared by threads."""
    with lock:
        return next(todo, None)


def _buffers() -> list[Bytes]:
    """In huge pages, as the runtime's: reads into ordinary ones take twice as long.

    Random, so that no disk compresses them.
    """
    memory, start = pages(WORKERS * BLOCK_BYTES)
    # The views keep the mapping.
    whole = np.frombuffer(memory, np.uint8)[start : start + WORKERS * BLOCK_BYTES]
    noise = np.frombuffer(os.urandom(BLOCK_BYTES), np.uint8)
    buffers = [whole[at : at + BLOCK_BYTES] for at in range(0, whole.size, BLOCK_BYTES)]
    for buffer in buffers:
        buffer[:] = noise
    return buffers


@contextlib.contextmanager
def _nameless_file(directory: Path) -> Iterator[tuple[int, bool]]:
    """A file that is gone as soon as it is closed, and whether it bypasses the page cache."""
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        yield file.fileno(), _bypasses_cache(file.fileno())


def _bypasses_cache(file: int) -> bool:
    """Asks for O_DIRECT, tries it, and takes it back where it is refused."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
        with mmap.mmap(-1, mmap.PAGESIZE) as buffer:
            os.pwritev(file, [buffer], 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fcntl.fcntl(file, fcntl.F_SETFL, flags)
        return False
    return True
