"""The phases of a model: pure functions of weights and arrays, and who carries them out.

Every computation in a phase is a call of a jitted step, what it updates in place it returns at the
same place, and it is given embeddings, not token ids: rows of the embedding table are looked up
outside. So a phase can be traced, planned and run as a whole; `Direct` just calls it.

Letters are those of `text`.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qwen3vl_jax import text, vision
from qwen3vl_jax.arrays import AnyArray
from qwen3vl_jax.buckets import PREFILL_CHUNK
from qwen3vl_jax.cache import CacheForm, LayerCache
from qwen3vl_jax.cache_rows import Blocks, row_dtype
from qwen3vl_jax.config import Config
from qwen3vl_jax.frames import Piece
from qwen3vl_jax.layer_steps import WHOLE_LAYERS, Granularity, extend_layer
from qwen3vl_jax.layers import RMSNorm
from qwen3vl_jax.network import (
    Features,
    Qwen3VLNetwork,
    decode_whole,
    encode_piece,
    named_arrays,
    through_layers,
)

Caches = tuple[LayerCache, ...]


def encode_phase(
    visual: vision.VisionTower, features: Features, piece: Piece, *, config: Config
) -> Features:
    """Puts the tokens of equally sized frames into their rows of the features.

    `features` is updated.
    """
    return encode_piece(visual, features, piece, config)


def extend_phase(
    layers: text.Layers,
    x: Float[Array, "B T H"],
    positions: Int[AnyArray, "3 B T"],
    feature_rows: Int[AnyArray, "B T"],
    features: Features | None,
    cache: Caches,
    valid: Bool[Array, "B S"],
    new_valid: Bool[AnyArray, "B T"],
    start: Int[AnyArray, ""],
    kept: Float[Array, "B 1 H"],
    place: Int[AnyArray, " B"],
    here: Bool[AnyArray, " B"],
    *,
    config: Config,
    granularity: Granularity = WHOLE_LAYERS,
) -> tuple[Float[Array, "B 1 H"], Caches, Bool[Array, "B S"]]:
    """Takes T new tokens of a prompt into the cache, from slot `start` on.

    `kept`, `cache` and `valid` are updated; `x` is consumed.

    Args:
        features: None when no placeholder can be among the tokens.
        new_valid: which of the new tokens are real.
        kept: hidden values of each row's last token; row b becomes token `place[b]` where `here`.
    """
    valid = text.mark_valid(valid, new_valid, start)
    x, cache = _extend(
        layers, x, positions, feature_rows, features, cache, valid, start, config, granularity
    )
    return text.keep_last(kept, x, place, here), cache, valid


def decode_phase(
    layers: text.Layers,
    norm: RMSNorm,
    head: text.VocabularyMatrix,
    x: Float[Array, "B T H"],
    positions: Int[AnyArray, "3 B T"],
    cache: Caches,
    valid: Bool[Array, "B S"],
    new_valid: Bool[AnyArray, "B T"],
    start: Int[AnyArray, ""],
    *,
    config: Config,
    granularity: Granularity = WHOLE_LAYERS,
) -> tuple[Float[Array, "B T V"], Caches, Bool[Array, "B S"]]:
    """Takes in T new tokens, one or some on trial; scores of the next token after each, float32.

    `cache` and `valid` are updated; `x` is consumed.
    """
    valid = text.mark_valid(valid, new_valid, start)
    x, cache = _extend(layers, x, positions, None, None, cache, valid, start, config, granularity)
    return _scores(norm, head, x, granularity), cache, valid


def scores_phase(
    norm: RMSNorm,
    head: text.VocabularyMatrix,
    kept: Float[Array, "B 1 H"],
    *,
    granularity: Granularity = WHOLE_LAYERS,
) -> Float[Array, "B 1 V"]:
    """Scores of the token after a prompt, float32."""
    return _scores(norm, head, kept, granularity)


def forward_phase(
    layers: text.Layers,
    norm: RMSNorm,
    head: text.VocabularyMatrix,
    x: Float[Array, "B T H"],
    positions: Int[AnyArray, "3 B T"],
    feature_rows: Int[AnyArray, "B T"],
    features: Features | None,
    valid: Bool[AnyArray, "B T"],
    *,
    config: Config,
    granularity: Granularity = WHOLE_LAYERS,
) -> Float[Array, "B T V"]:
    """Scores at every position without a cache, float32."""
    x = decode_whole(layers, x, positions, feature_rows, features, valid, config, granularity)
    return _scores(norm, head, x, granularity)


def _scores(
    norm: RMSNorm,
    head: text.VocabularyMatrix,
    x: Float[Array, "B T H"],
    granularity: Granularity,
) -> Float[Array, "B T V"]:
    """The head as finely cut as the layers: in one step, or block by block."""
    in_steps = text.head_at_once if granularity == WHOLE_LAYERS else text.head
    return in_steps(norm, head, x)


def _extend(
    layers: text.Layers,
    x: Float[Array, "B T H"],
    positions: Int[AnyArray, "3 B T"],
    feature_rows: Int[AnyArray, "B T"] | None,
    features: Features | None,
    cache: Caches,
    valid: Bool[Array, "B S"],
    start: Int[AnyArray, ""],
    config: Config,
    granularity: Granularity,
) -> tuple[Float[Array, "B T H"], Caches]:
    """Runs T new tokens through all layers on top of a cache."""
    written = list(cache)

    def extend(index: int, x: Float[Array, "B T H"], cos: Any, sin: Any) -> Float[Array, "B T H"]:
        x, written[index] = extend_layer(
            layers[index], x, cos, sin, cache[index], start, valid, granularity
        )
        return x

    x = through_layers(extend, len(cache), x, positions, feature_rows, features, config)
    return x, tuple(written)


@dataclasses.dataclass(frozen=True, slots=True)
class Phase:
    """A phase as a planner needs to know it: `function(*parts of the network, *arrays)`.

    Attributes:
        weights: where the parts that it takes first are in the network, as paths.
        arrays: name and kind of every further argument. Kinds: "input" and "embedding" are for
            this call only, "cache" stays from call to call, a "feature" is read by several.
    """

    name: str
    function: Callable[..., Any]
    weights: tuple[str, ...]
    arrays: Mapping[str, str]


def phases(config: Config, granularity: Granularity = WHOLE_LAYERS) -> dict[str, Phase]:
    """All phases of a model, by name. "verify" is "decode" for several tokens at once.

    Args:
        granularity: how finely layers are cut into steps; it changes no phase's result.
    """
    head = "language_model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    scoring = ("language_model.norm", head)
    decoding = ("language_model.layers", *scoring)
    tokens = {"x": "embedding", "positions": "input"}
    pictures = {"feature_rows": "input", "features": "feature"}
    cached = {"cache": "cache", "valid": "input", "new_valid": "input", "start": "input"}
    kept = {"kept": "input", "place": "input", "here": "input"}
    bound = functools.partial
    decode = bound(decode_phase, config=config, granularity=granularity)
    found = (
        Phase(
            "vision",
            bound(encode_phase, config=config),
            ("visual",),
            {"features": "input", "piece": "input"},
        ),
        Phase(
            "prefill",
            bound(extend_phase, config=config, granularity=granularity),
            ("language_model.layers",),
            {**tokens, **pictures, **cached, **kept},
        ),
        Phase("decode", decode, decoding, {**tokens, **cached}),
        Phase("verify", decode, decoding, {**tokens, **cached}),
        Phase("scores", bound(scores_phase, granularity=granularity), scoring, {"kept": "input"}),
        Phase(
            "forward",
            bound(forward_phase, config=config, granularity=granularity),
            decoding,
            {**tokens, **pictures, "valid": "input"},
        ),
    )
    return {phase.name: phase for phase in found}


@runtime_checkable
class Runner(Protocol):
    """Has the weights, wherever they rest, and carries out phases.

    `chunk_tokens` is how many tokens of a prompt should pass through the layers at once.
    """

    chunk_tokens: int

    def expect(self, batch: int, capacity: int, prompt_tokens: int | None = None) -> CacheForm:
        """Says that a KV cache of at least this size is about to be made; returns of what form.

        `prompt_tokens` are those of each row that it is about to get; None: nobody knows.
        """

    def seal(self, name: str, block: Blocks) -> tuple[Any, Blocks]:
        """Takes a full block: returns what phases shall get of it, and an array for the next."""

    def settle(self, features: Features) -> Features:
        """Takes what the vision tower said: returns what phases shall get of it."""

    def embed(self, token_ids: Int[AnyArray, "B T"]) -> Float[Array, "B T H"]:
        """The rows of the embedding table: new arrays, which a phase may consume."""

    def run(self, phase: Phase, *arrays: Any) -> Any:
        """What the phase's function returns for its weights and these arrays.

        Updated arrays are consumed.
        """

    def wait(self) -> None:
        """Returns when all weights that rest in memory are there."""

    def close(self) -> None:
        """Gives back what it holds beyond the weights' own memory."""


