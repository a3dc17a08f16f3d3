"""How much an encoding changes an array."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memsched.codecs.codec import Codec, row_blocks


def relative_error(array: NDArray[Any], codec: Codec, name: str = "array") -> float:
    """|decoded - array| / |array|, Frobenius; 0 if both are zero.

    Encodes and decodes in blocks of rows where the codec can be cut.

    Raises:
        CodecError: NaN, infinite or too large numbers, named `name`.
        ProgramError: an array of this shape or dtype has no such encoding.
    """
    codec.packed(array.shape, array.dtype.name)  # refuses shapes, before rows are made of them
    if not array.size or codec.bound == 0:  # not a bit is changed, NaN or not
        return 0.0
    rows = array.reshape(-1, array.shape[-1] if array.shape else 1)
    wrong = total = 0.0
    for part in row_blocks(*rows.shape, codec.cut) if codec.cut else [slice(None)]:
        block = rows[part]
        decoded = codec.decode(codec.encode(block, name), block.shape, block.dtype.name)
        for few in row_blocks(*block.shape):
            exact = block[few].astype(np.float64)
            total += float(np.square(exact).sum())
            wrong += float(np.square(decoded[few].astype(np.float64) - exact).sum())
    return math.sqrt(wrong / total) if total else 0.0
