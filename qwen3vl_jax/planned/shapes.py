"""Shapes of what the phases take, before there is anything to take them from."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from memsched.errors import DoesNotFitError
from qwen3vl_jax.buckets import bucket
from qwen3vl_jax.cache import SMALLEST_CAPACITY, LayerCache, new_cache
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.long_cache import block_shape
from qwen3vl_jax.planned.sealed import Sealed, sealed_names

Shape = jax.ShapeDtypeStruct


def cache_shapes(
    config: Config, batch: int, capacity: int, dtype: DTypeLike
) -> tuple[LayerCache, ...]:
    """The layers of a KV cache with rows of `dtype`, with shapes in the place of arrays."""
    return _cache_shapes(config, batch, capacity, np.dtype(dtype))


@functools.lru_cache(maxsize=64)
def _cache_shapes(
    config: Config, batch: int, capacity: int, dtype: np.dtype
) -> tuple[LayerCache, ...]:
    return jax.eval_shape(
        lambda: new_cache(config.text, batch=batch, capacity=capacity, dtype=dtype).layers
    )


@dataclasses.dataclass(frozen=True, slots=True)
class CacheShapes:
    """A KV cache of a batch, before there is one. `slots` are used and free ones. `dtype` is the
    model's, `row_dtype` that of what lies in the cache.

    One in blocks has `block_slots`, and of every layer the names of its full blocks.
    """

    config: Config
    dtype: np.dtype
    row_dtype: np.dtype
    batch: int
    slots: int
    block_slots: int | None = None
    full: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def among(cls, given: Mapping[str, Any], config: Config, dtype: np.dtype) -> "CacheShapes":
        """Those of the cache among the arrays of a phase, by their names."""
        blocks, current = given.get("blocks"), jax.tree.leaves(given["cache"])[0]
        batch, slots = given["valid"].shape
        if blocks is None:
            return cls(config, dtype, current.dtype, batch, slots)
        names = tuple(map(sealed_names, blocks))
        return cls(config, dtype, current.dtype, batch, slots, current.shape[2], names)

    def with_a_way_out(self, error: DoesNotFitError, option: str) -> DoesNotFitError:
        """A refusal with the option that would help, if the cache is large."""
        if self.slots <= block_shape(self.config.text, self.batch, self.row_dtype)[2]:
            return error
        way = f"{error}; {option} the KV cache of {self.slots:,} tokens may rest on disk"
        return DoesNotFitError(way, error.smallest)

    def with_one_block(self) -> "CacheShapes":
        """The same with one full block in every layer."""
        names = tuple((f"layers.{i}.blocks.0",) for i in range(self.config.text.num_hidden_layers))
        return dataclasses.replace(self, full=names)

    @property
    def block_bytes(self) -> int:
        """One block of every layer."""
        shape = block_shape(self.config.text, self.batch, self.row_dtype, self.block_slots)
        return self.config.text.num_hidden_layers * math.prod(shape) * self.row_dtype.itemsize

    @property
    def cache_bytes(self) -> int:
        """What lies in memory between two passes."""
        leaves = jax.tree.leaves(self.parts()[-2])
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    def decode(self) -> tuple[Any, ...]:
        """Arrays of the phase "decode"."""
        return (
            Shape((self.batch, 1, self.config.text.hidden_size), self.dtype),
            Shape((3, self.batch, 1), jnp.int32),
            *self.parts(),
            Shape((self.batch, 1), jnp.bool_),
            Shape((), jnp.int32),
        )

    def prefill(self, tokens: int) -> tuple[Any, ...]:
        """Arrays of the phase "prefill" for so many tokens without pictures."""
        batch, hidden = self.batch, self.config.text.hidden_size
        return (
            Shape((batch, tokens, hidden), self.dtype),
            Shape((3, batch, tokens), jnp.int32),
            Shape((batch, tokens), jnp.int32),
            None,
            *self.parts(),
            Shape((batch, tokens), jnp.bool_),
            Shape((), jnp.int32),
            Shape((batch, 1, hidden), self.dtype),
            Shape((batch,), jnp.int32),
            Shape((batch,), jnp.bool_),
        )

    def parts(self) -> tuple[Any, ...]:
        """As `KVCache.parts`."""
        text, valid = self.config.text, Shape((self.batch, self.slots), jnp.bool_)
        if self.block_slots is None:
            return cache_shapes(self.config, self.batch, self.slots, self.row_dtype), valid
        shape = block_shape(text, self.batch, self.row_dtype, self.block_slots)
        full = tuple(
            tuple(Sealed(name, shape, self.row_dtype) for name in names)
            for names in self.full or ((),) * text.num_hidden_layers
        )
        current = tuple(Shape(shape, self.row_dtype) for _ in range(text.num_hidden_layers))
        return full, current, valid


def check_context(config: Config, most: int | None) -> None:
    """Raises UsageError if no cache can have room for so many tokens."""
    positions = config.text.max_position_embeddings
    if most is not None and not 0 < most <= positions:
        raise UsageError(
            f"max_context {most:,} is not between 1 and the model's {positions:,} positions"
        )


def within_context(capacity: int, most: int | None) -> int:
    """How many tokens a cache gets room for: as many as ever, if that was said.

    Raises:
        UsageError: more are wanted.
    """
    if most is not None and capacity > most:
        raise UsageError(
            f"a context of {capacity:,} tokens is more than max_context, {most:,}; raise it, ask "
            "for fewer new tokens, or shorten the prompt"
        )
    return capacity if most is None else most


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