class Direct:
    """The plain `Runner`: all weights on the default device, every phase called as it is."""

    def __init__(
        self, network: Qwen3VLNetwork, *, kv: str = "raw", chunk_tokens: int = PREFILL_CHUNK
    ) -> None:
        """`kv` is how caches are stored: raw or int8."""
        self.chunk_tokens = chunk_tokens
        self._network = network
        self._rows = row_dtype(kv, network.language_model.norm.weight.get_value().dtype)
        self._layers = text.flat_layers(network.language_model.layers)

    def expect(self, batch: int, capacity: int, prompt_tokens: int | None = None) -> CacheForm:
        """Nothing is reserved, and no cache is cut into blocks."""
        return CacheForm(batch, capacity, self._rows)

    def seal(self, name: str, block: Blocks) -> tuple[Any, Blocks]:
        """The block stays where it is."""
        return block, jnp.zeros_like(block)

    def settle(self, features: Features) -> Features:
        """They stay where they are."""
        return features

    def embed(self, token_ids: Int[AnyArray, "B T"]) -> Float[Array, "B T H"]:
        """One step."""
        return text.embed_tokens(self._network.language_model.embed_tokens, token_ids)

    def run(self, phase: Phase, *arrays: Any) -> Any:
        """Calls the steps one after another."""
        return phase.function(*map(self._part, phase.weights), *arrays)

    def wait(self) -> None:
        """Waits for copies that JAX has under way."""
        jax.block_until_ready(named_arrays(self._network))

    def close(self) -> None:
        """Nothing is held."""

    def _part(self, path: str) -> Any:
        # Flat layers are the same weights in a form that costs less to call.
        if path == "language_model.layers":
            return self._layers
        return part(self._network, path)


def part(network: Qwen3VLNetwork, path: str) -> Any:
    """The part of a network at a path of `Phase.weights`."""
    return operator.attrgetter(path)(network)
