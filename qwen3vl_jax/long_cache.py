"""The second form of the KV cache, for contexts that outgrow the memory: in blocks.

A layer's keys and values lie in blocks of equally many slots, [2, BK, L, W] each. Only the current
block is written. A full one never changes again and every pass reads it once, as it does a weight:
so it can rest and move like one, and a cache grows without a copy.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int

from qwen3vl_jax.arrays import AnyArray
from qwen3vl_jax.cache import KVCache, LayerCache
from qwen3vl_jax.cache_rows import Blocks, as_rows, put, row_width
from qwen3vl_jax.config import TextConfig
from qwen3vl_jax.errors import UsageError

# Disks and rings are at their best with such pieces: 1024 slots of one row at the 2B and 8B shapes.
BLOCK_BYTES = 4 << 20
SMALLEST_BLOCK = 512  # slots: as many as tokens pass through the layers at once

# `seal(name, block)`: what stands for a full block from now on, and an array to write the next to.
Seal = Callable[[str, Blocks], tuple[Any, Blocks]]


def block_shape(
    config: TextConfig, batch: int, dtype: DTypeLike, slots: int | None = None
) -> tuple[int, int, int, int]:
    """The shape of a block of rows of this dtype, by default of about `BLOCK_BYTES`."""
    rows, width = batch * config.num_key_value_heads, row_width(config.head_dim, dtype)
    slot_bytes = 2 * rows * width * np.dtype(dtype).itemsize
    fitting = max(BLOCK_BYTES // slot_bytes, 1)
    chosen = max(SMALLEST_BLOCK, 1 << (fitting.bit_length() - 1))
    return 2, rows, chosen if slots is None else slots, width


def blocks_for(capacity: int, slots: int) -> int:
    """Blocks that hold so many tokens, the current one included."""
    return -(-capacity // slots)


def new_long_cache(
    config: TextConfig, *, batch: int, capacity: int, dtype: DTypeLike, slots: int
) -> KVCache:
    """An empty cache in blocks of `slots`, with room for at least `capacity` tokens."""
    if batch < 1 or capacity < 1 or slots < 1:
        raise UsageError(
            f"cache: batch {batch}, capacity {capacity} and blocks of {slots} must be positive"
        )
    shape = block_shape(config, batch, dtype, slots)
    count = config.num_hidden_layers
    layers = tuple(jnp.zeros(shape, dtype) for _ in range(count))
    valid = jnp.zeros((batch, blocks_for(capacity, slots) * slots), bool)
    return KVCache(layers, valid, 0, np.zeros(batch, np.int32), ((),) * count)


def with_room(cache: KVCache, seal: Seal) -> KVCache:
    """The cache with free slots in its current blocks; full ones are sealed. Consumes it."""
    if cache.full is None or cache.block_slots is None or cache.length == cache.capacity:
        return cache
    if cache.length < cache.sealed_slots + cache.block_slots:
        return cache
    index = len(cache.full[0])
    layers, full = [], []
    current = cast(tuple[Array, ...], cache.layers)
    for layer, (block, before) in enumerate(zip(current, cache.full, strict=True)):
        sealed, fresh = seal(f"layers.{layer}.blocks.{index}", block)
        layers.append(fresh)
        full.append((*before, sealed))
    return dataclasses.replace(cache, layers=tuple(layers), full=tuple(full))


def in_blocks(cache: KVCache, capacity: int, slots: int, seal: Seal) -> KVCache:
    """A plain cache as one in blocks, with room for `capacity` tokens. Consumes it.

    Layers go one by one, and what they leave is free at once.
    """
    count = max(cache.length - 1, 0) // slots
    layers, full = [], []
    for index, layer in enumerate(cast(tuple[LayerCache, ...], cache.layers)):
        blocks = []
        for i in range(count):
            block = _cut_out(layer, np.int32(slots * i), slots=slots)
            blocks.append(seal(f"layers.{index}.blocks.{i}", block)[0])
        full.append(tuple(blocks))
        layers.append(jax.block_until_ready(_cut_out(layer, np.int32(slots * count), slots=slots)))
        layer.keys.delete()
        layer.values.delete()
    room = blocks_for(capacity, slots) * slots
    valid = jnp.pad(cache.valid, ((0, 0), (0, max(0, room - cache.capacity))))[:, :room]
    return dataclasses.replace(cache, layers=tuple(layers), valid=valid, full=tuple(full))


@functools.partial(jax.jit, static_argnames="slots")
def _cut_out(layer: LayerCache, first: Int[AnyArray, ""], *, slots: int) -> Blocks:
    """Slots from `first` on, zeros where there are none."""
    places = first + jnp.arange(slots, dtype=jnp.int32)
    parts = [
        jnp.take(part, places, axis=1, mode="fill", fill_value=0)
        for part in (layer.keys, layer.values)
    ]
    return jnp.stack(parts)


def write_block(
    block: Blocks,
    keys: Float[Array, "BK T D"],
    values: Float[Array, "BK T D"],
    start: Int[Array, ""],
) -> Blocks:
    """Puts T new tokens into the slots of the current block from that of token `start` on."""
    inside = start % jnp.int32(block.shape[2])
    rows = jnp.concatenate([as_rows(part, block.dtype) for part in (keys, values)])
    return put(block.reshape(-1, *block.shape[2:]), rows, inside).reshape(block.shape)
