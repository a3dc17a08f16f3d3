"""The decoder: embedding, layers, head. Every function here that is jitted is one step.

Letters: B rows of the batch, T tokens, H hidden, N query heads, K key heads, D values of a head,
S slots of the cache, V vocabulary.

Source: transformers 5.23, `modeling_qwen3_vl.py`, classes Qwen3VLText*.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from qwen3vl_jax.arrays import AnyArray
from qwen3vl_jax.attention import attention
from qwen3vl_jax.cache import LayerCache, write
from qwen3vl_jax.cache_attention import cached_attention
from qwen3vl_jax.config import RopeConfig, TextConfig
from qwen3vl_jax.encoded import Encoded
from qwen3vl_jax.layers import Linear, RMSNorm, cut, normal
from qwen3vl_jax.linear import linear
from qwen3vl_jax.moe import SparseMLP
from qwen3vl_jax.rope import rotate, text_rotation
from qwen3vl_jax.weights import Rows, row_blocks


class VocabularyMatrix(nnx.Module):
    """[V, H] as a list of row blocks: no device need hold an array larger than it allows."""

    def __init__(
        self, config: TextConfig, *, vocab_rows: Rows, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        scale = config.hidden_size**-0.5

        def block(rows: int) -> nnx.Param[Array]:
            values = normal(rngs, rows, config.hidden_size) * scale
            return nnx.Param(values.astype(dtype))

        blocks = row_blocks(config.vocab_size, vocab_rows)
        self.weight = nnx.List([block(stop - first) for first, stop in blocks])

    def rows(self, ids: Int[Array, "B T"]) -> Float[Array, "B T H"]:
        """The rows of `ids`."""
        first, found = 0, jnp.zeros((), self.weight[0].dtype)
        for param in self.weight:
            block = param[...]
            inside = (ids >= first) & (ids < first + block.shape[0])
            part = block[jnp.clip(ids - first, 0, block.shape[0] - 1)]
            found = jnp.where(inside[:, :, None], part, found) if first else part
            first += block.shape[0]
        return found


class Attention(nnx.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, config: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        make = functools.partial(Linear, bias=config.attention_bias, dtype=dtype, rngs=rngs)
        norm = functools.partial(RMSNorm, config.head_dim, eps=config.rms_norm_eps, dtype=dtype)
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj, self.o_proj = (
            make(config.hidden_size, queries),
            make(queries, config.hidden_size),
        )
        self.k_proj, self.v_proj = make(config.hidden_size, keys), make(config.hidden_size, keys)
        self.q_norm, self.k_norm = norm(), norm()
        self.head_dim = config.head_dim

    def project(
        self, x: Float[Array, "B T H"], cos: Float[Array, "B T D"], sin: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B N T D"], Float[Array, "BK T D"], Float[Array, "BK T D"]]:
        """Rotated queries and keys, and values. The norms come before the rotation."""
        batch, tokens, _ = x.shape
        cos, sin = cos[:, None].astype(x.dtype), sin[:, None].astype(x.dtype)
        heads = [
            proj(x).reshape(batch, tokens, -1, self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        ]
        queries, keys = self.q_norm(heads[0]), self.k_norm(heads[1])
        queries, keys, values = (part.transpose(0, 2, 1, 3) for part in (queries, keys, heads[2]))
        queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
        rows = (-1, tokens, self.head_dim)
        return queries, keys.reshape(rows), values.reshape(rows)

    def combine(self, mixed: Float[Array, "B N T D"]) -> Float[Array, "B T H"]:
        """Joins the heads."""
        batch, _, tokens, _ = mixed.shape
        return self.o_proj(mixed.transpose(0, 2, 1, 3).reshape(batch, tokens, -1))


class DenseMLP(nnx.Module):
    """down(silu(gate) * up)."""

    def __init__(self, config: TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        make = functools.partial(Linear, bias=False, dtype=dtype, rngs=rngs)
        self.gate_proj = make(config.hidden_size, config.intermediate_size)
        self.up_proj = make(config.hidden_size, config.intermediate_size)
        self.down_proj = make(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        x = cut(x)
        gate = cut(self.gate_proj(x))
        return self.down_proj(cut(jax.nn.silu(gate) * self.up_proj(x)))


class DecoderLayer(nnx.Module):
    """One pre-norm layer, dense or sparse."""

    def __init__(self, config: TextConfig, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        norm = functools.partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        mlp = SparseMLP if config.is_sparse(index) else DenseMLP
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp = mlp(config, dtype=dtype, rngs=rngs)

    def finish(
        self, x: Float[Array, "B T H"], mixed: Float[Array, "B N T D"]
    ) -> Float[Array, "B T H"]:
        """All that follows the softmax. `layer_steps.finish_layer` is the same as steps."""
        x = cut(x + self.self_attn.combine(mixed))
        return x + self.mlp(self.post_attention_layernorm(x))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["structure"]
)
@dataclasses.dataclass(frozen=True, slots=True)
class FlatLayer:
    """A decoder layer as a flat list of arrays: jit looks through it in 5 us, not in 40 to 500."""

    arrays: tuple[Array, ...]
    structure: Any

    def module(self) -> DecoderLayer:
        """The layer again."""
        return jax.tree.unflatten(self.structure, self.arrays)


Layers = Sequence[DecoderLayer | FlatLayer]


class Decoder(nnx.Module):
    """All weights under `language_model.`"""

    def __init__(
        self, config: TextConfig, *, vocab_rows: Rows, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.embed_tokens = VocabularyMatrix(config, vocab_rows=vocab_rows, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [
                DecoderLayer(config, index, dtype=dtype, rngs=rngs)
                for index in range(config.num_hidden_layers)
            ]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)


def flat_layers(layers: Sequence[DecoderLayer]) -> tuple[FlatLayer, ...]:
    """The layers in their flat form. Equal structures are one object, so jit finds them at once."""
    known: dict[Any, Any] = {}
    flat = []
    for layer in layers:
        arrays, structure = jax.tree.flatten(layer)
        flat.append(FlatLayer(tuple(arrays), known.setdefault(structure, structure)))
    return tuple(flat)


def module_of(layer: DecoderLayer | FlatLayer) -> DecoderLayer:
    """The layer as a module."""
    return layer.module() if isinstance(layer, FlatLayer) else layer


@jax.jit
def embed_tokens(table: VocabularyMatrix, ids: Int[Array, "B T"]) -> Float[Array, "B T H"]:
    """Step: embeddings of the tokens."""
    return table.rows(ids)


@functools.partial(jax.jit, donate_argnames="x")
def place_features(
    x: Float[Array, "B T H"], features: Float[Array, "rows H"], rows: Int[Array, "B T"]
) -> Float[Array, "B T H"]:
    """Step: puts vision tokens where `rows` names one; other tokens have a row past the end."""
    chosen = features[jnp.clip(rows, 0, features.shape[0] - 1)].astype(x.dtype)
    return jnp.where((rows < features.shape[0])[:, :, None], chosen, x)


@functools.partial(jax.jit, donate_argnames="x")
def add_features(
    x: Float[Array, "B T H"], features: Float[Array, "rows H"], rows: Int[Array, "B T"]
) -> Float[Array, "B T H"]:
    """Step: adds DeepStack features to the vision tokens, after a whole decoder layer."""
    chosen = features[jnp.clip(rows, 0, features.shape[0] - 1)].astype(x.dtype)
    return jnp.where((rows < features.shape[0])[:, :, None], x + chosen, x)


@functools.partial(jax.jit, static_argnames=("rope", "head_dim"))
def text_angles(
    positions: Int[Array, "3 B T"], *, rope: RopeConfig, head_dim: int
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """Step: cos and sin of every token, float32."""
    return text_rotation(positions, rope, head_dim)


@jax.jit
def decoder_layer(
    layer: DecoderLayer | FlatLayer,
    x: Float[Array, "B T H"],
    cos: Float[Array, "B T D"],
    sin: Float[Array, "B T D"],
    valid: Bool[Array, "B T"],
) -> Float[Array, "B T H"]:
    """Step: one layer without a cache. The mask follows the sequence, never the positions."""
    layer = module_of(layer)
    queries, keys, values = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
    last_key = jnp.arange(x.shape[1], dtype=jnp.int32)
    return layer.finish(x, attention(queries, keys, values, last_key, valid))


@functools.partial(jax.jit, donate_argnames=("x", "cache"))
def cached_layer(
    layer: DecoderLayer | FlatLayer,
    x: Float[Array, "B T H"],
    cos: Float[Array, "B T D"],
    sin: Float[Array, "B T D"],
    cache: LayerCache,
    start: Int[Array, ""],
    valid: Bool[Array, "B S"],
) -> tuple[Float[Array, "B T H"], LayerCache]:
    """Step: one layer over T new tokens; keys and values go to the slots from `start` on."""
    layer = module_of(layer)
    queries, keys, values = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
    cache = write(cache, keys, values, start)
    last_key = start + jnp.arange(x.shape[1], dtype=jnp.int32)
    mixed = cached_attention(queries, cache, last_key, valid)
    return layer.finish(x, mixed), cache


@jax.jit
def final_norm(norm: RMSNorm, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
    """Step: what the head reads."""
    return norm(x)


@jax.jit
def score_block(
    weight: Float[Array, "rows H"] | Encoded, x: Float[Array, "B T H"]
) -> Float[Array, "B T rows"]:
    """Step: scores of one block of the vocabulary, computed in the model's dtype, in float32."""
    return linear(x, weight).astype(jnp.float32)


