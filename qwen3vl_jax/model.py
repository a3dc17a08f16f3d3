"""The model as its users see it: weights on a device, logits, cached generation.

Steps run one after another, layer by layer: equal layers share one compiled program, so a new shape
compiles in the time of one layer, at the same speed as one program for the whole model
(DECISIONS.md).
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qwen3vl_jax import text
from qwen3vl_jax.buckets import bucket
from qwen3vl_jax.cache import KVCache, LayerCache, new_cache
from qwen3vl_jax.config import Config, load_config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.generation_settings import GenerationSettings, load_settings
from qwen3vl_jax.inputs import SMALLEST_TOKENS, cut, feature_count, picture_pieces, prepare
from qwen3vl_jax.network import (
    Chunk,
    Features,
    LayerStep,
    Qwen3VLNetwork,
    abstract_network,
    encode,
    extend,
    forward,
    named_arrays,
    network_from_arrays,
)

DTYPES = ("float32", "bfloat16", "float16")
PREFILL_CHUNK = 512  # tokens: fewer read the weights too often, more need more workspace


class Qwen3VL:
    """A Qwen3-VL, dense or sparse, with all its weights on the default device."""

    def __init__(
        self, config: Config, network: Qwen3VLNetwork, settings: GenerationSettings
    ) -> None:
        self.config = config
        self.network = network
        self.settings = settings
        self._steps = _flat_steps(network)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: str | None = None, vocab_blocks: int = 1
    ) -> "Qwen3VL":
        """Loads a Hugging Face directory, a converted store or an Orbax checkpoint, array by array.

        Args:
            dtype: float32, bfloat16 or float16; None keeps what config.json says.
            vocab_blocks: row blocks of the vocabulary matrices, for devices that limit the size of
            one array.

        Raises:
            ConfigError, WeightError: the checkpoint is not a complete Qwen3-VL.
            StorageError: it cannot be read.
        """
        from qwen3vl_jax.checkpoints.opening import open_checkpoint
        from qwen3vl_jax.weights import table

        config = load_config(path)
        chosen = _dtype(config.dtype if dtype is None else dtype)
        arrays = {}
        with open_checkpoint(path, config) as checkpoint:
            for entry in table(config, vocab_blocks=vocab_blocks):
                # Zero-copy when the dtype stays: the array that was read is the one XLA reads.
                read = jax.device_put(checkpoint.read(entry))
                arrays[entry.path] = read if read.dtype == chosen else read.astype(chosen)
        empty = abstract_network(config, dtype=chosen, vocab_blocks=vocab_blocks)
        return cls(config, network_from_arrays(empty, arrays), load_settings(path))

    @classmethod
    def random(
        cls, config: Config, *, dtype: str = "float32", seed: int = 0, vocab_blocks: int = 1
    ) -> "Qwen3VL":
        """Weights drawn at random, with activations of ordinary size. For tests and benchmarks."""
        chosen = _dtype(dtype)
        generator = np.random.default_rng(seed)
        empty = abstract_network(config, dtype=chosen, vocab_blocks=vocab_blocks)
        arrays = {
            path: jnp.asarray(_draw(generator, path, array.shape), chosen)
            for path, array in named_arrays(empty).items()
        }
        return cls(config, network_from_arrays(empty, arrays), GenerationSettings())

    @property
    def parameters(self) -> dict[str, Array]:
        """Every weight under its path."""
        return named_arrays(self.network)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of all weights and activations."""
        return np.dtype(self.network.language_model.norm.weight[...].dtype)

    def __call__(self, **inputs: Any) -> Float[Array, "B T V"]:
        """Scores of the next token at every position, float32; garbage at padding.

        Args:
            inputs: `input_ids` [B, T], and as in transformers `attention_mask`,
            `mm_token_type_ids`,
                `pixel_values`, `image_grid_thw`, `pixel_values_videos`, `video_grid_thw`.

        Raises:
            UsageError: arrays that do not belong together.
        """
        batch, _ = prepare(self.config, inputs)
        count = batch.tokens.input_ids.shape[1]
        tokens = cut(batch.tokens, 0, count, bucket(count, SMALLEST_TOKENS))
        return forward(self.network, dataclasses.replace(batch, tokens=tokens), self.config)[
            :, :count
        ]

    def new_cache(self, *, batch: int, capacity: int) -> KVCache:
        """An empty KV cache for `batch` rows of at least `capacity` tokens."""
        return new_cache(self.config.text, batch=batch, capacity=capacity, dtype=self.dtype)

    def encode(self, inputs: Mapping[str, Any]) -> Features | None:
        """Runs all pictures and videos of `inputs` through the vision tower; None without any.

        Raises:
            UsageError: pixels and grids that do not belong together.
        """
        count = feature_count(self.config, inputs)
        if count == 0:
            return None
        pieces = picture_pieces(self.config, inputs)
        return encode(self.network.visual, pieces, count, self.config)

    def prefill(
        self,
        inputs: Mapping[str, Any],
        cache: KVCache,
        *,
        features: Features | None = None,
        chunk_tokens: int = PREFILL_CHUNK,
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Takes in new tokens; returns the scores after each row's last real one, and the next
        cache.

        May follow earlier tokens: `inputs` then holds the new ones only. The given cache is
        consumed.

        Args:
            features: what `encode` returned for these inputs; computed here when None.
            chunk_tokens: how many tokens pass through the layers at once.

        Raises:
            UsageError: the cache has no room, or the arrays do not belong together.
        """
        batch, following = prepare(self.config, inputs, start=cache.next_position, pictures=False)
        _check_room(batch.tokens, cache)
        features = self.encode(inputs) if features is None else features
        last = _last_real(batch.tokens)
        kept = jnp.zeros((cache.batch, 1, self.config.text.hidden_size), self.dtype)
        count = batch.tokens.input_ids.shape[1]
        for first in range(0, count, chunk_tokens):
            end = min(first + chunk_tokens, count)
            x, cache = self._extend(batch.tokens, first, end, features, cache)
            here = (last >= first) & (last < end)
            kept = text.keep_last(kept, x, np.where(here, last - first, 0).astype(np.int32), here)
        return self._scores(kept), dataclasses.replace(cache, next_position=following)

    def decode(
        self, token_ids: Int[np.ndarray, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Takes in one token for each row; returns the scores of the next one, and the next cache.

        Raises:
            UsageError: the cache is full.
        """
        ids = np.asarray(token_ids, np.int32)[:, None]
        positions = np.broadcast_to(cache.next_position[None, :, None], (3, *ids.shape))
        chunk = Chunk(ids, np.ones(ids.shape, bool), positions, np.zeros(ids.shape, np.int32))
        _check_room(chunk, cache)
        x, cache = self._extend(chunk, 0, 1, None, cache)
        return self._scores(x), dataclasses.replace(cache, next_position=cache.next_position + 1)

    def generate(
        self, *, streamer: Any = None, tokenizer: Any = None, **arguments: Any
    ) -> Int[np.ndarray, "B tokens"]:
        """Continues the prompt of the inputs, as transformers' `generate` does.

        Args:
            streamer: gets the prompt, then every token; transformers' streamers fit.
            tokenizer: needed for `stop_strings` only.
            arguments: the inputs, and settings of `GenerationSettings` such as `max_new_tokens`;
                what is not given comes from the checkpoint's generation_config.json.

        Returns:
            Prompt and new tokens of every row; rows that end early are filled with padding.

        Raises:
            UsageError: a setting that does not exist or is out of range, or unfitting inputs.
        """
        from qwen3vl_jax.generation import generate, split_arguments

        inputs, given = split_arguments(arguments)
        settings = self.settings.override(**given)
        return generate(self, inputs, settings, streamer=streamer, tokenizer=tokenizer)

    def _extend(
        self, chunk: Chunk, first: int, end: int, features: Features | None, cache: KVCache
    ) -> tuple[Float[Array, "B T H"], KVCache]:
        """Runs tokens `first` to `end`, padded to a bucket where the cache has room for that."""
        tokens = end - first
        fitting = bucket(tokens, SMALLEST_TOKENS) if tokens > 1 else 1
        part = cut(chunk, first, end, min(fitting, cache.capacity - cache.length))
        start = np.int32(cache.length)
        valid = text.mark_valid(cache.valid, part.valid, start)
        x, layers = extend(
            self.network, self._steps, part, features, cache.layers, start, valid, self.config
        )
        return x, KVCache(layers, valid, cache.length + tokens, cache.next_position)

    def _scores(self, x: Float[Array, "B 1 H"]) -> Float[Array, "B V"]:
        return text.head(self.network.language_model.norm, self.network.head, x)[:, 0]


def _flat_steps(network: Qwen3VLNetwork) -> list[LayerStep]:
    """The layers as steps over flat lists of arrays: a module takes 0.5 ms a call to flatten."""
    steps: list[LayerStep] = []
    for layer in network.language_model.layers:
        leaves, tree = jax.tree.flatten(layer)
        steps.append(functools.partial(_flat_program(tree), leaves))
    return steps


@functools.cache
def _flat_program(tree: Any) -> Any:
    def flat_layer(leaves: list[Array], *arguments: Any) -> tuple[Array, LayerCache]:
        return text.cached_layer(jax.tree.unflatten(tree, leaves), *arguments)

    return jax.jit(flat_layer, donate_argnums=(1, 4))  # x and cache, as in cached_layer


def _last_real(tokens: Chunk) -> Int[np.ndarray, " B"]:
    """The column of each row's last real token."""
    columns = tokens.valid.shape[1]
    return (columns - 1 - np.argmax(tokens.valid[:, ::-1], axis=1)).astype(np.int32)


def _check_room(tokens: Chunk, cache: KVCache) -> None:
    batch, count = tokens.input_ids.shape
    if batch != cache.batch:
        raise UsageError(f"cache: made for {cache.batch} rows, but the inputs have {batch}")
    if cache.length + count > cache.capacity:
        raise UsageError(
            f"cache: {cache.length} + {count} tokens do not fit {cache.capacity} slots; "
            "make it larger with new_cache(capacity=...) or cache.grown"
        )


def _dtype(name: str) -> np.dtype:
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return np.dtype(jnp.dtype(name))


def _draw(
    generator: np.random.Generator, path: str, shape: tuple[int, ...]
) -> Float[np.ndarray, "..."]:
    """Ones for norms, zeros for biases, otherwise uniform with variance 1 / inputs."""
    if path.endswith("bias"):
        return np.zeros(shape, np.float32)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    reach = np.float32((3.0 / np.prod(shape[1:])) ** 0.5)
    return (generator.random(shape, np.float32) * 2 - 1) * reach
