"""Where the bytes of an array lie in files. Data only: nothing is opened here."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memsched.errors import ProgramError

Bytes = npt.NDArray[np.uint8]
CHECKSUM_BYTES = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A piece of a file: `nbytes` of payload from `offset` on.

    The first `used_bytes` of them belong to the array, the others are padding. With `crc32c`, four
    bytes follow: the little-endian CRC-32C of the whole payload.

    Raises:
        ProgramError: if the numbers make no sense.

    Source: the `crc32c` codec of zarr version 3.
    """

    path: Path
    offset: int
    nbytes: int
    used_bytes: int
    crc32c: bool

    def __post_init__(self) -> None:
        if self.offset < 0 or not 0 < self.used_bytes <= self.nbytes:
            raise ProgramError(
                f"block of {self.path}: offset {self.offset:,}, {self.nbytes:,} B of which "
                f"{self.used_bytes:,} B are used; wanted 0 <= offset, 0 < used <= payload"
            )

    @property
    def stop(self) -> int:
        """The file offset after the last byte, checksum included."""
        return self.offset + self.nbytes + (CHECKSUM_BYTES if self.crc32c else 0)


@dataclasses.dataclass(frozen=True, slots=True)
class StoredArray:
    """An array as blocks that follow one another.

    Raises:
        ProgramError: if the blocks do not make up `nbytes`.
    """

    nbytes: int
    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        total = sum(block.used_bytes for block in self.blocks)
        if total != self.nbytes:
            raise ProgramError(
                f"stored array of {self.nbytes:,} B has blocks of {total:,} B in all"
            )


def pieces(stored: StoredArray, most_bytes: int) -> Iterator[tuple[int, Block]]:
    """Blocks to read independently of each other, each with its place in the array.

    A block without checksum is cut at file offsets that are multiples of `most_bytes`; one with a
    checksum is a piece whatever its size.
    """
    start = 0
    for block in stored.blocks:
        if block.crc32c:
            yield start, block
        else:
            yield from _cut(start, block, most_bytes)
        start += block.used_bytes


def requests(block: Block, most_bytes: int) -> list[tuple[int, int]]:
    """Where requests of one block begin and end in its file, of `most_bytes` each but the last.

    A block that is a little larger, by its checksum, is still one request.
    """
    lows = range(block.offset, block.stop, most_bytes)
    found = [(low, min(block.stop, low + most_bytes)) for low in lows]
    if len(found) > 1 and block.stop - lows[-2] <= most_bytes + CHECKSUM_BYTES:
        return [*found[:-2], (lows[-2], block.stop)]
    return found


def check_target(name: str, nbytes: int, target: Bytes) -> None:
    """Whether array `name` can be read into `target`.

    Raises:
        ProgramError: it is not `nbytes` writable bytes in a row.
    """
    fits = target.shape == (nbytes,) and target.dtype == np.uint8
    if not (fits and target.flags.c_contiguous and target.flags.writeable):
        raise ProgramError(
            f"array {name!r}: {nbytes:,} B cannot be read into {target.dtype} of shape "
            f"{target.shape}; give one writable, contiguous row of exactly that many uint8"
        )


def _cut(start: int, block: Block, most_bytes: int) -> Iterator[tuple[int, Block]]:
    low, stop = block.offset, block.offset + block.used_bytes
    while low < stop:
        high = min(stop, (low // most_bytes + 1) * most_bytes)
        yield start + low - block.offset, Block(block.path, low, high - low, high - low, False)
        low = high
