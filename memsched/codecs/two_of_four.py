"""sparse:2:4: of every four numbers of a row the two largest (what sparse units compute with).

A packed row is two bfloat16 numbers for each four (the last four padded with zeros), in order, then
half a byte for each four: the position of the first in bits 0 and 1, of the second (beyond it) in
bits 2 and 3; an even four in the low half of its byte, an odd one in the high half.
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
    lines,
    narrowed,
    number_type,
    packed_bytes,
    row_blocks,
)
from memsched.codecs.grouped import flat_rows

if TYPE_CHECKING:
    import jax


@dataclasses.dataclass(frozen=True, slots=True)
class TwoOfFour:
    """Half the numbers of a row, by magnitude."""

    name = "sparse:2:4"
    cut = 1
    bound = math.sqrt(0.5) + 2.0**-8
    floor = 2.0**-134

    def packed(self, shape: tuple[int, ...], dtype: str) -> tuple[tuple[int, ...], str]:
        """uint8 [..., 4 * fours + ceil(fours / 2)]."""
        _, width = lines(shape, self.name)
        fours = -(-width // 4)
        return (*shape[:-1], 4 * fours + -(-fours // 2)), "uint8"

    def nbytes(self, shape: tuple[int, ...], dtype: str) -> int:
        """Bytes of the encoding."""
        return packed_bytes(self.packed(shape, dtype))

    def encode(self, array: NDArray[Any], name: str = "array") -> NDArray[Any]:
        """The two largest of every four; refuses NaN and infinity by `name`."""
        check_raw(array, self.name, name)
        rows, width = lines(array.shape, self.name)
        packed = np.empty(self.packed(array.shape, array.dtype.name)[0], np.uint8)
        flat, source = flat_rows(packed, array.shape), array.reshape(rows, width)
        for part in row_blocks(rows, width):
            block = source[part].astype(np.float32)
            largest = float(np.abs(block).max())
            check_range(block, largest, float(np.finfo(np.float32).max), self.name, name)
            fours = np.pad(block, ((0, 0), (0, -width % 4))).reshape(len(block), -1, 4)
            positions = _largest_two(np.abs(fours))
            values = narrowed(np.take_along_axis(fours, positions, axis=2), "bfloat16")
            codes = (positions[:, :, 0] | positions[:, :, 1] << 2).astype(np.uint8)
            codes = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
            flat[part, : 4 * fours.shape[1]] = values.reshape(len(block), -1).view(np.uint8)
            flat[part, 4 * fours.shape[1] :] = codes[:, ::2] | codes[:, 1::2] << 4
        return packed

    def decode(self, packed: NDArray[Any], shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """The array of this shape and dtype."""
        rows, width = lines(shape, self.name)
        flat, fours = flat_rows(packed, shape), -(-width // 4)
        array = np.empty((rows, width), number_type(dtype))
        for part in row_blocks(rows, width):
            values = np.ascontiguousarray(flat[part, : 4 * fours]).view(ml_dtypes.bfloat16)
            pairs = flat[part, 4 * fours :]
            codes = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(len(pairs), -1)[:, :fours]
            positions = np.stack([codes & 3, codes >> 2], axis=2).astype(np.intp)
            block = np.zeros((len(pairs), fours, 4), np.float32)
            kept = values.astype(np.float32).reshape(len(pairs), fours, 2)
            np.put_along_axis(block, positions, kept, axis=2)
            array[part] = narrowed(block.reshape(len(pairs), -1)[:, :width], dtype)
        return array.reshape(shape)

    def product(
        self, rows: "jax.Array", packed: "jax.Array", shape: tuple[int, ...]
    ) -> "jax.Array":
        """`rows @ decoded.T`, float32."""
        from memsched.codecs import products  # planning needs no JAX

        return products.two_of_four(rows, packed, shape)


def _largest_two(sizes: Numbers) -> NDArray[np.intp]:
    """Positions in ascending order of the two largest of each four; the first of equal ones."""
    first = sizes.argmax(axis=2, keepdims=True)
    rest = sizes.copy()
    np.put_along_axis(rest, first, np.float32(-1), axis=2)
    second = rest.argmax(axis=2, keepdims=True)
    return np.concatenate([np.minimum(first, second), np.maximum(first, second)], axis=2)
