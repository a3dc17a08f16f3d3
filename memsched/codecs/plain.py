"""raw, fp16 and bf16: one number after the other, in the array's own shape."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memsched.codecs.codec import (
    LARGEST,
    check_range,
    check_raw,
    narrowed,
    number_type,
    packed_bytes,
    row_blocks,
)

if TYPE_CHECKING:
    import jax


@dataclasses.dataclass(frozen=True, slots=True)
class Raw:
    """The array itself, of any shape, dtype and content: not a bit is changed."""

    name = "raw"
    cut = 1
    bound = 0.0
    floor = 0.0

    def packed(self, shape: tuple[int, ...], dtype: str) -> tuple[tuple[int, ...], str]:
        """The same."""
        return shape, dtype

    def nbytes(self, shape: tuple[int, ...], dtype: str) -> int:
        """Bytes of the array."""
        return packed_bytes((shape, dtype))

    def encode(self, array: NDArray[Any], name: str = "array") -> NDArray[Any]:
        """`array`, not a copy of it."""
        return array

    def decode(self, packed: NDArray[Any], shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """`packed`, not a copy of it."""
        return packed

    def product(
        self, rows: "jax.Array", packed: "jax.Array", shape: tuple[int, ...]
    ) -> "jax.Array":
        """`rows @ packed.T`, float32."""
        from memsched.codecs import products  # planning needs no JAX

        return products.plain(rows, packed, shape)


@dataclasses.dataclass(frozen=True, slots=True)
class Narrow:
    """Every number rounded to the nearest of a 16-bit dtype; any shape."""

    name: str
    dtype: str
    bound: float

    cut = 1

    @property
    def floor(self) -> float:
        """Half the smallest number of the dtype."""
        return 2.0**-25 if self.dtype == "float16" else 2.0**-134

    def packed(self, shape: tuple[int, ...], dtype: str) -> tuple[tuple[int, ...], str]:
        """The same shape in 16 bits."""
        return shape, self.dtype

    def nbytes(self, shape: tuple[int, ...], dtype: str) -> int:
        """Bytes of the encoding."""
        return packed_bytes((shape, self.dtype))

    def encode(self, array: NDArray[Any], name: str = "array") -> NDArray[Any]:
        """Rounded; refuses NaN, infinity and what float16 cannot reach by `name`.

        bfloat16 reaches all but the last 0.4 % of float32: those become its largest number.
        """
        check_raw(array, self.name, name)
        limit = LARGEST["float16" if self.dtype == "float16" else "float32"]
        packed = np.empty(array.size, number_type(self.dtype))
        flat = array.reshape(-1)
        for part in row_blocks(array.size, 1):
            block = flat[part].astype(np.float32)
            check_range(block, float(np.abs(block).max()), limit, self.name, name)
            packed[part] = narrowed(block, self.dtype)
        return packed.reshape(array.shape)

    def decode(self, packed: NDArray[Any], shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """The array of this dtype."""
        array = np.empty(packed.size, number_type(dtype))
        flat = packed.reshape(-1)
        for part in row_blocks(packed.size, 1):
            array[part] = narrowed(flat[part].astype(np.float32), dtype)
        return array.reshape(shape)

    def product(
        self, rows: "jax.Array", packed: "jax.Array", shape: tuple[int, ...]
    ) -> "jax.Array":
        """`rows @ packed.T`, float32."""
        from memsched.codecs import products  # planning needs no JAX

        return products.plain(rows, packed, shape)
