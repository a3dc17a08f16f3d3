"""Reads stored arrays into the caller's memory, past the page cache, checking every checksum.

The files are those of the converted store (zarr version 3, uncompressed chunks) or slices of any
other file. They are only read. What is read must be the file that was there at opening.
"""

import errno
import functools
import os
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import google_crc32c

from memsched.errors import DamagedError, StoreError
from memsched.stores.blocks import (
    CHECKSUM_BYTES,
    Block,
    Bytes,
    StoredArray,
    check_target,
    pieces,
    requests,
)
from memsched.stores.buffers import Buffers
from memsched.stores.direct import DirectFile, EndOfFileError, fetch, open_direct
from memsched.stores.workers import Job, Workers

Identity = tuple[int, int, int, int]


class Reader:
    """Threads that read, first in, first out: at most `queue_depth` requests at a time.

    None is larger than `block_bytes` and a checksum. What is checked as a whole but larger is read
    in several, and checked by whichever ends last.

    `read_bytes` is what the system moved, `cached_bytes` the part of it that went through the page
    cache because the file system has no O_DIRECT. It takes at most `most_bytes` of memory.
    """

    def __init__(self, queue_depth: int = 8, block_bytes: int = 4 << 20) -> None:
        self.read_bytes = 0
        self.cached_bytes = 0
        self._block_bytes = block_bytes
        self._buffers = Buffers(queue_depth, block_bytes)
        self._identities: dict[Path, Identity] = {}
        self._lock = threading.Lock()
        self._workers = Workers(queue_depth, "read")

    @property
    def most_bytes(self) -> int:
        """Memory that reading may take beside the targets."""
        return self._buffers.most_bytes

    @property
    def direct(self) -> bool:
        """Whether nothing had to go through the page cache so far."""
        return not self.cached_bytes

    def record(self, name: str, stored: StoredArray) -> None:
        """Remember which files array `name` lies in: device, inode, size and time of change.

        Raises:
            DamagedError: a file is missing, too short or no regular file.
            StoreError: the system refused.
        """
        for block in stored.blocks:
            if block.path not in self._identities:
                try:
                    status = os.stat(block.path)
                except OSError as error:
                    raise _explained(error, name, block.path) from None
                self._identities[block.path] = _identity(name, block.path, status)
            size = self._identities[block.path][2]
            if size < block.stop:
                raise _cut(name, block, size)

    def read(self, name: str, stored: StoredArray, target: Bytes) -> Future[None]:
        """Read an array into `target`, which must not be touched before the future is done.

        Fastest where `target` lies at a page boundary.

        Returns:
            Fails with DamagedError if a file is missing, cut, changed or does not match its
            checksum, with StoreError if the system refused. `target` is then undefined.

        Raises:
            ProgramError: `target` is not exactly `stored.nbytes` writable bytes in a row.
            StoreError: the reader is closed.
        """
        check_target(name, stored.nbytes, target)
        return self._workers.submit(
            [
                job
                for start, block in pieces(stored, self._block_bytes)
                for job in self._jobs(name, block, target[start : start + block.used_bytes])
            ]
        )

    def close(self) -> None:
        """End all threads; reads that have not begun fail."""
        self._workers.close()

    def _jobs(self, name: str, block: Block, target: Bytes) -> Iterator[Job]:
        """The requests of a block."""
        found = requests(block, self._block_bytes)
        whole = _Whole(len(found))
        for low, high in found:
            yield functools.partial(self._read_part, name, block, target, low, high, whole)

    def _read_part(
        self, name: str, block: Block, target: Bytes, low: int, high: int, whole: "_Whole"
    ) -> None:
        part = target[low - block.offset : high - block.offset]
        try:
            file = open_direct(block.path, os.O_RDONLY)
            try:
                self._check_identity(name, block, file.status)
                rest = self._fetch(file, low, high, part)
                if not block.crc32c:
                    # Nothing else would tell that it changed under our hands.
                    self._check_identity(name, block, os.fstat(file.descriptor))
            finally:
                file.close()
        except EndOfFileError as error:
            raise _cut(name, block, error.offset) from None
        except StoreError:
            raise
        except OSError as error:
            raise _explained(error, name, block.path) from None
        if whole.is_last(low, rest) and block.crc32c:
            _check_sum(name, block, target, whole.rest)

    def _fetch(self, file: DirectFile, low: int, high: int, part: Bytes) -> bytes:
        """One request; what follows the used bytes of its block."""
        rest, moved = fetch(file, low, high, part, self._buffers)
        with self._lock:
            self.read_bytes += moved
            self.cached_bytes += 0 if file.direct else moved
        return rest

    def _check_identity(self, name: str, block: Block, status: os.stat_result) -> None:
        found = _identity(name, block.path, status)
        if self._identities.setdefault(block.path, found) != found:
            raise DamagedError(
                f"array {name!r}: {block.path} is not the file that was opened, or was written "
                "since: its inode, size or time of change differs; start again"
            )


class _Whole:
    """A block of which several requests may be under way, ending in any order."""

    def __init__(self, requests: int) -> None:
        self._rests: dict[int, bytes] = {}
        self._requests = requests
        self._lock = threading.Lock()

    def is_last(self, low: int, rest: bytes) -> bool:
        """Notes what a request that began at `low` read behind the used bytes."""
        with self._lock:
            self._rests[low] = rest
            return len(self._rests) == self._requests

    @property
    def rest(self) -> bytes:
        """All of that, in order."""
        return b"".join(self._rests[low] for low in sorted(self._rests))


def _identity(name: str, path: Path, status: os.stat_result) -> Identity:
    if not stat.S_ISREG(status.st_mode):
        raise DamagedError(f"array {name!r}: {path} is no regular file; restore the file")
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _check_sum(name: str, block: Block, target: Bytes, rest: bytes) -> None:
    padding, wanted = rest[:-CHECKSUM_BYTES], int.from_bytes(rest[-CHECKSUM_BYTES:], "little")
    # It takes an array as it is, and lets other threads run meanwhile.
    found = google_crc32c.extend(google_crc32c.value(target), padding)
    if found != wanted:
        raise DamagedError(
            f"array {name!r}: {block.path} at byte {block.offset:,} is damaged: its crc32c is "
            f"{found:08x}, wanted {wanted:08x}; restore the file"
        )


def _cut(name: str, block: Block, size: int) -> DamagedError:
    return DamagedError(
        f"array {name!r}: {block.path} ends at byte {size:,}, wanted {block.stop:,}: "
        "it is cut; restore the file"
    )


def _explained(error: OSError, name: str, path: Path) -> DamagedError | StoreError:
    """Our error for one of the system's."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return DamagedError(f"array {name!r}: {path} is missing; restore the file")
    return StoreError(
        f"array {name!r} cannot be read from {path}: {error.strerror or error}; "
        "check the disk and the permissions, and run the same command again"
    )
