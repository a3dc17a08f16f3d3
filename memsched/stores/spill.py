"""Arrays that are moved out to disk for a while, and read back as they were.

They lie in one private file. Its space is reserved before anything is written, at the start as far
as it is known, and used again: the disk cannot fill up later. What is read back is what was
written: array, generation and every checksum are compared.
"""

import dataclasses
import functools
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from memsched.errors import DamagedError, ProgramError, StoreError
from memsched.stores.blocks import Bytes, check_target
from memsched.stores.buffers import PAGE_BYTES, Buffers
from memsched.stores.direct import EndOfFileError, fetch, put
from memsched.stores.extents import Extent, Extents, paged
from memsched.stores.private_file import private_file, reserve
from memsched.stores.workers import Workers


@dataclasses.dataclass(slots=True)
class _Piece:
    """A part of an array that is written and read at once; its checksum once it is written."""

    start: int
    nbytes: int
    offset: int
    crc32c: int | None = None


@dataclasses.dataclass(slots=True)
class _Slot:
    """Where an array lies, and everything under way there."""

    generation: int
    nbytes: int
    extents: tuple[Extent, ...]
    pieces: tuple[_Piece, ...]
    written: Future[None]
    under_way: list[Future[None]]


class Spill:
    """A file of `space_bytes` for arrays, each in whole pages. `reserve` enlarges it up to
    `limit_bytes`.

    `written_bytes` and `read_bytes` are what the system moved. Calls come from one thread; their
    work is done by others, `queue_depth` blocks at a time.

    Raises:
        StoreError: the space cannot be reserved in `directory`.
    """

    def __init__(
        self,
        directory: Path,
        space_bytes: int,
        *,
        limit_bytes: int = 0,
        queue_depth: int = 4,
        block_bytes: int = 4 << 20,
    ) -> None:
        self.space_bytes = space_bytes
        self._limit_bytes = max(limit_bytes, space_bytes)
        self._directory = directory
        self.written_bytes = 0
        self.read_bytes = 0
        self._label = f"the spill file in {directory}"
        self._block_bytes = block_bytes
        self._file = private_file(directory, space_bytes)
        self._extents = Extents(space_bytes)
        self._slots: dict[str, _Slot] = {}
        self._lock = threading.Lock()
        self._buffers = Buffers(queue_depth, block_bytes)
        self._workers = Workers(queue_depth, "spill")

    @property
    def direct(self) -> bool:
        """Whether the page cache is passed by."""
        return self._file.direct

    @property
    def used_bytes(self) -> int:
        """What the arrays take now."""
        return self.space_bytes - self._extents.free_bytes

    @property
    def most_bytes(self) -> int:
        """Memory that moving may take beside the arrays."""
        return self._buffers.most_bytes

    def reserve(self, nbytes: int) -> int:
        """Make room for `nbytes` more, as far as the limit allows; returns how much is free then.

        Raises:
            StoreError: the disk has less space.
        """
        whole_bytes = self.space_bytes // PAGE_BYTES * PAGE_BYTES
        most_bytes = self._limit_bytes // PAGE_BYTES * PAGE_BYTES - whole_bytes
        missing_bytes = min(paged(nbytes) - self._extents.free_bytes, most_bytes)
        if missing_bytes > 0:
            reserve(self._file, self._directory, whole_bytes, missing_bytes)
            self._extents.give_back(((whole_bytes, missing_bytes),))
            self.space_bytes = whole_bytes + missing_bytes
        return self._extents.free_bytes

    def write(self, array: str, generation: int, data: npt.NDArray[np.generic]) -> Future[None]:
        """Move out the bytes of `data`, which must not change before the future is done.

        It takes the place of an older generation.

        Returns:
            Fails with StoreError if the disk refused.

        Raises:
            ProgramError: `data` is not contiguous.
            StoreError: it does not fit, or the store is closed.
        """
        if not data.flags.c_contiguous:
            raise ProgramError(f"array {array!r} is not contiguous and cannot be spilled; copy it")
        content: Bytes = data.reshape(-1).view(np.uint8)
        self.free(array)
        extents = self._extents.take(paged(content.size))
        if extents is None:
            raise StoreError(
                f"array {array!r} takes {paged(content.size):,} B of the spill file, which has "
                f"{self._extents.free_bytes:,} B of {self.space_bytes:,} B left; "
                "raise the nvme space"
            )
        pieces = tuple(_pieces(extents, content.size, self._block_bytes))
        jobs = [functools.partial(self._write_piece, array, piece, content) for piece in pieces]
        try:
            written = self._workers.submit(jobs)
        except StoreError:
            self._extents.give_back(extents)
            raise
        self._slots[array] = _Slot(generation, content.size, extents, pieces, written, [written])
        return written

    def read(self, array: str, generation: int, target: Bytes) -> Future[None]:
        """Read an array back into `target`, after its writing has ended.

        Returns:
            Fails with DamagedError if the bytes are not those that were written, with StoreError if
            they could not be written or cannot be read.

        Raises:
            StoreError: the array, or this generation of it, is not there; the store is closed.
            ProgramError: `target` is not as many writable bytes in a row.
        """
        slot = self._slots.get(array)
        if slot is None or slot.generation != generation:
            found = "is not there" if slot is None else f"is there as {slot.generation}"
            raise StoreError(f"array {array!r}, generation {generation}, {found} in {self._label}")
        check_target(array, slot.nbytes, target)
        read = self._workers.submit(
            [
                functools.partial(self._read_piece, array, slot.written, piece, target)
                for piece in slot.pieces
            ]
        )
        slot.under_way = [future for future in slot.under_way if not future.done()] + [read]
        return read

    def free(self, array: str) -> None:
        """Forget an array, once everything under way with it has ended. Unknown ones are none."""
        slot = self._slots.pop(array, None)
        if slot is not None:
            wait(slot.under_way)
            self._extents.give_back(slot.extents)

    def close(self) -> None:
        """End all threads and give the space back to the disk."""
        self._workers.close()
        self._slots.clear()
        self._file.close()

    def _write_piece(self, array: str, piece: _Piece, content: Bytes) -> None:
        part = content[piece.start : piece.start + piece.nbytes]
        checksum = google_crc32c.value(part)
        try:
            moved = put(self._file, piece.offset, part, self._buffers)
        except OSError as error:
            raise StoreError(
                f"array {array!r} cannot be written to {self._label}: {error.strerror or error}; "
                "check the disk, free some space, and run the same command again"
            ) from None
        piece.crc32c = checksum
        with self._lock:
            self.written_bytes += moved

    def _read_piece(self, array: str, written: Future[None], piece: _Piece, target: Bytes) -> None:
        # Cannot block for ever: all of its jobs were begun before this one.
        written.result()
        part = target[piece.start : piece.start + piece.nbytes]
        try:
            _, moved = fetch(
                self._file, piece.offset, piece.offset + piece.nbytes, part, self._buffers
            )
        except EndOfFileError as error:
            raise DamagedError(f"array {array!r}: {self._label} is cut: {error}") from None
        except OSError as error:
            raise StoreError(
                f"array {array!r} cannot be read from {self._label}: {error.strerror or error}; "
                "check the disk and run the same command again"
            ) from None
        with self._lock:
            self.read_bytes += moved
        found = google_crc32c.value(part)
        if found != piece.crc32c:
            raise DamagedError(
                f"array {array!r}: {self._label} is damaged at byte {piece.offset:,}: its crc32c "
                f"is {found:08x}, wanted {piece.crc32c:08x}; check the disk and start again"
            )


def _pieces(extents: tuple[Extent, ...], nbytes: int, most_bytes: int) -> Iterator[_Piece]:
    """Parts of at most `most_bytes`, none across a border of extents."""
    start = 0
    for offset, size in extents:
        stop = offset + min(size, nbytes - start)
        while offset < stop:
            part = min(most_bytes, stop - offset)
            yield _Piece(start, part, offset)
            start += part
            offset += part
