"""A request whose KV cache is in blocks: when it can be, what passes read, what borders take."""

import dataclasses
import itertools

import numpy as np

from memsched.cost import CostModel
from memsched.machine import NVME, Machine
from memsched.plan import Copy
from memsched.program import ArraySpec, Program
from qwen3vl_jax.buckets import bucket
from qwen3vl_jax.cache import SMALLEST_CAPACITY
from qwen3vl_jax.cache_rows import row_dtype
from qwen3vl_jax.config import Config
from qwen3vl_jax.long_cache import block_shape, blocks_for
from qwen3vl_jax.planned.request import Request
from qwen3vl_jax.planned.shapes import CacheShapes

# Behind a border phases are traced and planned anew: of the 8B with 2, 10, 30 and 58 full blocks,
# 432 to 4,500 steps in two passes, in 0.21, 0.54, 1.1 and 2.2 s of a core.
PLANNING_STEP_S = 5e-4
STEPS_OF_LAYER = 4  # beside those of its full blocks
PHASES = 2  # a chunk of the prompt, and a token


def in_blocks(request: Request, config: Config, dtype: np.dtype, times: int = 1) -> Request | None:
    """The same request with a cache in blocks so many times as large as usual; None if it has one
    in blocks, or would have no full block.
    """
    rows, capacity = row_dtype(request.kv, dtype), request.capacity(config)
    slots = times * block_shape(config.text, request.batch, rows)[2]
    if request.block_slots is not None or bucket(capacity, SMALLEST_CAPACITY) <= slots:
        return None
    return dataclasses.replace(request, block_slots=slots)


def with_blocks(
    request: Request, config: Config, dtype: np.dtype, machine: Machine, times: int = 1
) -> Request | None:
    """As `in_blocks`, and None if the disk has no space for them."""
    made = in_blocks(request, config, dtype, times)
    if made is None or full_bytes(made, config, dtype) > machine.tier(NVME).capacity_bytes:
        return None
    return made


def full_bytes(request: Request, config: Config, dtype: np.dtype) -> int:
    """What all full blocks of a cache in blocks can take of the disk."""
    assert request.block_slots is not None
    capacity = request.capacity(config)
    cache = cache_of(request, config, dtype, capacity)
    return (blocks_for(capacity, request.block_slots) - 1) * cache.block_bytes


def borders_s(
    request: Request,
    config: Config,
    dtype: np.dtype,
    machine: Machine,
    cost: CostModel,
    tokens: int,
) -> float:
    """Seconds that so many tokens spend at borders of blocks: there the full block of every layer
    is written to disk, and phases are planned anew. 0 for a cache that is not in blocks.
    """
    if request.block_slots is None:
        return 0.0
    layers, count = config.text.num_hidden_layers, max(tokens - 1, 0) // request.block_slots
    nbytes = cache_of(request, config, dtype, tokens).block_bytes // layers
    block = Program({"block": ArraySpec("block", (nbytes,), "uint8", "cache")}, (), ())
    writing_s = sum(
        cost.seconds(Copy("block", source.name, target.name), block, machine)
        for source, target in itertools.pairwise(machine.tiers)
        if machine.link(source.name, target.name) is not None
    )
    steps = sum(STEPS_OF_LAYER + full for full in range(1, count + 1))
    return layers * (count * writing_s + PHASES * steps * PLANNING_STEP_S)


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
