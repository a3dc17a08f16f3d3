"""sparse:block=S: of every 16 rows the share S of the blocks of 16 x 16 numbers, by energy.

Packed is uint8 [ceil(out / 16), bitmap + 512 * kept]. A line stands for 16 rows: a bit for each of
its blocks from left to right (lowest bit first; set: kept), then the kept blocks in this order as
bfloat16, row by row. Edges are padded with zeros.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from memsched.codecs.codec import (
    Numbers,
    check_range,
    check_raw,
    matrix,
    narrowed,
    number_type,
    packed_bytes,
    row_blocks,
)

if TYPE_CHECKING:
    import jax

SIDE = 16
BLOCK_BYTES = 2 * SIDE * SIDE


@dataclasses.dataclass(frozen=True, slots=True)
class BlockSparse:
    """`share` of the blocks of every 16 rows, rounded up."""

    share: float

    cut = SIDE
    floor = 2.0**-134

    @property
    def name(self) -> str:
        """sparse:block=0.5."""
        return f"sparse:block={self.share}"

    @property
    def bound(self) -> float:
        """The blocks that are left out have at most their share of the energy."""
        return math.sqrt(1 - self.share) + 2.0**-8

    def kept(self, width: int) -> int:
        """How many blocks of 16 rows of this width are kept."""
        return math.ceil(-(-width // SIDE) * self.share)

    def packed(self, shape: tuple[int, ...], dtype: str) -> tuple[tuple[int, ...], str]:
        """uint8 [ceil(out / 16), bitmap + 512 * kept]."""
        outputs, width = matrix(shape, self.name)
        bitmap = -(-width // (8 * SIDE))
        return (-(-outputs // SIDE), bitmap + BLOCK_BYTES * self.kept(width)), "uint8"

    def nbytes(self, shape: tuple[int, ...], dtype: str) -> int:
        """Bytes of the encoding."""
        return packed_bytes(self.packed(shape, dtype))

    def encode(self, array: NDArray[Any], name: str = "array") -> NDArray[Any]:
        """The blocks with the most energy; refuses NaN and infinity by `name`."""
        check_raw(array, self.name, name)
        packed = np.empty(self.packed(array.shape, array.dtype.name)[0], np.uint8)
        outputs, width = array.shape
        bitmap = -(-width // (8 * SIDE))
        for part in row_blocks(outputs, width, SIDE):
            block = array[part].astype(np.float32)
            largest = float(np.abs(block).max())
            check_range(block, largest, float(np.finfo(np.float32).max), self.name, name)
            padded = np.pad(block, ((0, -len(block) % SIDE), (0, -width % SIDE)))
            tiles = padded.reshape(-1, SIDE, padded.shape[1] // SIDE, SIDE).swapaxes(1, 2)
            chosen = np.sort(_most_energy(tiles)[:, : self.kept(width)], axis=1)
            bits = np.zeros(tiles.shape[:2], bool)
            np.put_along_axis(bits, chosen, np.True_, axis=1)
            values = narrowed(tiles[np.arange(len(tiles))[:, None], chosen], "bfloat16")
            lines = packed[part.start // SIDE : part.start // SIDE + len(tiles)]
            lines[:, :bitmap] = np.packbits(bits, axis=1, bitorder="little")
            lines[:, bitmap:] = values.reshape(len(tiles), -1).view(np.uint8)
        return packed

    def decode(self, packed: NDArray[Any], shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """The array of this shape and dtype."""
        width = matrix(shape, self.name)[1]
        bitmap, across = -(-width // (8 * SIDE)), -(-width // SIDE)
        array = np.empty(shape, number_type(dtype))
        for index, line in enumerate(packed):
            bits = np.unpackbits(line[:bitmap], count=across, bitorder="little").astype(bool)
            tiles = np.zeros((across, SIDE, SIDE), np.float32)
            values = np.ascontiguousarray(line[bitmap:]).view(ml_dtypes.bfloat16)
            tiles[bits] = values.astype(np.float32).reshape(-1, SIDE, SIDE)
            rows = array[index * SIDE : (index + 1) * SIDE]
            wide = tiles.swapaxes(0, 1).reshape(SIDE, -1)
            rows[...] = narrowed(wide[: len(rows), :width], dtype)
        return array

    def product(
        self, rows: "jax.Array", packed: "jax.Array", shape: tuple[int, ...]
    ) -> "jax.Array":
        """`rows @ decoded.T`, float32."""
        from memsched.codecs import products  # planning needs no JAX

        return products.block_sparse(rows, packed, shape)


def _most_energy(tiles: Numbers) -> NDArray[np.intp]:
    """For each line of blocks, their positions from the most energy to the least."""
    peak = np.abs(tiles).max(axis=(1, 2, 3), keepdims=True)
    unit = tiles / np.where(peak == 0, np.float32(1), peak)  # no square overflows
    energy = np.square(unit).sum(axis=3).sum(axis=2)
    return np.argsort(-energy, axis=1, kind="stable")
