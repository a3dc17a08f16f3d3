"""Shapes of what the phases take, before there is anything to take them from."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from qwen3vl_jax.buckets import bucket
from qwen3vl_jax.cache import SMALLEST_CAPACITY, LayerCache, new_cache
from qwen3vl_jax.config import Config

Shape = jax.ShapeDtypeStruct


def cache_shapes(
    config: Config, batch: int, capacity: int, dtype: DTypeLike
) -> tuple[LayerCache, ...]:
    """The layers of a KV cache, with shapes in the place of arrays."""
    return jax.eval_shape(
        lambda: new_cache(config.text, batch=batch, capacity=capacity, dtype=dtype).layers
    )


def decode_shapes(
    config: Config, batch: int, capacity: int, dtype: DTypeLike, *, tokens: int = 1
) -> tuple[Any, ...]:
    """Arrays of the phases "decode" and "verify"."""
    slots = bucket(capacity, SMALLEST_CAPACITY)
    return (
        Shape((batch, tokens, config.text.hidden_size), dtype),
        Shape((3, batch, tokens), jnp.int32),
        cache_shapes(config, batch, capacity, dtype),
        Shape((batch, slots), jnp.bool_),
        Shape((batch, tokens), jnp.bool_),
        Shape((), jnp.int32),
    )


def scores_shapes(config: Config, batch: int, dtype: DTypeLike) -> tuple[Any, ...]:
    """Arrays of the phase "scores"."""
    return (Shape((batch, 1, config.text.hidden_size), dtype),)
