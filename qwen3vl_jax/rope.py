"""Rotary positions: angles of the decoder (interleaved MRoPE) and of the vision tower (rows and
columns).

Angles are float32 whatever the model's dtype: a position of 200,000 does not survive bfloat16.
The order of operations is the reference's: `theta ** -x` for `1 / theta ** x` already moves cos by
2e-4.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qwen3vl_jax.arrays import AnyArray
from qwen3vl_jax.config import RopeConfig


def inverse_frequencies(
    rope: RopeConfig, head_dim: int
) -> tuple[Float[np.ndarray, " pairs"], float]:
    """Radians per position of every pair, and the factor on cos and sin.

    Source: transformers 5.23, `modeling_rope_utils.py` (default, linear, yarn).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelengths = np.float32(rope.theta) ** exponents
    plain = np.float32(1.0) / wavelengths
    match rope.scaling:
        case "linear":
            return plain / np.float32(rope.factor), 1.0
        case "yarn":
            stretched = np.float32(1.0) / (np.float32(rope.factor) * wavelengths)
            keep = np.float32(1.0) - _yarn_ramp(rope, head_dim)
            return stretched * (np.float32(1.0) - keep) + plain * keep, _yarn_attention(rope)
        case _:
            return plain, 1.0


def _yarn_ramp(rope: RopeConfig, head_dim: int) -> Float[np.ndarray, " pairs"]:
    """0 where a pair turns often enough to be kept, 1 where it is stretched, a ramp between."""

    def pair_that_turns(rotations: float) -> float:
        span = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(span) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast or 32.0), pair_that_turns(rope.beta_slow or 1.0)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    return np.clip(ramp, np.float32(0), np.float32(1))


def _yarn_attention(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def growth(scale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return growth(rope.mscale) / growth(rope.mscale_all_dim)
    return growth(1.0)


def axis_of_pair(section: tuple[int, int, int], pairs: int) -> Int[np.ndarray, " pairs"]:
    """Which axis (0 time, 1 height, 2 width) turns each pair of the decoder.

    The axes take turns until height and width have had their share; all other pairs follow time.
    Example: section (6, 5, 5) gives t h w t h w t h w t h w t h w t.

    Source: transformers 5.23, `Qwen3VLTextRotaryEmbedding.recomposition_frequencies`.
    """
    axes = np.zeros(pairs, np.int32)
    for axis in (1, 2):
        axes[axis : 3 * section[axis] : 3] = axis
    return axes


def text_rotation(
    positions: Int[AnyArray, "3 batch tokens"], rope: RopeConfig, head_dim: int
) -> tuple[Float[Array, "batch tokens head_dim"], Float[Array, "batch tokens head_dim"]]:
    """cos and sin of every token, float32, both halves equal."""
    frequencies, factor = inverse_frequencies(rope, head_dim)
    axes = axis_of_pair(rope.mrope_section, head_dim // 2)
    of_pair = jnp.moveaxis(positions[axes], 0, -1).astype(jnp.float32)
    angles = of_pair * frequencies[None, None, :]
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles) * jnp.float32(factor), jnp.sin(angles) * jnp.float32(factor)


def vision_rotation(
    rows_columns: Int[AnyArray, "patches 2"], theta: float, head_dim: int
) -> tuple[Float[Array, "patches head_dim"], Float[Array, "patches head_dim"]]:
    """cos and sin of every patch: the first half of the pairs turns with the row, the rest with the
    column.

    Source: transformers 5.23, `Qwen3VLVisionRotaryEmbedding`.
    """
    half = head_dim // 2
    exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    frequencies = np.float32(1.0) / np.float32(theta) ** exponents
    angles = rows_columns[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    angles = angles.reshape(angles.shape[0], half)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "*rows head_dim"],
    cos: Float[Array, "*rows_or_one head_dim"],
    sin: Float[Array, "*rows_or_one head_dim"],
) -> Float[Array, "*rows head_dim"]:
    """Turns the pairs (i, i + head_dim / 2) of `x`, in x's dtype; `cos` and `sin` broadcast."""
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin
