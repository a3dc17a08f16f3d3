"""A decoder layer as one step, or as several that each read less.

A plan needs room for all that one step reads. A whole layer of the 2B model is 100 MB, its
attention and each matrix of its MLP are 25 MB; a layer of 128 experts is up to 5 GB, one expert
38 MB. So finer steps run in less memory, and leave more of it to weights that stay; coarse ones
take fewer calls.

`forward_layer`, `extend_layer` and `finish_layer` are a layer at any granularity. Every one gives
the same bits on XLA:CPU: a whole layer is cut (`layers.cut`) where the steps of a fine one end.
Elsewhere XLA may choose other products where it sees more at once.

Letters are those of `text`; each function that is jitted is one step.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qwen3vl_jax.arrays import AnyArray
from qwen3vl_jax.attention import attention
from qwen3vl_jax.cache import LayerCache, write
from qwen3vl_jax.cache_attention import cached_attention
from qwen3vl_jax.layers import Linear, RMSNorm, cut
from qwen3vl_jax.moe import Expert, Routing, SparseMLP, add_experts, route
from qwen3vl_jax.text import (
    Attention,
    DecoderLayer,
    DenseMLP,
    FlatLayer,
    cached_layer,
    decoder_layer,
    module_of,
)

AnyLayer = DecoderLayer | FlatLayer


@dataclasses.dataclass(frozen=True, slots=True)
class Granularity:
    """How finely decoder layers are cut into steps: by default not at all.

    Attributes:
        split_dense: in a dense layer attention and each matrix of the MLP are steps of their own.
        experts_per_step: in a sparse layer attention, the router, and every so many experts are;
            None leaves it whole.
    """

    split_dense: bool = False
    experts_per_step: int | None = None

    def opened(self, layer: AnyLayer) -> DecoderLayer | None:
        """The layer as a module if it is more than one step."""
        if not self.split_dense and self.experts_per_step is None:
            return None  # at once: to make a module of a flat layer costs as much as to call it
        module = module_of(layer)
        sparse = isinstance(module.mlp, SparseMLP)
        split = self.experts_per_step is not None if sparse else self.split_dense
        return module if split else None


WHOLE_LAYERS = Granularity()


def forward_layer(
    layer: AnyLayer,
    x: Float[Array, "B T H"],
    cos: Float[Array, "B T D"],
    sin: Float[Array, "B T D"],
    valid: Bool[AnyArray, "B T"],
    granularity: Granularity,
) -> Float[Array, "B T H"]:
    """One layer without a cache."""
    module = granularity.opened(layer)
    if module is None:
        return decoder_layer(layer, x, cos, sin, valid)
    x = attend(module.input_layernorm, module.self_attn, x, cos, sin, valid)
    return _after_attention(module, x, granularity)


def extend_layer(
    layer: AnyLayer,
    x: Float[Array, "B T H"],
    cos: Float[Array, "B T D"],
    sin: Float[Array, "B T D"],
    cache: LayerCache,
    start: Int[AnyArray, ""],
    valid: Bool[AnyArray, "B S"],
    granularity: Granularity,
) -> tuple[Float[Array, "B T H"], LayerCache]:
    """One layer over T new tokens; `x` and `cache` are consumed."""
    module = granularity.opened(layer)
    if module is None:
        return cached_layer(layer, x, cos, sin, cache, start, valid)
    parts = module.input_layernorm, module.self_attn
    x, cache = attend_cached(*parts, x, cos, sin, cache, start, valid)
    return _after_attention(module, x, granularity), cache


def finish_layer(
    layer: AnyLayer,
    x: Float[Array, "B T H"],
    mixed: Float[Array, "B N T D"],
    granularity: Granularity,
) -> Float[Array, "B T H"]:
    """All of a layer that follows the softmax, wherever that was computed; `x` is consumed.

    Args:
        x: what came into the layer.
        mixed: the values that each head mixed.
    """
    module = granularity.opened(layer)
    if module is None:
        return finish_whole(layer, x, mixed)
    return _after_attention(module, join_heads(module.self_attn, x, mixed), granularity)


def _after_attention(
    layer: DecoderLayer, x: Float[Array, "B T H"], granularity: Granularity
) -> Float[Array, "B T H"]:
    """The MLP in steps, with its norm before it; `x` is consumed."""
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    if isinstance(mlp, DenseMLP):
        normed, gate = open_gate(norm, mlp.gate_proj, x)
        return project_down(mlp.down_proj, x, project_up(mlp.up_proj, normed, gate))
    routing, total = choose_experts(norm, mlp.gate, x, choices=mlp.choices)
    experts, together = tuple(mlp.experts), granularity.experts_per_step
    assert together is not None, "this layer would be one step"
    for first in range(0, len(experts), together):
        some = experts[first : first + together]
        total = run_experts(some, np.array(first, np.int32), routing, total)
    return add_back(x, total)


@functools.partial(jax.jit, donate_argnames="x")
def finish_whole(
    layer: AnyLayer, x: Float[Array, "B T H"], mixed: Float[Array, "B N T D"]
) -> Float[Array, "B T H"]:
    """Step: all that follows the softmax."""
    return module_of(layer).finish(x, mixed)


@jax.jit
def attend(
    norm: RMSNorm,
    self_attn: Attention,
    x: Float[Array, "B T H"],
    cos: Float[Array, "B T D"],
    sin: Float[Array, "B T D"],
    valid: Bool[Array, "B T"],
) -> Float[Array, "B T H"]:
    """Step: the first half of a layer without a cache."""
    queries, keys, values = self_attn.project(norm(x), cos, sin)
    last_key = jnp.arange(x.shape[1], dtype=jnp.int32)
    return x + self_attn.combine(attention(queries, keys, values, last_key, valid))


@functools.partial(jax.jit, donate_argnames=("x", "cache"))
def attend_cached(
    norm: RMSNorm,
    self_attn: Attention,
    x: Float[Array, "B T H"],
    cos: Float[Array, "B T D"],
    sin: Float[Array, "B T D"],
    cache: LayerCache,
    start: Int[Array, ""],
    valid: Bool[Array, "B S"],
) -> tuple[Float[Array, "B T H"], LayerCache]:
    """Step: the first half of a layer; keys and values go to the slots from `start` on."""
    queries, keys, values = self_attn.project(norm(x), cos, sin)
    cache = write(cache, keys, values, start)
    last_key = start + jnp.arange(x.shape[1], dtype=jnp.int32)
    mixed = cached_attention(queries, cache, last_key, valid)
    return x + self_attn.combine(mixed), cache


@functools.partial(jax.jit, donate_argnames="x")
def join_heads(
    self_attn: Attention, x: Float[Array, "B T H"], mixed: Float[Array, "B N T D"]
) -> Float[Array, "B T H"]:
    """Step: what attention adds to the hidden values."""
    return x + self_attn.combine(mixed)


@jax.jit
def open_gate(
    norm: RMSNorm, gate_proj: Linear, x: Float[Array, "B T H"]
) -> tuple[Float[Array, "B T H"], Float[Array, "B T F"]]:
    """Step: what the MLP reads, and its gate."""
    normed = cut(norm(x))
    return normed, gate_proj(normed)


@functools.partial(jax.jit, donate_argnames="gate")
def project_up(
    up_proj: Linear, normed: Float[Array, "B T H"], gate: Float[Array, "B T F"]
) -> Float[Array, "B T F"]:
    """Step: the inner values of the MLP."""
    return jax.nn.silu(gate) * up_proj(normed)


@functools.partial(jax.jit, donate_argnames="x")
def project_down(
    down_proj: Linear, x: Float[Array, "B T H"], inner: Float[Array, "B T F"]
) -> Float[Array, "B T H"]:
    """Step: what the MLP adds to the hidden values."""
    return x + down_proj(inner)


@functools.partial(jax.jit, static_argnames="choices")
def choose_experts(
    norm: RMSNorm, gate: Linear, x: Float[Array, "B T H"], *, choices: int
) -> tuple[Routing, Float[Array, "R H"]]:
    """Step: who goes through which expert, and zeros to which experts add."""
    routing = route(gate, norm(x), choices)
    return routing, jnp.zeros_like(routing.rows)


@functools.partial(jax.jit, donate_argnames="total")
def run_experts(
    experts: tuple[Expert, ...],
    first: Int[Array, ""],
    routing: Routing,
    total: Float[Array, "R H"],
) -> Float[Array, "R H"]:
    """Step: adds what the experts numbered `first` and following say."""
    return add_experts(experts, first, routing, total)


@functools.partial(jax.jit, donate_argnames="x")
def add_back(x: Float[Array, "B T H"], total: Float[Array, "R H"]) -> Float[Array, "B T H"]:
    """Step: what the experts add to the hidden values."""
    return x + total.reshape(x.shape)
