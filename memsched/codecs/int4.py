"""int4: number = (code - 8) * scale, or code * scale + minimum (`:zero`); codes from 0 to 15.

A packed row is `ceil(in / 2)` bytes of codes, then for each group of 32 or 64 numbers a float16
scale, or a float16 scale and a float16 minimum. Little-endian, no padding.

Two codes share a byte. A row is divided into runs of 32 numbers, 16 bytes each: byte `b` of a run
holds number `b` in its low four bits and number `16 + b` in its high four bits, so that sixteen
bytes are two vectors of sixteen codes. A last run of only m numbers has `h = ceil(m / 2)` bytes,
number `b` low and number `h + b` high; if m is odd, the last high code is 0 and means nothing.
"""

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memsched.codecs.codec import Numbers, lines, narrowed, number_type, packed_bytes, row_blocks
from memsched.codecs.grids import Grid, from_minimum, symmetric
from memsched.codecs.grouped import encoded_rows, flat_rows, groups, spread

if TYPE_CHECKING:
    import jax

RUN = 32
CENTRE = 8  # the code of zero without a minimum
HIGHEST = 15
LARGEST = 65504.0  # float16
REACHES = (8 / 7, 1.08, 1.02, 0.96, 0.9, 0.84, 0.78, 0.72)  # 8 / 7 is the usual grid
ENDS = tuple(itertools.product((0.0, 0.05, 0.11), (1.0, 0.95, 0.89)))


@dataclasses.dataclass(frozen=True, slots=True)
class Int4:
    """Half a byte for each number; a scale, and with `zero` a minimum, for each `group` numbers."""

    group: int
    zero: bool = False

    cut = 1

    @property
    def name(self) -> str:
        """int4:32 or int4:64:zero."""
        return f"int4:{self.group}:zero" if self.zero else f"int4:{self.group}"

    @property
    def bound(self) -> float:
        """Half a step of the usual grid, and what float16 takes from its ends."""
        return (1 / HIGHEST if self.zero else 0.5 / (CENTRE - 1)) + 2.0**-10

    @property
    def floor(self) -> float:
        """The grid of the smallest scale."""
        return HIGHEST * 2.0**-24

    @property
    def terms(self) -> int:
        """float16 numbers that are stored for each group."""
        return 2 if self.zero else 1

    def packed(self, shape: tuple[int, ...], dtype: str) -> tuple[tuple[int, ...], str]:
        """uint8 [..., ceil(in / 2) + 2 * terms * groups]."""
        _, width = lines(shape, self.name)
        nbytes = -(-width // 2) + 2 * self.terms * groups(width, self.group)
        return (*shape[:-1], nbytes), "uint8"

    def nbytes(self, shape: tuple[int, ...], dtype: str) -> int:
        """Bytes of the encoding."""
        return packed_bytes(self.packed(shape, dtype))

    def encode(
        self, array: NDArray[Any], name: str = "array", *, weights: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Codes by least squares; refuses NaN, infinity and what float16 cannot reach by `name`.

        `weights`, float32 [in], finite, from 0: what the square of an error counts in each column,
        in sum never more than without them. All zeros: as without.
        """
        packed = np.empty(self.packed(array.shape, array.dtype.name)[0], np.uint8)
        flat = flat_rows(packed, array.shape)
        limit = LARGEST if self.zero else (CENTRE - 1) * LARGEST
        label = self.name, name
        parts = encoded_rows(array, self.group, limit, self._fit, self._pack, label, weights)
        for part, rows in parts:
            flat[part] = rows
        return packed

    def decode(self, packed: NDArray[Any], shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """The array of this shape and dtype."""
        rows, width = lines(shape, self.name)
        flat = flat_rows(packed, shape)
        array = np.empty((rows, width), number_type(dtype))
        half = -(-width // 2)
        for part in row_blocks(rows, width):
            terms = np.ascontiguousarray(flat[part, half:]).view(np.float16).astype(np.float32)
            numbers = unpack(flat[part, :half], width).astype(np.float32)
            if not self.zero:
                numbers -= CENTRE
            numbers *= spread(terms[:, :: self.terms], self.group, width)
            if self.zero:
                numbers += spread(terms[:, 1::2], self.group, width)
            array[part] = narrowed(numbers, dtype)
        return array.reshape(shape)

    def product(
        self, rows: "jax.Array", packed: "jax.Array", shape: tuple[int, ...]
    ) -> "jax.Array":
        """`rows @ decoded.T`, float32."""
        from memsched.codecs import products  # planning needs no JAX

        return products.int4(rows, packed, shape, self.group, zero=self.zero)

    def _fit(self, numbers: Numbers, weights: Numbers | None) -> Grid:
        if self.zero:
            return from_minimum(numbers, HIGHEST, ENDS, "float16", weights)
        return symmetric(numbers, -CENTRE, CENTRE - 1, REACHES, "float16", weights)

    def _pack(self, codes: Numbers) -> NDArray[np.uint8]:
        return pack(codes if self.zero else codes + np.float32(CENTRE))


def pack(codes: Numbers) -> NDArray[np.uint8]:
    """[rows, in] codes from 0 to 15 to [rows, ceil(in / 2)] bytes."""
    rows, width = codes.shape
    narrow = codes.astype(np.uint8)
    whole, half = width // RUN * RUN, -(-(width % RUN) // 2)
    runs = narrow[:, :whole].reshape(rows, -1, 2, RUN // 2)
    packed = np.empty((rows, whole // 2 + half), np.uint8)
    packed[:, : whole // 2] = (runs[:, :, 0] | runs[:, :, 1] << 4).reshape(rows, -1)
    packed[:, whole // 2 :] = narrow[:, whole : whole + half]
    high = narrow[:, whole + half :]
    packed[:, whole // 2 : whole // 2 + high.shape[1]] |= high << 4
    return packed


def unpack(packed: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """The codes, back."""
    rows = packed.shape[0]
    whole, half = width // RUN * RUN, -(-(width % RUN) // 2)
    codes = np.empty((rows, width), np.uint8)
    runs = packed[:, : whole // 2].reshape(rows, -1, RUN // 2)
    codes[:, :whole] = np.stack([runs & 15, runs >> 4], axis=2).reshape(rows, whole)
    tail = packed[:, whole // 2 :]
    codes[:, whole : whole + half] = tail & 15
    codes[:, whole + half :] = tail[:, : width - whole - half] >> 4
    return codes
