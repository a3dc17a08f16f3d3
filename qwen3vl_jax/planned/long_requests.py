"""A request whose KV cache is in blocks: when that is worth it, and what its passes read."""

import dataclasses

import numpy as np

from memsched.machine import NVME, Machine
from qwen3vl_jax.buckets import bucket
from qwen3vl_jax.cache import SMALLEST_CAPACITY
from qwen3vl_jax.cache_rows import row_dtype
from qwen3vl_jax.config import Config
from qwen3vl_jax.long_cache import block_shape
from qwen3vl_jax.planned.request import Request
from qwen3vl_jax.planned.shapes import CacheShapes


def with_blocks(
    request: Request, config: Config, dtype: np.dtype, machine: Machine
) -> Request | None:
    """The same request with a cache in blocks, as `PlannedRunner.expect` makes it.

    None if it has one, if it would not have a full block, or if the disk has no space for them.
    """
    rows = row_dtype(request.kv, dtype)
    slots, capacity = block_shape(config.text, request.batch, rows)[2], request.capacity(config)
    if request.block_slots is not None or bucket(capacity, SMALLEST_CAPACITY) <= slots:
        return None
    made = dataclasses.replace(request, block_slots=slots)
    cache = cache_of(made, config, dtype, capacity)
    full_bytes = (cache.slots // slots - 1) * cache.block_bytes
    return made if full_bytes <= machine.tier(NVME).capacity_bytes else None


def cache_of(request: Request, config: Config, dtype: np.dtype, tokens: int) -> CacheShapes:
    """The cache of a request when it holds so many tokens."""
    capacity, slots = request.capacity(config), request.block_slots
    kind = config, dtype, row_dtype(request.kv, dtype), request.batch
    if slots is None:
        return CacheShapes(*kind, bucket(capacity, SMALLEST_CAPACITY))
    count = max(tokens - 1, 0) // slots
    full = tuple(
        tuple(f"blocks.{layer}.{index}" for index in range(count))
        for layer in range(config.text.num_hidden_layers)
    )
    return CacheShapes(*kind, -(-capacity // slots) * slots, slots, full)
