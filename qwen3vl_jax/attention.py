"""Exact attention in blocks of queries: memory grows with keys x block, never with keys squared.

Letters: B batch (or frames), N query heads, K key heads, T queries, S keys, D values of a head.
Keys and values have one leading axis BK of B x K rows: with two axes XLA:CPU copies a cache that
was just written.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qwen3vl_jax import kernels

# Of one block of float32 scores: 8 MB stay in the cache. With 64 MB, 896 patches of bfloat16 take
# 67 ms instead of 21.
SCORE_BLOCK_BYTES = 8 << 20


def attention(
    queries: Float[Array, "B N T D"],
    keys: Float[Array, "BK S D"],
    values: Float[Array, "BK S D"],
    last_key: Int[Array, " T"],
    valid: Bool[Array, "B S"],
) -> Float[Array, "B N T D"]:
    """Softmax attention; query t of row b sees key s where `valid[b, s]` and `s <= last_key[t]`.

    Key head j serves query heads j*G to (j+1)*G - 1, where G = N / K. Scores and softmax are
    float32. What a query gets that may see nothing is finite, and never read.

    Source: transformers 5.23, `eager_attention_forward`.
    """
    batch, heads, count, _ = queries.shape
    if count == 1 and kernels.usable():
        return _attend_one(queries, keys, values, last_key, valid)
    keys, values = _widened(keys), _widened(values)
    block = query_block(batch * heads * keys.shape[1], count)
    if block >= count:
        return _attend(queries, keys, values, last_key, valid)
    blocks = -(-count // block)
    padding = blocks * block - count
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, padding), (0, 0)))
    stacked = queries.reshape(batch, heads, blocks, block, -1).transpose(2, 0, 1, 3, 4)
    last = jnp.pad(last_key, (0, padding)).reshape(blocks, block)
    outputs = jax.lax.map(
        lambda part: _attend(part[0], keys, values, part[1], valid), (stacked, last)
    )
    joined = outputs.transpose(1, 2, 0, 3, 4).reshape(batch, heads, blocks * block, -1)
    return joined[:, :, :count]


def query_block(scores_per_query: int, count: int) -> int:
    """Queries per block: a power of two, at least 16, whose scores fit their bytes."""
    fitting = SCORE_BLOCK_BYTES // (4 * scores_per_query)
    return min(count, max(16, 1 << max(fitting.bit_length() - 1, 0)))


def _attend(
    queries: Float[Array, "B N T D"],
    keys: Float[Array, "BK S D"],
    values: Float[Array, "BK S D"],
    last_key: Int[Array, " T"],
    valid: Bool[Array, "B S"],
) -> Float[Array, "B N T D"]:
    batch, heads, count, size = queries.shape
    rows, slots, _ = keys.shape
    grouped = _widened(queries.reshape(rows, -1, size))
    scores = jnp.einsum("rqd,rsd->rqs", grouped, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, heads, count, slots) * jnp.float32(size**-0.5)
    seen = valid[:, None, None, :] & (jnp.arange(slots)[None, :] <= last_key[:, None])[None, None]
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    weights = _widened(jax.nn.softmax(scores, axis=-1).astype(queries.dtype))
    weights = weights.reshape(rows, -1, slots)
    mixed = jnp.einsum("rqs,rsd->rqd", weights, values, preferred_element_type=jnp.float32)
    return mixed.astype(queries.dtype).reshape(batch, heads, count, size)


def _widened(array: Float[Array, "..."]) -> Float[Array, "..."]:
    """XLA:CPU multiplies float32 faster where bfloat16 has no instructions.

    896 patches: 58 ms -> 34 ms on two cores with AVX2.
    """
    return array.astype(jnp.float32) if kernels.widen() else array


@jax.custom_jvp
def _attend_one(
    queries: Float[Array, "B N 1 D"],
    keys: Float[Array, "BK S D"],
    values: Float[Array, "BK S D"],
    last_key: Int[Array, " 1"],
    valid: Bool[Array, "B S"],
) -> Float[Array, "B N 1 D"]:
    """One query, by the kernel if this is compiled for a CPU; differentiated, it is `_attend`."""
    return jax.lax.platform_dependent(
        queries, keys, values, last_key, valid, cpu=_attend_by_kernel, default=_attend
    )


_attend_one.defjvp(lambda primals, tangents: jax.jvp(_attend, primals, tangents))


def _attend_by_kernel(
    queries: Float[Array, "B N 1 D"],
    keys: Float[Array, "BK S D"],
    values: Float[Array, "BK S D"],
    last_key: Int[Array, " 1"],
    valid: Bool[Array, "B S"],
) -> Float[Array, "B N 1 D"]:
    seen = valid & (jnp.arange(keys.shape[1], dtype=jnp.int32) <= last_key)[None]
    grouped = queries.reshape(keys.shape[0], -1, queries.shape[-1])
    mixed = kernels.one_token_attention(grouped, keys, values, seen)
    return mixed.astype(queries.dtype).reshape(queries.shape)
