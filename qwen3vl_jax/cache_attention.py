"""Attention over a layer's plain cache, whatever its rows are. Encoded ones are never expanded.

Few tokens: C++ on a CPU where it can be built, each token as if it were alone. Else a tile of slots
at a time becomes numbers, and what the tiles say is merged as `long_attention` does it.

Letters are those of `cache_rows` and `attention`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from qwen3vl_jax import kernels
from qwen3vl_jax.attention import attention
from qwen3vl_jax.cache import LayerCache
from qwen3vl_jax.cache_rows import ENCODED
from qwen3vl_jax.kernels import products
from qwen3vl_jax.long_attention import Partial, attend_block, heads, merged

TILE_SLOTS = 512
FEW_TOKENS = 8  # at most, for as many readings of the cache to beat tiles


def cached_attention(
    queries: Float[Array, "B N T D"],
    cache: LayerCache,
    last_key: Int[Array, " T"],
    valid: Bool[Array, "B S"],
) -> Float[Array, "B N T D"]:
    """`attention` over the keys and values of a cache."""
    keys, values = cache.keys, cache.values
    if keys.dtype != ENCODED:
        return attention(queries, keys, values, last_key, valid)
    if queries.shape[2] > FEW_TOKENS or not kernels.usable():
        return _by_tiles(queries, keys, values, last_key, valid)
    return jax.lax.platform_dependent(
        queries, keys, values, last_key, valid, cpu=_by_kernel, default=_by_tiles
    )


def _by_kernel(
    queries: Float[Array, "B N T D"],
    keys: UInt8[Array, "BK S W"],
    values: UInt8[Array, "BK S W"],
    last_key: Int[Array, " T"],
    valid: Bool[Array, "B S"],
) -> Float[Array, "B N T D"]:
    (rows, slots, _), (*_, tokens, size) = keys.shape, queries.shape

    def attend(token: tuple[Array, Array]) -> Array:
        query, last = token
        seen = valid & (jnp.arange(slots, dtype=jnp.int32) <= last)[None]
        return products.one_token_attention(query, keys, values, seen)

    grouped = queries.reshape(rows, -1, tokens, size).transpose(2, 0, 1, 3)
    mixed = jax.lax.map(attend, (grouped, last_key)).transpose(1, 2, 0, 3)
    return mixed.astype(queries.dtype).reshape(queries.shape)


def _by_tiles(
    queries: Float[Array, "B N T D"],
    keys: UInt8[Array, "BK S W"],
    values: UInt8[Array, "BK S W"],
    last_key: Int[Array, " T"],
    valid: Bool[Array, "B S"],
) -> Float[Array, "B N T D"]:
    rows, slots, _ = keys.shape
    size = min(TILE_SLOTS, slots)

    def add_tile(index: Int[Array, ""], partial: Partial) -> Partial:
        begin = index * jnp.int32(size)
        first = jnp.minimum(begin, slots - size)  # the last tile may overlap the one before

        def tile(array: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, first, size, axis=1)

        new = jnp.arange(size, dtype=jnp.int32) >= begin - first
        block = jnp.stack([tile(keys), tile(values)])
        seen = attend_block(queries, block, tile(valid) & new[None], last_key - first)
        return merged(partial, seen)

    count = queries.size // (rows * queries.shape[-1])
    nothing = Partial(
        jnp.full((rows, count), jnp.finfo(jnp.float32).min),
        jnp.zeros((rows, count)),
        jnp.zeros((rows, count, queries.shape[-1])),
    )
    return heads(jax.lax.fori_loop(0, -(-slots // size), add_tile, nothing), queries)
