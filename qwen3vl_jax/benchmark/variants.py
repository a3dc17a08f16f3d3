"""The same model with weights in a codec, or with an encoded cache, and how far its scores move."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from qwen3vl_jax.checkpoints.encodings import (
    as_encoded,
    encoding_of,
    encodings_of,
    everywhere,
    origin,
    packed,
)
from qwen3vl_jax.model import Qwen3VL
from qwen3vl_jax.network import abstract_network, network_from_arrays
from qwen3vl_jax.parameters import as_weight
from qwen3vl_jax.phases import Direct
from qwen3vl_jax.weights import table

TRIAL_TOKENS = 64  # after the prompt, whose scores are compared


@dataclasses.dataclass(frozen=True, slots=True)
class Distance:
    """Between scores of two models, means over positions.

    Attributes:
        cosine: what is equal for all tokens is left out.
        kl: of the second's distribution from the first's, in nats.
    """

    cosine: float
    kl: float


def with_codec(model: Qwen3VL, codec: str) -> Qwen3VL:
    """The model with decoder layers and head encoded; all else is shared.

    Raises:
        memsched.errors.ProgramError: a codec that does not exist.
        UsageError: one that makes nothing smaller.
    """
    raw, config = model.parameters, model.config
    found = encodings_of(config, everywhere(config, codec), lambda entry: model.dtype)
    running, rows = as_encoded(config, found), config.text.vocab_size
    arrays: dict[str, Any] = {}
    for entry in table(running, vocab_rows=rows):
        values, encoding = raw[origin(entry, config).path], encoding_of(entry, found)
        if encoding is not None:
            resting = jax.device_put(packed(np.asarray(values), entry.path, encoding))
            values = as_weight(resting, encoding)
        arrays[entry.path] = values
    empty = abstract_network(running, dtype=model.dtype, vocab_rows=rows)
    return Qwen3VL(running, network_from_arrays(empty, arrays), model.settings)


def with_cache(model: Qwen3VL, kv: str) -> Qwen3VL:
    """The model with the same weights, and caches that are stored as `kv` says."""
    runner = Direct(model.network, kv=kv)
    return Qwen3VL(model.config, model.network, model.settings, runner=runner)


def trial_scores(
    model: Qwen3VL, inputs: Mapping[str, np.ndarray], *, seed: int
) -> Float[np.ndarray, "T V"]:
    """Scores after each of some random tokens that follow the prompt, read from the cache."""
    marks = (model.config.image_token_id, model.config.video_token_id)
    ordinary = np.setdiff1d(np.arange(model.config.text.vocab_size), marks)
    tokens = np.random.default_rng(seed).choice(ordinary, (1, TRIAL_TOKENS)).astype(np.int32)
    capacity = inputs["input_ids"].shape[1] + TRIAL_TOKENS
    _, cache = model.prefill(inputs, model.new_cache(batch=1, capacity=capacity))
    return np.asarray(model.verify(tokens, cache)[0])[0]


def distance(raw: Float[np.ndarray, "T V"], other: Float[np.ndarray, "T V"]) -> Distance:
    """How far scores moved."""
    pairs = [_row_distance(*pair) for pair in zip(raw, other, strict=True)]
    return Distance(*np.mean(pairs, axis=0).tolist())


def _row_distance(one: Float[np.ndarray, " V"], other: Float[np.ndarray, " V"]) -> Sequence[float]:
    one, other = (scores.astype(np.float64) - scores.mean(dtype=float) for scores in (one, other))
    cosine = one @ other / (np.linalg.norm(one) * np.linalg.norm(other))
    logs = [scores - np.logaddexp.reduce(scores) for scores in (one, other)]
    return float(cosine), float(np.exp(logs[0]) @ (logs[0] - logs[1]))
