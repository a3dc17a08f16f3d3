"""Exact attention over keys and values in blocks, one block at a time, in float32.

Of each query three things are kept while blocks pass: the largest score so far, the sum of
exp(score - largest), and the values weighted with the same. Two such `Partial`s over different keys
make one over both.

Letters are those of `attention` and `cache_rows`; L are the slots of a block, Q the queries of one
key head: G x T.

Source: T. Dao et al., "FlashAttention", 2022, section 3.1; M. Milakov, N. Gimelshein, "Online
normalizer calculation for softmax", 2018.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qwen3vl_jax.arrays import Leaf
from qwen3vl_jax.attention import query_block
from qwen3vl_jax.cache_rows import Blocks, factors


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["top", "total", "mixed"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, slots=True)
class Partial:
    """Attention over some keys, not yet divided by `total`. All keys unseen: finite, and
    forgotten as soon as another part has a key that is seen.
    """

    top: Float[Leaf, "BK Q"]
    total: Float[Leaf, "BK Q"]
    mixed: Float[Leaf, "BK Q D"]


def attend_block(
    queries: Float[Array, "B N T D"],
    block: Blocks,
    valid: Bool[Array, "B L"],
    last_key: Int[Array, " T"],
) -> Partial:
    """Attention over one block; query t of row b sees slot s where `valid[b, s]` and
    `s <= last_key[t]`.
    """
    rows, slots = block.shape[1:3]
    size = queries.shape[-1]
    grouped = queries.reshape(rows, -1, size)
    count = grouped.shape[1]
    last = jnp.tile(last_key, count // last_key.shape[0])
    seen = jnp.repeat(valid, rows // valid.shape[0], axis=0)
    together = query_block(rows * slots, count)
    if together >= count:
        return Partial(*_attend(grouped, block, seen, last))
    parts = -(-count // together)
    padding = parts * together - count
    grouped = jnp.pad(grouped, ((0, 0), (0, padding), (0, 0)))
    stacked = grouped.reshape(rows, parts, together, size).transpose(1, 0, 2, 3)
    lasts = jnp.pad(last, (0, padding)).reshape(parts, together)
    found = jax.lax.map(lambda part: _attend(part[0], block, seen, part[1]), (stacked, lasts))
    return Partial(*(_joined(part)[:, :count] for part in found))


def merged(one: Partial, other: Partial) -> Partial:
    """Attention over the keys of both."""
    top = jnp.maximum(one.top, other.top)
    shares = jnp.exp(one.top - top), jnp.exp(other.top - top)
    return Partial(
        top,
        one.total * shares[0] + other.total * shares[1],
        one.mixed * shares[0][:, :, None] + other.mixed * shares[1][:, :, None],
    )


def heads(partial: Partial, queries: Float[Array, "B N T D"]) -> Float[Array, "B N T D"]:
    """What the heads of these queries mix."""
    mixed = partial.mixed / partial.total[:, :, None]
    return mixed.astype(queries.dtype).reshape(queries.shape)


def _attend(
    grouped: Float[Array, "BK Q D"],
    block: Blocks,
    seen: Bool[Array, "BK L"],
    last: Int[Array, " Q"],
) -> tuple[Array, Array, Array]:
    """The parts of a `Partial`."""
    keys, key_scales = factors(block[0], grouped.dtype)
    values, value_scales = factors(block[1], grouped.dtype)
    scores = jnp.einsum("rqd,rsd->rqs", grouped, keys, preferred_element_type=jnp.float32)
    scores = scores * jnp.float32(grouped.shape[-1] ** -0.5)
    if key_scales is not None:
        scores = scores * key_scales[:, None]
    causal = jnp.arange(keys.shape[1], dtype=jnp.int32)[None] <= last[:, None]
    scores = jnp.where(seen[:, None] & causal[None], scores, jnp.finfo(jnp.float32).min)
    top = scores.max(axis=-1)
    weights = jnp.exp(scores - top[:, :, None])
    total = weights.sum(axis=-1)
    if value_scales is not None:
        weights = weights * value_scales[:, None]
    mixed = jnp.einsum(
        "rqs,rsd->rqd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    return top, total, mixed


def _joined(parts: Array) -> Array:
    """[parts, rows, queries, ...] as [rows, parts x queries, ...]."""
    moved = parts.swapaxes(0, 1)
    return moved.reshape(moved.shape[0], -1, *moved.shape[3:])
