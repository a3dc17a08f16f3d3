"""Reading and writing past the page cache (O_DIRECT), at any offset and into any memory.

O_DIRECT wants the file offset, the length and the address to be multiples of the device's logical
block. What is aligned goes straight between the file and the caller's memory; the rest passes
through a buffer. Where the file system refuses O_DIRECT the same calls go through the page cache,
and what they leave there is dropped.
"""

import errno
import fcntl
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from memsched.stores.blocks import Bytes
from memsched.stores.buffers import PAGE_BYTES, Buffers, address


class EndOfFileError(Exception):
    """A file ends at `offset`, before the bytes that were asked for."""

    def __init__(self, offset: int) -> None:
        super().__init__(f"file ends at byte {offset:,}")
        self.offset = offset


class DirectFile:
    """A descriptor, which this object closes, and O_DIRECT on it for as long as that works.

    `status` is what the system said of the file when it was opened.
    """

    def __init__(self, descriptor: int, *, direct: bool) -> None:
        self.descriptor = descriptor
        self.direct = direct
        self.status = os.fstat(descriptor)
        self._unit_bytes = _logical_block_bytes(self.status.st_dev)

    @property
    def unit_bytes(self) -> int:
        """What offsets, lengths and addresses must be multiples of."""
        return self._unit_bytes if self.direct else 1

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)

    def read(self, parts: Sequence[Bytes], offset: int, wanted_bytes: int) -> int:
        """Fill `parts` from `offset` on until they hold `wanted_bytes`.

        Returns:
            Bytes that the system gave.

        Raises:
            EndOfFileError: the file ends before.
            OSError: the system refused.
        """
        done = 0
        while done < wanted_bytes:
            count = self._call(os.preadv, _after(parts, done), offset + done)
            if count == 0:
                raise EndOfFileError(offset + done)
            done += count
        if not self.direct:
            self._drop_cache(offset, done)
        return done

    def write(self, parts: Sequence[Bytes], offset: int) -> int:
        """Write all of `parts` at `offset`.

        Returns:
            Bytes that the system took.

        Raises:
            OSError: the system refused.
        """
        total = sum(part.size for part in parts)
        done = 0
        while done < total:
            done += self._call(os.pwritev, _after(parts, done), offset + done)
        if not self.direct:
            # Only pages that are on the disk can be dropped; and a failing disk shows here.
            os.fdatasync(self.descriptor)
            self._drop_cache(offset, done)
        return done

    def _call(self, call: Callable[..., int], parts: list[Bytes], offset: int) -> int:
        try:
            return call(self.descriptor, parts, offset)
        except OSError as error:
            # Some file systems take the flag at opening and refuse the call; and after a short
            # transfer the rest may begin inside a block.
            if error.errno != errno.EINVAL or not self.direct:
                raise
            self._leave_direct()
            return call(self.descriptor, parts, offset)

    def _leave_direct(self) -> None:
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self.direct = False

    def _drop_cache(self, offset: int, nbytes: int) -> None:
        first = offset // PAGE_BYTES * PAGE_BYTES
        stop = _up(offset + nbytes, PAGE_BYTES)
        os.posix_fadvise(self.descriptor, first, stop - first, os.POSIX_FADV_DONTNEED)


def open_direct(path: Path | str, flags: int, mode: int = 0o600) -> DirectFile:
    """Open a file with O_DIRECT, or without where the file system has none.

    Raises:
        OSError: the system refused.
    """
    # O_NONBLOCK: opening a pipe would wait for its writer for ever.
    flags |= os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return DirectFile(os.open(path, flags | os.O_DIRECT, mode), direct=True)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return DirectFile(os.open(path, flags, mode), direct=False)


def fetch(
    file: DirectFile, low: int, high: int, target: Bytes, buffers: Buffers
) -> tuple[bytes, int]:
    """Read the bytes `low` to `high` of a file: first what fills `target`, then the rest.

    Returns:
        The rest, and how many bytes the system moved.

    Raises:
        EndOfFileError: the file ends before `high`.
        OSError: the system refused.
    """
    unit = file.unit_bytes
    first = low // unit * unit
    straight = _straight_bytes(target, low, unit)
    through = _up(high, unit) - first - straight
    with buffers.take(through) as buffer:
        parts = [target[:straight], buffer[:through]] if straight else [buffer[:through]]
        moved = file.read(parts, first, high - first)
        # With `straight`, low == first.
        rest = buffer[low - first : high - first - straight]
        left = target.size - straight
        target[straight:] = rest[:left]
        return rest[left:].tobytes(), moved


def put(file: DirectFile, offset: int, data: Bytes, buffers: Buffers) -> int:
    """Write `data` at `offset`, a multiple of the page size; whatever fills up the last page.

    Returns:
        Bytes that the system moved.

    Raises:
        OSError: the system refused.
    """
    straight = _straight_bytes(data, offset, PAGE_BYTES)
    through = _up(data.size, PAGE_BYTES) - straight
    if not through:
        return file.write([data], offset)
    with buffers.take(through) as buffer:
        rest = data.size - straight
        buffer[:rest] = data[straight:]
        parts = [data[:straight], buffer[:through]] if straight else [buffer[:through]]
        return file.write(parts, offset)


def _straight_bytes(memory: Bytes, offset: int, unit: int) -> int:
    """How many bytes from the start of `memory` on need no buffer."""
    if offset % unit or address(memory) % unit:
        return 0
    return memory.size // unit * unit


def _after(parts: Sequence[Bytes], done: int) -> list[Bytes]:
    """What of `parts` follows the first `done` bytes."""
    left = []
    for part in parts:
        if done < part.size:
            left.append(part[done:])
        done = max(0, done - part.size)
    return left


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


@functools.cache
def _logical_block_bytes(device: int) -> int:
    """The alignment that a device wants; a page where it does not say."""
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    # A partition has no queue of its own.
    for queue in (folder / "queue", folder.resolve().parent / "queue"):
        try:
            return int((queue / "logical_block_size").read_text())
        except (OSError, ValueError):
            continue
    return PAGE_BYTES
