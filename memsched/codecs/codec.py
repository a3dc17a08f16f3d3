"""What a codec is, and what all of them share: shapes, rows, blocks, refusals.

An encoded array is one array (`packed`) whose shape and dtype follow from the codec and the raw
shape alone: stores, plans and the runtime move it under the raw array's name, as any other.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from memsched.errors import CodecError, ProgramError

if TYPE_CHECKING:
    import jax

LARGEST = {"bfloat16": 255 * 2.0**120, "float16": 65504.0, "float32": (2 - 2.0**-23) * 2.0**127}
RAW_DTYPES = tuple(LARGEST)
BLOCK_NUMBERS = 1 << 16  # 256 KB as float32: what a core keeps in its second cache
Numbers = NDArray[np.float32]


@runtime_checkable
class Codec(Protocol):
    """How an array is stored. Instances are frozen data: equal codecs make equal bytes.

    Codecs of rows take any shape [..., in] and keep the leading axes; `svd` and `sparse:block` take
    matrices [out, in] only. The product is always with a matrix.
    """

    @property
    def name(self) -> str:
        """What `parse_codec` understands."""
        ...

    @property
    def cut(self) -> int | None:
        """Rows that are encoded together; None: all. At multiples of it `packed` can be cut.

        `encode(array[a:b])` is then the part of `encode(array)` that holds these rows.
        """
        ...

    @property
    def bound(self) -> float:
        """In `cut` rows, the error's root mean square is at most this share of the largest number.

        And never more than `floor` beyond that.
        """
        ...

    @property
    def floor(self) -> float:
        """Numbers below this may be stored as zero."""
        ...

    def packed(self, shape: tuple[int, ...], dtype: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of the encoding of an array of this shape and dtype."""
        ...

    def nbytes(self, shape: tuple[int, ...], dtype: str) -> int:
        """Bytes of the encoding of an array of this shape and dtype."""
        ...

    def encode(self, array: NDArray[Any], name: str = "array") -> NDArray[Any]:
        """The packed array. Works in blocks of rows: no second copy of `array` in float32.

        Raises:
            CodecError: `array` has NaN, infinite or too large numbers; the line names it `name`.
            ProgramError: an array of this shape or dtype has no such encoding.
        """
        ...

    def decode(self, packed: NDArray[Any], shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """The array of this shape and dtype that `packed` stands for."""
        ...

    def product(
        self, rows: "jax.Array", packed: "jax.Array", shape: tuple[int, ...]
    ) -> "jax.Array":
        """`rows @ decoded.T` for rows [n, in] and a matrix of `shape` [out, in]: float32 [n, out].

        Sums in float32. Expands at most one tile of the matrix at a time (2 MB).
        """
        ...


def packed_bytes(packed: tuple[tuple[int, ...], str]) -> int:
    """Bytes of an array of a shape and dtype."""
    shape, dtype = packed
    return math.prod(shape) * number_type(dtype).itemsize


def number_type(dtype: str) -> np.dtype[Any]:
    """The dtype of this name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def lines(shape: tuple[int, ...], codec: str) -> tuple[int, int]:
    """How many rows an array has, and how many numbers in each.

    Raises:
        ProgramError: it has no axis, or its rows are empty.
    """
    if not shape or not shape[-1]:
        raise ProgramError(f"codec {codec}: shape {shape} has no rows; it needs [..., in], in >= 1")
    return math.prod(shape[:-1]), shape[-1]


def matrix(shape: tuple[int, ...], codec: str) -> tuple[int, int]:
    """The two sides of a matrix.

    Raises:
        ProgramError: it is none, or a side is 0.
    """
    if len(shape) != 2 or not all(shape):
        raise ProgramError(f"codec {codec}: shape {shape} is no matrix; it needs [out, in] >= 1")
    return shape[0], shape[1]


def check_raw(array: NDArray[Any], codec: str, name: str) -> None:
    """Only the floating-point dtypes of weights and caches have encodings.

    Raises:
        ProgramError: another dtype.
    """
    if array.dtype.name not in RAW_DTYPES:
        raise ProgramError(
            f"{name}: codec {codec} takes {', '.join(RAW_DTYPES)}, not {array.dtype.name}"
        )


def check_range(block: NDArray[Any], largest: float, limit: float, codec: str, name: str) -> None:
    """Refuses a block whose largest magnitude, or NaN, is `largest`.

    Raises:
        CodecError: `largest` is beyond `limit`, infinite or NaN.
    """
    if largest <= limit:
        return
    nan, infinite = int(np.isnan(block).sum()), int(np.isinf(block).sum())
    if nan or infinite:
        raise CodecError(
            f"{name}: {nan} NaN and {infinite} infinite numbers in one block of rows; "
            f"codec {codec} needs finite numbers: mend them, or leave the array raw"
        )
    raise CodecError(
        f"{name}: a number of magnitude {largest:.4g}, and codec {codec} reaches {limit:.6g}: "
        "use bf16, int8 or raw"
    )


def row_blocks(rows: int, width: int, cut: int = 1) -> Iterator[slice]:
    """Consecutive slices of rows, of about `BLOCK_NUMBERS` numbers and a multiple of `cut` rows."""
    step = max(1, BLOCK_NUMBERS // (width * cut)) * cut
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def narrowed(block: Numbers, dtype: str) -> NDArray[Any]:
    """`block` in another dtype; what rounding takes beyond its range becomes its largest number."""
    kind = number_type(dtype)
    largest = LARGEST[dtype]
    return np.clip(block, -largest, largest).astype(kind)