@jax.jit
def join_scores(blocks: Sequence[Float[Array, "B T _"]]) -> Float[Array, "B T V"]:
    """Step: scores of the whole vocabulary."""
    return jnp.concatenate(blocks, axis=-1)


def head(norm: RMSNorm, table: VocabularyMatrix, x: Float[Array, "B T H"]) -> Float[Array, "B T V"]:
    """Scores of the next token, float32; one block of the vocabulary matrix is read at a time."""
    x = final_norm(norm, x)
    blocks = [score_block(param.get_value(), x) for param in table.weight]
    return blocks[0] if len(blocks) == 1 else join_scores(blocks)


@jax.jit
def head_at_once(
    norm: RMSNorm, table: VocabularyMatrix, x: Float[Array, "B T H"]
) -> Float[Array, "B T V"]:
    """Step: the same as `head`, in one. To wait for every block costs 0.1 ms."""
    x = cut(norm(x))
    blocks = [cut(linear(x, param.get_value()).astype(jnp.float32)) for param in table.weight]
    return jnp.concatenate(blocks, axis=-1)


@jax.jit
def scores_at(scores: Float[Array, "B T V"], index: Int[AnyArray, ""]) -> Float[Array, "B V"]:
    """Step: the scores after token `index` of T."""
    return jax.lax.dynamic_index_in_dim(scores, index, axis=1, keepdims=False)


@functools.partial(jax.jit, donate_argnames="valid")
def mark_valid(
    valid: Bool[Array, "B S"], new: Bool[Array, "B T"], start: Int[Array, ""]
) -> Bool[Array, "B S"]:
    """Step: notes which of the T slots from `start` on hold real tokens."""
    return jax.lax.dynamic_update_slice(valid, new, (jnp.int32(0), start))


@functools.partial(jax.jit, donate_argnames="valid")
def forget_from(valid: Bool[Array, "B S"], length: Int[AnyArray, ""]) -> Bool[Array, "B S"]:
    """Step: no slot from `length` on holds a real token any more."""
    return valid & (jnp.arange(valid.shape[1], dtype=jnp.int32) < length)[None]


@functools.partial(jax.jit, donate_argnames="kept")
def keep_last(
    kept: Float[Array, "B 1 H"],
    x: Float[Array, "B T H"],
    place: Int[Array, " B"],
    chosen: Bool[Array, " B"],
) -> Float[Array, "B 1 H"]:
    """Step: row b becomes token `place[b]` of `x` where `chosen`, else stays as kept."""
    picked = jnp.take_along_axis(x, place[:, None, None], axis=1)
    return jnp.where(chosen[:, None, None], picked, kept)
