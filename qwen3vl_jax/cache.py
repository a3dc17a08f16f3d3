"""The KV cache: static shapes, updated in place by donation. `long_cache` has its second form.

A layer's keys and values are [BK, S, W], one row of slots for every key head of every sequence: one
query then reads them at 12 GB/s on a CPU, against 1 to 2 GB/s and a copy of the cache for [B, S, K,
W]. With the axes B and K apart, XLA:CPU copies a float32 cache four times per step (2048 slots: 4.2
ms a layer against 1.5 ms).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from qwen3vl_jax.buckets import bucket
from qwen3vl_jax.cache_rows import Blocks, Rows, as_rows, put, row_width
from qwen3vl_jax.config import TextConfig
from qwen3vl_jax.errors import UsageError

SMALLEST_CAPACITY = 64


@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys", "values"], meta_fields=[])
@dataclasses.dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys (after rotation) and values of one layer."""

    keys: Rows
    values: Rows


@dataclasses.dataclass(frozen=True, slots=True)
class CacheForm:
    """Of what form a cache shall be made: of rows of `dtype`, and in blocks of `block_slots`, if
    that is not None. `chunk_tokens` is as in `KVCache`.
    """

    batch: int
    capacity: int
    dtype: np.dtype
    block_slots: int | None = None
    chunk_tokens: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class KVCache:
    """What the decoder remembers of a batch. A step that takes it consumes it and returns the next.

    `valid[b, s]` says whether slot s of row b holds a real token; the first `length` slots are in
    use. `next_position` is the rotary position of each row's next token.

    In the long form (`long_cache`) `full` has the full blocks of every layer, `layers` the current
    one. `chunk_tokens` of a prompt pass through the layers at once; None: as many as is usual.
    """

    layers: tuple[LayerCache, ...] | tuple[Blocks, ...]
    valid: Bool[Array, "B S"]
    length: int
    next_position: Int[np.ndarray, " B"]
    full: tuple[tuple[Any, ...], ...] | None = None
    chunk_tokens: int | None = None

    @property
    def batch(self) -> int:
        """Rows."""
        return self.valid.shape[0]

    @property
    def capacity(self) -> int:
        """Slots, used and free."""
        return self.valid.shape[1]

    @property
    def block_slots(self) -> int | None:
        """Slots of a block in the long form."""
        first = self.layers[0]
        return None if isinstance(first, LayerCache) else int(first.shape[2])

    @property
    def room(self) -> int:
        """Slots that the next pass may fill: no pass crosses the border of a block."""
        left, slots = self.capacity - self.length, self.block_slots
        return left if slots is None else min(left, slots - self.length % slots)

    @property
    def sealed_slots(self) -> int:
        """Slots of full blocks, which never change."""
        return 0 if self.full is None else len(self.full[0]) * (self.block_slots or 0)

    @property
    def parts(self) -> tuple[Any, ...]:
        """What phases take of it, in their order."""
        held = (self.layers, self.valid)
        return held if self.full is None else (self.full, *held)

    def after(self, tokens: int, layers: Any, valid: Bool[Array, "B S"]) -> "KVCache":
        """What phases returned of it, with so many tokens more."""
        return dataclasses.replace(self, layers=layers, valid=valid, length=self.length + tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all device arrays."""
        leaves = jax.tree.leaves(self.parts)
        return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, jax.Array))


def new_cache(config: TextConfig, *, batch: int, capacity: int, dtype: DTypeLike) -> KVCache:
    """An empty cache of at least `capacity` slots, rounded up to a bucket, with rows of `dtype`."""
    if batch < 1 or capacity < 1:
        raise UsageError(f"cache: batch {batch} and capacity {capacity} must be positive")
    slots = bucket(capacity, SMALLEST_CAPACITY)
    shape = (batch * config.num_key_value_heads, slots, row_width(config.head_dim, dtype))
    layers = tuple(
        LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        for _ in range(config.num_hidden_layers)
    )
    return KVCache(layers, jnp.zeros((batch, slots), bool), 0, np.zeros(batch, np.int32))


def grown(cache: KVCache, capacity: int) -> KVCache:
    """The same contents in at least `capacity` slots; a cache that had to grow is consumed."""
    slots = bucket(capacity, SMALLEST_CAPACITY)
    if slots <= cache.capacity:
        return cache
    layers = tuple(_grow_layer(layer, slots=slots) for layer in cache.layers)
    valid = jnp.pad(cache.valid, ((0, 0), (0, slots - cache.capacity)))
    return dataclasses.replace(cache, layers=layers, valid=valid)


@functools.partial(jax.jit, static_argnames="slots")
def _grow_layer(layer: LayerCache, *, slots: int) -> LayerCache:
    more = ((0, 0), (0, slots - layer.keys.shape[1]), (0, 0))
    return jax.tree.map(lambda array: jnp.pad(array, more), layer)


def write(
    cache: LayerCache,
    keys: Float[Array, "BK T D"],
    values: Float[Array, "BK T D"],
    start: Int[Array, ""],
) -> LayerCache:
    """Puts T new tokens into the slots from `start` on."""
    return LayerCache(
        put(cache.keys, as_rows(keys, cache.keys.dtype), start),
        put(cache.values, as_rows(values, cache.values.dtype), start),
    )
