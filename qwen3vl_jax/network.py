"""The whole network and its forward pass, as calls of the steps in `vision` and `text`.

Array names are pytree paths, which are the checkpoint's tensor names without the leading `model.`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from qwen3vl_jax import text, vision
from qwen3vl_jax.arrays import AnyArray, Leaf
from qwen3vl_jax.config import Config
from qwen3vl_jax.frames import Piece
from qwen3vl_jax.layer_steps import WHOLE_LAYERS, Granularity, forward_layer
from qwen3vl_jax.layers import ShapesOnly
from qwen3vl_jax.weights import Rows


class Qwen3VLNetwork(nnx.Module):
    """All weights; nothing else. A tied model has no `lm_head`: the embedding is its head."""

    def __init__(
        self, config: Config, *, dtype: DTypeLike, rngs: nnx.Rngs, vocab_rows: Rows = None
    ) -> None:
        make = functools.partial(
            text.VocabularyMatrix, config.text, vocab_rows=vocab_rows, dtype=dtype, rngs=rngs
        )
        self.visual = vision.VisionTower(config.vision, dtype=dtype, rngs=rngs)
        self.language_model = text.Decoder(
            config.text, vocab_rows=vocab_rows, dtype=dtype, rngs=rngs
        )
        self.lm_head = None if config.tie_word_embeddings else make()

    @property
    def head(self) -> text.VocabularyMatrix:
        """The matrix that scores the vocabulary."""
        return self.language_model.embed_tokens if self.lm_head is None else self.lm_head


def abstract_network(
    config: Config, *, dtype: DTypeLike, vocab_rows: Rows = None
) -> Qwen3VLNetwork:
    """Shapes and dtypes of all weights, with no memory behind them."""
    return nnx.eval_shape(
        lambda: Qwen3VLNetwork(config, dtype=dtype, rngs=ShapesOnly(), vocab_rows=vocab_rows)
    )


def named_arrays(network: Qwen3VLNetwork) -> dict[str, Any]:
    """Every array, or shape of an abstract network, under its path, in a fixed order."""
    flat = nnx.to_flat_state(nnx.state(network, nnx.Param))
    return {".".join(map(str, path)): param.get_value() for path, param in flat}


def network_from_arrays(network: Qwen3VLNetwork, arrays: Mapping[str, Any]) -> Qwen3VLNetwork:
    """The (abstract) `network` with `arrays` in the place of its own; every path must be given."""
    graph, state = nnx.split(network)
    filled = [
        (path, param.replace(arrays[".".join(map(str, path))]))
        for path, param in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["tokens", "deepstack"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, slots=True)
class Features:
    """What the vision tower says of all pictures: tokens, and one more set per DeepStack block."""

    tokens: Float[Leaf, "rows H"]
    deepstack: tuple[Float[Leaf, "rows H"], ...]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["input_ids", "valid", "positions", "feature_rows"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens, and what the decoder reads beside them.

    `feature_rows` holds, at every placeholder, the row of its vision token among all features, and
    a number past the end elsewhere.
    """

    input_ids: Int[AnyArray, "B T"]
    valid: Bool[AnyArray, "B T"]
    positions: Int[AnyArray, "3 B T"]
    feature_rows: Int[AnyArray, "B T"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "pieces"],
    meta_fields=["feature_count"],
)
@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Everything a forward pass reads, prepared on the host by `inputs.prepare`.

    `feature_count` is the number of vision tokens of all `pieces`, rounded up to a bucket; 0
    without pictures.
    """

    tokens: Chunk
    pieces: tuple[Piece, ...]
    feature_count: int


@functools.partial(jax.jit, donate_argnames="rows")
def collect(
    rows: Float[Array, "rows H"],
    piece: Float[Array, "F tokens H"],
    token_rows: Int[Array, "F tokens"],
) -> Float[Array, "rows H"]:
    """Step: puts the tokens of a piece in their rows; padding goes nowhere."""
    return rows.at[token_rows].set(piece, mode="drop")


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def empty_rows(*, shape: tuple[int, int], dtype: DTypeLike) -> Float[Array, "rows H"]:
    """Step: a fresh array of zeros."""
    return jnp.zeros(shape, dtype)


def empty_features(feature_count: int, config: Config, dtype: DTypeLike) -> Features:
    """Zeros, for `encode_piece` to fill."""
    shape = (feature_count, config.text.hidden_size)
    sets = [
        empty_rows(shape=shape, dtype=jnp.dtype(dtype))
        for _ in range(1 + len(config.vision.deepstack_visual_indexes))
    ]
    return Features(sets[0], tuple(sets[1:]))


def encode_piece(
    tower: vision.VisionTower, features: Features, piece: Piece, config: Config
) -> Features:
    """Runs one piece through the vision tower; its tokens go to their rows of the features."""
    tokens, deepstack = vision.encode_frames(tower, piece, config.vision)
    return Features(
        collect(features.tokens, tokens, piece.token_rows),
        tuple(
            collect(rows, part, piece.token_rows)
            for rows, part in zip(features.deepstack, deepstack, strict=True)
        ),
    )


def encode(
    tower: vision.VisionTower, pieces: Iterable[Piece], feature_count: int, config: Config
) -> Features:
    """Runs all pieces through the vision tower."""
    dtype = tower.pos_embed.weight[...].dtype
    features = empty_features(feature_count, config, dtype)
    for piece in pieces:
        features = encode_piece(tower, features, piece, config)
    return features


def forward(network: Qwen3VLNetwork, batch: Batch, config: Config) -> Float[Array, "B T V"]:
    """Scores at every position, float32. Differentiable for dense models; works under one jit.

    The steps are the same as in cached generation, so this is also its reference.
    """
    tokens, count = batch.tokens, batch.feature_count
    features = encode(network.visual, batch.pieces, count, config) if count else None
    decoder = network.language_model
    x = text.embed_tokens(decoder.embed_tokens, tokens.input_ids)
    positions, rows, valid = tokens.positions, tokens.feature_rows, tokens.valid
    x = decode_whole(decoder.layers, x, positions, rows, features, valid, config, WHOLE_LAYERS)
    return text.head(decoder.norm, network.head, x)


def decode_whole(
    layers: text.Layers,
    x: Float[Array, "B T H"],
    positions: Int[AnyArray, "3 B T"],
    feature_rows: Int[AnyArray, "B T"],
    features: Features | None,
    valid: Bool[AnyArray, "B T"],
    config: Config,
    granularity: Granularity,
) -> Float[Array, "B T H"]:
    """Runs embeddings through all layers, without a cache."""

    def forward(index: int, x: Float[Array, "B T H"], cos: Any, sin: Any) -> Float[Array, "B T H"]:
        return forward_layer(layers[index], x, cos, sin, valid, granularity)

    return through_layers(forward, len(layers), x, positions, feature_rows, features, config)


def through_layers(
    layer: Callable[[int, Array, Array, Array], Array],
    count: int,
    x: Float[Array, "B T H"],
    positions: Int[AnyArray, "3 B T"],
    feature_rows: Int[AnyArray, "B T"] | None,
    features: Features | None,
    config: Config,
) -> Float[Array, "B T H"]:
    """Puts vision tokens among embeddings, and takes all through `count` layers.

    Args:
        layer: `layer(index, x, cos, sin)` is x after one layer.
        features: None if no placeholder is among the tokens.
    """
    if features is not None:
        x = text.place_features(x, features.tokens, feature_rows)
    cos, sin = text.text_angles(positions, rope=config.text.rope, head_dim=config.text.head_dim)
    for index in range(count):
        x = layer(index, x, cos, sin)
        if features is not None and index < len(features.deepstack):
            x = text.add_features(x, features.deepstack[index], feature_rows)
    return x
