"""Rows of the KV cache: what a token leaves in one head, as numbers or as int8 codes.

An encoded row of D numbers is D codes and their float32 scale, packed as `memsched.codecs.Int8`
packs a row of a matrix. bfloat16, float16 and float32 hold codes exactly: scores and sums are taken
over codes, and scales go into the scores of keys and the weights of values.

Letters: BK rows of slots, S slots, D values of a head, W what a row of the cache has: D, or D + 4.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int, UInt8

from memsched.codecs.levels import KV_CODECS
from qwen3vl_jax import kernels
from qwen3vl_jax.arrays import Leaf
from qwen3vl_jax.errors import UsageError

ENCODED = np.dtype(np.uint8)  # the dtype of encoded rows, and of nothing else in a cache
SCALE_BYTES = 4
HIGHEST = 127

Rows = Float[Leaf, "BK S W"] | UInt8[Leaf, "BK S W"]
Blocks = Float[Leaf, "2 BK L W"] | UInt8[Leaf, "2 BK L W"]


def row_dtype(kv: str, dtype: DTypeLike) -> np.dtype:
    """Of a cache that is stored as `kv` says, raw or int8, in a model of this dtype.

    Raises:
        UsageError: it says something else.
    """
    if kv not in KV_CODECS:
        raise UsageError(f"kv {kv!r} is not one of {', '.join(KV_CODECS)}")
    return np.dtype(dtype) if kv == "raw" else ENCODED


def row_width(head_dim: int, dtype: DTypeLike) -> int:
    """Items of a row of this dtype."""
    return head_dim + (SCALE_BYTES if np.dtype(dtype) == ENCODED else 0)


def as_rows(numbers: Float[Array, "BK T D"], dtype: DTypeLike) -> Array:
    """Numbers as rows of a cache of this dtype: encoded, or as they are."""
    if np.dtype(dtype) != ENCODED:
        return numbers
    wide = numbers.astype(jnp.float32)
    scales = jnp.abs(wide).max(axis=-1, keepdims=True) / jnp.float32(HIGHEST)
    codes = jnp.round(wide / jnp.where(scales > 0, scales, jnp.float32(1)))
    codes = jnp.clip(codes, -HIGHEST, HIGHEST).astype(jnp.int8)
    parts = [jax.lax.bitcast_convert_type(part, jnp.uint8) for part in (codes, scales)]
    return jnp.concatenate([parts[0], parts[1].reshape(*scales.shape[:-1], SCALE_BYTES)], axis=-1)


def put(array: Rows, rows: Array, start: Int[Array, ""]) -> Array:
    """`array` with `rows` [BK, T, W] in its slots from `start` on; in place if it is donated."""
    if array.dtype != jnp.bfloat16 or not kernels.usable():
        return _put(array, rows, start)
    return jax.lax.platform_dependent(array, rows, start, cpu=kernels.put_rows, default=_put)


def _put(array: Rows, rows: Array, start: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array, rows, start, axis=1)


def factors(
    rows: Rows, dtype: DTypeLike
) -> tuple[Float[Array, "BK S D"], Float[Array, "BK S"] | None]:
    """What rows are a product of: numbers of this dtype, and a float32 scale of each, if any."""
    if rows.dtype != ENCODED:
        return rows, None
    codes = jax.lax.bitcast_convert_type(rows[..., :-SCALE_BYTES], jnp.int8)
    scales = jax.lax.bitcast_convert_type(rows[..., -SCALE_BYTES:], jnp.float32)
    return codes.astype(dtype), scales
