"""What is done to a KV cache of either form: made, cut short, made larger."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from qwen3vl_jax import text
from qwen3vl_jax.cache import CacheForm, KVCache, grown, new_cache
from qwen3vl_jax.config import TextConfig
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.long_cache import blocks_for, in_blocks, new_long_cache


def empty_cache(config: TextConfig, form: CacheForm) -> KVCache:
    """A cache without tokens."""
    settings: dict[str, Any] = {
        "batch": form.batch,
        "capacity": form.capacity,
        "dtype": form.dtype,
    }
    if form.block_slots is None:
        made = new_cache(config, **settings)
    else:
        made = new_long_cache(config, slots=form.block_slots, **settings)
    return dataclasses.replace(made, chunk_tokens=form.chunk_tokens)


def shortened(cache: KVCache, tokens: int) -> KVCache:
    """The cache without the last `tokens` tokens of every row, all of them real ones.

    Raises:
        UsageError: more than there are, or than the current block of a cache in blocks has.
    """
    if tokens == 0:
        return cache
    length = cache.length - tokens
    if length < cache.sealed_slots:
        raise UsageError(
            f"cache: {tokens} of {cache.length} tokens cannot be forgotten: the first "
            f"{cache.sealed_slots} stay as they are"
        )
    return dataclasses.replace(
        cache,
        valid=text.forget_from(cache.valid, np.int32(length)),
        length=length,
        next_position=cache.next_position - np.int32(tokens),
    )


def larger(cache: KVCache, capacity: int, runner: Any) -> KVCache:
    """The same contents in at least `capacity` slots, more than there are. Consumes the cache.

    In blocks it grows where it is. A plain one is copied; a runner that has no room for both makes
    it one in blocks. What is still to come of its prompts is read in the chunks of its new size.

    Args:
        runner: a `phases.Runner`.
    """
    if cache.block_slots is not None:
        slots = blocks_for(capacity, cache.block_slots) * cache.block_slots
        valid = jnp.pad(cache.valid, ((0, 0), (0, slots - cache.capacity)))
        return dataclasses.replace(cache, valid=valid)
    form = runner.expect(cache.batch, capacity)
    cache = dataclasses.replace(cache, chunk_tokens=form.chunk_tokens)
    if form.block_slots is None:
        return grown(cache, form.capacity)
    return in_blocks(cache, form.capacity, form.block_slots, runner.seal)


def check_room(batch: int, count: int, cache: KVCache, *, one_pass: bool = False) -> None:
    """Raises UsageError if the cache cannot take `count` tokens of each row, or not at once."""
    if batch != cache.batch:
        raise UsageError(f"cache: made for {cache.batch} rows, but the inputs have {batch}")
    if cache.length + count > cache.capacity:
        raise UsageError(
            f"cache: {cache.length} + {count} tokens do not fit {cache.capacity} slots; "
            "make it larger with new_cache(capacity=...) or grown"
        )
    if one_pass and count > cache.room:
        raise UsageError(
            f"cache: {count} tokens in one pass, but its current block has room for {cache.room}; "
            "verify fewer at a time"
        )
