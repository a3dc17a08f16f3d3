"""Mean squares of what comes into every matrix of the decoder, and into the head, on a few prompts.

What an error of a matrix does to its products grows with these: the fit of codes weights its
columns with them. Real tokens count, padding does not; for the second matrix of an expert those
that are routed to it. An expert that gets none has zeros, which leave its fit as it is.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from qwen3vl_jax import text
from qwen3vl_jax.attention import attention
from qwen3vl_jax.calibration import inputs_of, model_in_memory
from qwen3vl_jax.checkpoints.encodings import HEAD
from qwen3vl_jax.inputs import prepare
from qwen3vl_jax.layers import RMSNorm
from qwen3vl_jax.linear import linear
from qwen3vl_jax.model import Qwen3VL
from qwen3vl_jax.moe import Expert, SparseMLP, choose
from qwen3vl_jax.network import through_layers

# Of the mean of all columns, added to each: prompts are few, and none may count for nothing.
SHARE_OF_MEAN = 0.1
Squares = dict[str, Float[Array, " in"]]


def measured_input_squares(
    path: Path, prompts: Sequence[str], *, dtype: str | None
) -> dict[str, np.ndarray]:
    """Path of a matrix -> float32 [in], each at least a share of the mean of all.

    Args:
        path: a checkpoint that is not encoded.
        prompts: what users ask; the first 8 are taken.
        dtype: of the weights; None keeps what config.json says.

    Raises:
        UsageError: no prompt, or no room for the weights.
    """
    inputs = inputs_of(path, prompts)
    found, _ = input_squares(model_in_memory(path, dtype=dtype), inputs)
    return {name: squares + SHARE_OF_MEAN * squares.mean() for name, squares in found.items()}


def input_squares(
    model: Qwen3VL, inputs: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], Float[Array, "B T H"]]:
    """The mean squares, and what comes into the head. Pictures are left out."""
    batch, _ = prepare(model.config, inputs)
    tokens, decoder = batch.tokens, model.network.language_model
    valid, found = jnp.asarray(tokens.valid), dict[str, np.ndarray]()

    def through(index: int, x: Array, cos: Array, sin: Array) -> Array:
        x, squares = _through_layer(decoder.layers[index], x, cos, sin, valid)
        prefix = f"language_model.layers.{index}."
        found.update({prefix + name: np.asarray(values) for name, values in squares.items()})
        return x

    x = text.embed_tokens(decoder.embed_tokens, tokens.input_ids)
    count = len(decoder.layers)
    x = through_layers(through, count, x, tokens.positions, None, None, model.config)
    last = text.final_norm(decoder.norm, x)
    found[HEAD] = np.asarray(_mean_squares(last, valid))
    return found, last


def _through_layer(
    layer: text.DecoderLayer, x: Array, cos: Array, sin: Array, valid: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T H"], Squares]:
    """`x` after a layer, and mean squares by the names of its matrices."""
    mixed, squares = _attention(layer.input_layernorm, layer.self_attn, x, cos, sin, valid)
    x = x + mixed
    normed = layer.post_attention_layernorm(x)
    if isinstance(layer.mlp, SparseMLP):
        squares |= _experts(layer.mlp, normed, valid)
    else:
        squares |= _dense(layer.mlp, normed, valid)
    return x + _added(layer.mlp, normed), squares


@jax.jit
def _attention(
    norm: RMSNorm,
    self_attn: text.Attention,
    x: Float[Array, "B T H"],
    cos: Float[Array, "B T D"],
    sin: Float[Array, "B T D"],
    valid: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T H"], Squares]:
    normed = norm(x)
    queries, keys, values = self_attn.project(normed, cos, sin)
    mixed = attention(queries, keys, values, jnp.arange(x.shape[1], dtype=jnp.int32), valid)
    heads = mixed.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
    before = _mean_squares(normed, valid)
    squares = {f"self_attn.{name}_proj.weight": before for name in "qkv"}
    squares["self_attn.o_proj.weight"] = _mean_squares(heads, valid)
    return self_attn.combine(mixed), squares


@jax.jit
def _dense(mlp: text.DenseMLP, x: Float[Array, "B T H"], valid: Bool[Array, "B T"]) -> Squares:
    before = _mean_squares(x, valid)
    inner = jax.nn.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    return {
        "mlp.gate_proj.weight": before,
        "mlp.up_proj.weight": before,
        "mlp.down_proj.weight": _mean_squares(inner, valid),
    }


def _experts(mlp: SparseMLP, x: Float[Array, "B T H"], valid: Bool[Array, "B T"]) -> Squares:
    """Of few prompts an expert gets a few tokens; all see the same values, so all count there."""
    rows, before = x.reshape(-1, x.shape[-1]), _mean_squares(x, valid)
    _, chosen = choose(mlp.gate(rows), mlp.choices)
    squares = {}
    for number, expert in enumerate(mlp.experts):
        given = valid.reshape(-1) & (chosen == number).any(axis=1)
        squares[f"mlp.experts.{number}.gate_up_proj"] = before
        squares[f"mlp.experts.{number}.down_proj"] = _inner_squares(expert, rows, given)
    return squares


@jax.jit
def _inner_squares(
    expert: Expert, rows: Float[Array, "R H"], given: Bool[Array, " R"]
) -> Float[Array, " F"]:
    gate, up = jnp.split(linear(rows, expert.gate_up_proj.get_value()), 2, axis=-1)
    return _mean_squares(jax.nn.silu(gate) * up, given)


@jax.jit
def _added(mlp: text.DenseMLP | SparseMLP, normed: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
    return mlp(normed)


def _mean_squares(x: Float[Array, "*rows in"], valid: Bool[Array, "*rows"]) -> Float[Array, " in"]:
    """Over real rows; zeros without any."""
    rows, counted = x.reshape(-1, x.shape[-1]).astype(jnp.float32), valid.reshape(-1)
    squares = jnp.where(counted[:, None], jnp.square(rows), jnp.float32(0))
    return squares.sum(axis=0) / jnp.maximum(counted.sum(), 1).astype(jnp.float32)
