"""svd: a matrix as the product of two thin ones, multiplied one after the other.

Packed is uint8 [rank, 2 * (in + out)], the bytes of bfloat16 numbers: line k is the k-th right
vector (`in` numbers), then the k-th left one (`out` numbers), each times the root of the k-th
singular value, largest first. The matrix is `left.T @ right`: no other of this rank is nearer to
the raw one (Eckart and Young). Bytes, because XLA:CPU would widen all of an array of bfloat16
before it cuts a tile from it.
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
from memsched.errors import ProgramError

if TYPE_CHECKING:
    import jax


LARGEST = 2.0**100  # the sums that make one number of the matrix stay within float32


@dataclasses.dataclass(frozen=True, slots=True)
class Svd:
    """A given rank, or a fraction of the smaller side; never more than that side."""

    rank: int | None = None
    fraction: float | None = None

    cut = None
    bound = 1.0
    floor = 0.0

    @property
    def name(self) -> str:
        """svd:rank=64 or svd:fraction=0.25."""
        return f"svd:rank={self.rank}" if self.rank else f"svd:fraction={self.fraction}"

    def packed(self, shape: tuple[int, ...], dtype: str) -> tuple[tuple[int, ...], str]:
        """uint8 [rank, 2 * (in + out)]."""
        side = min(matrix(shape, self.name))
        rank = self.rank or math.ceil(side * (self.fraction or 1))
        return (min(rank, side), 2 * sum(shape)), "uint8"

    def nbytes(self, shape: tuple[int, ...], dtype: str) -> int:
        """Bytes of the encoding."""
        return packed_bytes(self.packed(shape, dtype))

    def encode(self, array: NDArray[Any], name: str = "array") -> NDArray[Any]:
        """The leading singular vectors; refuses NaN, infinity and numbers beyond 2^100 by `name`.

        Beside `array` lie the square of its smaller side and the short vectors, in float32.
        """
        check_raw(array, self.name, name)
        (rank, _), _ = self.packed(array.shape, array.dtype.name)
        outputs, width = array.shape
        tall = array if outputs >= width else array.T
        peak = _peak(tall, self.name, name)
        short, root = _leading(_gram(tall, peak), rank)
        packed = np.empty((rank, outputs + width), ml_dtypes.bfloat16)
        right, left = packed[:, :width], packed[:, width:]
        down, up = (right, left) if outputs >= width else (left, right)
        down[...] = narrowed((short * root * np.sqrt(peak)).T, "bfloat16")
        for part in row_blocks(*tall.shape):
            long = tall[part].astype(np.float32) / peak @ short
            up[:, part] = narrowed((long / root * np.sqrt(peak)).T, "bfloat16")
        return packed.view(np.uint8)

    def decode(self, packed: NDArray[Any], shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """The array of this shape and dtype."""
        outputs, width = matrix(shape, self.name)
        factors = packed.view(ml_dtypes.bfloat16)
        right = factors[:, :width].astype(np.float32)
        array = np.empty(shape, number_type(dtype))
        for part in row_blocks(outputs, width):
            left = factors[:, width:][:, part].astype(np.float32)
            array[part] = narrowed(left.T @ right, dtype)
        return array

    def product(
        self, rows: "jax.Array", packed: "jax.Array", shape: tuple[int, ...]
    ) -> "jax.Array":
        """`rows @ right.T @ left`, float32: the matrix is never made."""
        from memsched.codecs import products  # planning needs no JAX

        return products.svd(rows, packed, shape)


def rank_for_energy(array: NDArray[Any], share: float, name: str = "array") -> int:
    """The smallest rank that keeps this share of the sum of squares of a matrix.

    Raises:
        CodecError: NaN or infinite numbers.
        ProgramError: no matrix, or a share that is not above 0 and at most 1.
    """
    matrix(array.shape, "svd")
    if not 0 < share <= 1:
        raise ProgramError(f"{name}: a share of energy is above 0 and at most 1, not {share}")
    tall = array if array.shape[0] >= array.shape[1] else array.T
    import scipy.linalg  # slow to load, and sizes need none of it

    square = _gram(tall, _peak(tall, "svd", name))
    energies = scipy.linalg.eigvalsh(square, overwrite_a=True, check_finite=False)
    kept = np.cumsum(np.maximum(energies[::-1], 0), dtype=np.float64)
    return int(np.searchsorted(kept, share * kept[-1] * (1 - 1e-7))) + 1


def _leading(square: Numbers, rank: int) -> tuple[Numbers, Numbers]:
    """Eigenvectors [side, rank] of the largest eigenvalues, and the fourth roots of these."""
    import scipy.linalg  # slow to load, and sizes need none of it

    chosen = (len(square) - rank, len(square) - 1)
    values, vectors = scipy.linalg.eigh(
        square, subset_by_index=chosen, overwrite_a=True, check_finite=False
    )
    root = np.sqrt(np.sqrt(np.maximum(values[::-1], 0)))
    return np.ascontiguousarray(vectors[:, ::-1]), np.where(root == 0, np.float32(1), root)


def _peak(tall: NDArray[Any], codec: str, name: str) -> np.float32:
    """The largest magnitude, 1 if all are zero."""
    check_raw(tall, codec, name)
    peak = np.float32(0)
    for part in row_blocks(*tall.shape):
        block = tall[part].astype(np.float32)
        largest = np.abs(block).max()
        check_range(block, float(largest), LARGEST, codec, name)
        peak = max(peak, largest)
    return peak or np.float32(1)


def _gram(tall: NDArray[Any], peak: np.float32) -> Numbers:
    """`tall.T @ tall` of the array divided by its peak: the lower half, in Fortran's order."""
    import scipy.linalg.blas  # slow to load, and sizes need none of it

    side = tall.shape[1]
    square = np.zeros((side, side), np.float32, order="F")
    for part in row_blocks(len(tall), side):
        block = tall[part].astype(np.float32, order="C") / peak
        square = scipy.linalg.blas.ssyrk(1, block.T, 1, square, lower=True, overwrite_c=True)
    return square
