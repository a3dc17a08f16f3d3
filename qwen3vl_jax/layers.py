"""Parts that the vision tower and the decoder share, as NNX modules with the checkpoint's names."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from qwen3vl_jax.encoded import Encoded
from qwen3vl_jax.linear import linear

Arrays = TypeVar("Arrays")


def cut(arrays: Arrays) -> Arrays:
    """The same arrays, where a step could end: XLA rounds them, and orders sums, as if it did.

    So a layer gives the same bits as one step and as several. Without this XLA merges arithmetic
    across the place, and keeps bfloat16 values in float32 on the way.
    """
    return jax.tree.map(jax.lax.optimization_barrier, arrays)


class ShapesOnly(nnx.Rngs):
    """In the place of keys where only shapes are wanted: to trace draws takes most of the time."""


def normal(rngs: nnx.Rngs, *shape: int) -> Float[Array, "*shape"]:
    """Normal numbers, float32; zeros of `ShapesOnly`."""
    if isinstance(rngs, ShapesOnly):
        return jnp.zeros(shape, jnp.float32)
    return jax.random.normal(rngs.params(), shape, jnp.float32)


class Linear(nnx.Module):
    """x @ weight.T + bias, with the weight as checkpoints hold it: [out, ...inputs]."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.weight = nnx.Param((normal(rngs, outputs, inputs) * inputs**-0.5).astype(dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None

    def __call__(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
        bias = None if self.bias is None else self.bias[...]
        weight = self.weight.get_value()
        if not isinstance(weight, Encoded):
            weight = weight.reshape(weight.shape[0], -1)
        return linear(x, weight, bias)


class LayerNorm(nnx.Module):
    """Layer normalisation with float32 statistics. Source: torch.nn.LayerNorm, eps 1e-6."""

    def __init__(self, size: int, *, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(jnp.ones(size, dtype))
        self.bias = nnx.Param(jnp.zeros(size, dtype))

    def __call__(self, x: Float[Array, "*rows size"]) -> Float[Array, "*rows size"]:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        scaled = centred * jax.lax.rsqrt(variance + jnp.float32(1e-6))
        weight, bias = self.weight[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        last = (1,) * (x.ndim - 1) + (-1,)
        return (scaled * weight.reshape(last) + bias.reshape(last)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation: float32 statistics, the weight multiplied in x's dtype.

    Source: transformers 5.23, `Qwen3VLTextRMSNorm`.
    """

    def __init__(self, size: int, *, eps: float, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows size"]) -> Float[Array, "*rows size"]:
        wide = x.astype(jnp.float32)
        variance = jnp.square(wide).mean(axis=-1, keepdims=True)
        scaled = (wide * jax.lax.rsqrt(variance + jnp.float32(self.eps))).astype(x.dtype)
        return self.weight[...].reshape((1,) * (x.ndim - 1) + (-1,)) * scaled
