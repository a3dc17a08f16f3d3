"""int8: number = code * scale, codes from -127 to 127.

A packed row is `in` codes (int8), then the float32 scales of its groups in order: one for the whole
row, or one for each 64 or 128 numbers (the last group may have fewer). Little-endian, no padding.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memsched.codecs.codec import Numbers, lines, narrowed, number_type, packed_bytes, row_blocks
from memsched.codecs.grids import Grid, symmetric
from memsched.codecs.grouped import encoded_rows, flat_rows, groups, spread

if TYPE_CHECKING:
    import jax

HIGHEST = 127
REACHES = (1.0, 0.995, 0.99, 0.985, 0.98, 0.97, 0.96)  # 1 is the usual grid


@dataclasses.dataclass(frozen=True, slots=True)
class Int8:
    """One byte for each number; scales for groups of `group` numbers of a row, None: of all."""

    group: int | None = None

    cut = 1
    bound = 0.5 / HIGHEST * 1.001
    floor = 127 * 2.0**-149  # of the smallest scale

    @property
    def name(self) -> str:
        """int8 or int8:64."""
        return f"int8:{self.group}" if self.group else "int8"

    def packed(self, shape: tuple[int, ...], dtype: str) -> tuple[tuple[int, ...], str]:
        """uint8 [..., in + 4 * groups]."""
        _, width = lines(shape, self.name)
        return (*shape[:-1], width + 4 * groups(width, self.group)), "uint8"

    def nbytes(self, shape: tuple[int, ...], dtype: str) -> int:
        """Bytes of the encoding."""
        return packed_bytes(self.packed(shape, dtype))

    def encode(
        self, array: NDArray[Any], name: str = "array", *, weights: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Codes by least squares; refuses NaN and infinity by `name`.

        `weights`, float32 [in], finite, from 0: what the square of an error counts in each column,
        in sum never more than without them. All zeros: as without.
        """
        packed = np.empty(self.packed(array.shape, array.dtype.name)[0], np.uint8)
        flat = flat_rows(packed, array.shape)
        limit = float(np.finfo(np.float32).max)
        label = self.name, name
        for part, rows in encoded_rows(array, self.group, limit, _fit, _pack, label, weights):
            flat[part] = rows
        return packed

    def decode(self, packed: NDArray[Any], shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """The array of this shape and dtype."""
        rows, width = lines(shape, self.name)
        flat = flat_rows(packed, shape)
        array = np.empty((rows, width), number_type(dtype))
        for part in row_blocks(rows, width):
            scales = np.ascontiguousarray(flat[part, width:]).view(np.float32)
            numbers = flat[part, :width].view(np.int8).astype(np.float32)
            numbers *= spread(scales, self.group, width)
            array[part] = narrowed(numbers, dtype)
        return array.reshape(shape)

    def product(
        self, rows: "jax.Array", packed: "jax.Array", shape: tuple[int, ...]
    ) -> "jax.Array":
        """`rows @ decoded.T`, float32."""
        from memsched.codecs import products  # planning needs no JAX

        return products.int8(rows, packed, shape, self.group)


def _fit(numbers: Numbers, weights: Numbers | None) -> Grid:
    return symmetric(numbers, -HIGHEST, HIGHEST, REACHES, "float32", weights)


def _pack(codes: Numbers) -> NDArray[np.uint8]:
    return codes.astype(np.int8).view(np.uint8)
