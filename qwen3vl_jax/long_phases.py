"""The phases of a cache in blocks: a layer is a step for its new tokens and one per full block.

A step reads one full block, so no plan needs room for more of them at a time. Otherwise these are
the phases of the same names in `phases`.

Letters are those of `text` and `cache_rows`; L are the slots of a block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qwen3vl_jax import text
from qwen3vl_jax.arrays import AnyArray
from qwen3vl_jax.cache_rows import Blocks
from qwen3vl_jax.config import Config
from qwen3vl_jax.layer_steps import WHOLE_LAYERS, AnyLayer, Granularity, finish_layer
from qwen3vl_jax.layers import RMSNorm
from qwen3vl_jax.long_attention import Partial, attend_block, heads, merged
from qwen3vl_jax.long_cache import write_block
from qwen3vl_jax.network import Features, through_layers
from qwen3vl_jax.phases import Phase, phases

Full = tuple[tuple[Blocks, ...], ...]
Current = tuple[Blocks, ...]
REPLACED = ("prefill", "decode", "verify")


@functools.partial(jax.jit, donate_argnames="current")
def attend_current(
    layer: AnyLayer,
    x: Float[Array, "B T H"],
    cos: Float[Array, "B T D"],
    sin: Float[Array, "B T D"],
    current: Blocks,
    start: Int[Array, ""],
    valid: Bool[Array, "B slots"],
) -> tuple[Float[Array, "B N T D"], Partial, Int[Array, ""], Blocks]:
    """Step: T new tokens go into the current block, and see it.

    Returns:
        Their queries, what they mix so far, the first slot that they have seen, and the block.
    """
    module = text.module_of(layer)
    queries, keys, values = module.self_attn.project(module.input_layernorm(x), cos, sin)
    current = write_block(current, keys, values, start)
    inside = start % jnp.int32(current.shape[2])
    last_key = inside + jnp.arange(x.shape[1], dtype=jnp.int32)
    first = start - inside
    partial = attend_block(queries, current, _valid_in(valid, first, current), last_key)
    return queries, partial, first, current


@jax.jit
def attend_full(
    queries: Float[Array, "B N T D"],
    partial: Partial,
    first: Int[Array, ""],
    block: Blocks,
    valid: Bool[Array, "B slots"],
) -> tuple[Partial, Int[Array, ""]]:
    """Step: the queries see one full block more, which ends before slot `first`.

    Returns:
        What they mix so far, and the first slot that they have seen.
    """
    slots = block.shape[2]
    first = first - jnp.int32(slots)
    last_key = jnp.full(queries.shape[2], slots - 1, jnp.int32)
    seen = attend_block(queries, block, _valid_in(valid, first, block), last_key)
    return merged(partial, seen), first


@jax.jit
def join_parts(partial: Partial, queries: Float[Array, "B N T D"]) -> Float[Array, "B N T D"]:
    """Step: what the heads mix, all blocks seen."""
    return heads(partial, queries)


def long_prefill_phase(
    layers: text.Layers,
    x: Float[Array, "B T H"],
    positions: Int[AnyArray, "3 B T"],
    feature_rows: Int[AnyArray, "B T"],
    features: Features | None,
    blocks: Full,
    cache: Current,
    valid: Bool[Array, "B S"],
    new_valid: Bool[AnyArray, "B T"],
    start: Int[AnyArray, ""],
    kept: Float[Array, "B 1 H"],
    place: Int[AnyArray, " B"],
    here: Bool[AnyArray, " B"],
    *,
    config: Config,
    granularity: Granularity = WHOLE_LAYERS,
) -> tuple[Float[Array, "B 1 H"], Current, Bool[Array, "B S"]]:
    """As `phases.extend_phase`. `cache` has the current blocks; all T tokens fit into them."""
    valid = text.mark_valid(valid, new_valid, start)
    x, cache = _extend(
        layers,
        x,
        positions,
        feature_rows,
        features,
        blocks,
        cache,
        valid,
        start,
        config,
        granularity,
    )
    return text.keep_last(kept, x, place, here), cache, valid


def long_decode_phase(
    layers: text.Layers,
    norm: RMSNorm,
    head: text.VocabularyMatrix,
    x: Float[Array, "B T H"],
    positions: Int[AnyArray, "3 B T"],
    blocks: Full,
    cache: Current,
    valid: Bool[Array, "B S"],
    new_valid: Bool[AnyArray, "B T"],
    start: Int[AnyArray, ""],
    *,
    config: Config,
    granularity: Granularity = WHOLE_LAYERS,
) -> tuple[Float[Array, "B T V"], Current, Bool[Array, "B S"]]:
    """As `phases.decode_phase`. `cache` has the current blocks; all T tokens fit into them."""
    valid = text.mark_valid(valid, new_valid, start)
    x, cache = _extend(
        layers, x, positions, None, None, blocks, cache, valid, start, config, granularity
    )
    return text.head(norm, head, x), cache, valid


def long_phases(config: Config, granularity: Granularity = WHOLE_LAYERS) -> dict[str, Phase]:
    """The phases that take a cache in blocks, by the names of those that take the plain one."""
    functions = {"prefill": long_prefill_phase}
    plain = phases(config, granularity)
    return {
        name: Phase(
            name,
            functools.partial(
                functions.get(name, long_decode_phase), config=config, granularity=granularity
            ),
            plain[name].weights,
            dict(_with_blocks(plain[name].arrays)),
        )
        for name in REPLACED
    }


def _with_blocks(arrays: Any) -> Any:
    """The same arguments, full blocks before the cache."""
    for name, kind in arrays.items():
        if name == "cache":
            yield "blocks", "feature"
        yield name, kind


def _extend(
    layers: text.Layers,
    x: Float[Array, "B T H"],
    positions: Int[AnyArray, "3 B T"],
    feature_rows: Int[AnyArray, "B T"] | None,
    features: Features | None,
    blocks: Full,
    cache: Current,
    valid: Bool[Array, "B S"],
    start: Int[AnyArray, ""],
    config: Config,
    granularity: Granularity,
) -> tuple[Float[Array, "B T H"], Current]:
    """Runs T new tokens through all layers on top of a cache in blocks."""
    written = list(cache)

    def extend(index: int, x: Float[Array, "B T H"], cos: Any, sin: Any) -> Float[Array, "B T H"]:
        layer = layers[index]
        queries, partial, first, written[index] = attend_current(
            layer, x, cos, sin, cache[index], start, valid
        )
        for block in reversed(blocks[index]):
            partial, first = attend_full(queries, partial, first, block, valid)
        return finish_layer(layer, x, join_parts(partial, queries), granularity)

    x = through_layers(extend, len(cache), x, positions, feature_rows, features, config)
    return x, tuple(written)


def _valid_in(
    valid: Bool[Array, "B slots"], first: Int[Array, ""], block: Blocks
) -> Bool[Array, "B L"]:
    """Which slots of a block hold real tokens."""
    size = valid.shape[0], block.shape[2]
    return jax.lax.dynamic_slice(valid, (jnp.int32(0), first), size)
