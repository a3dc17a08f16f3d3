"""Takes prompts in: pictures through the vision tower, tokens through the layers in chunks.

What a prompt cache has of that, and brings faster, is not computed again.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qwen3vl_jax import text
from qwen3vl_jax.cache import KVCache
from qwen3vl_jax.cache_forms import check_room
from qwen3vl_jax.inputs import Part, cut, feature_count, last_real, parts, picture_pieces, prepare
from qwen3vl_jax.long_cache import with_room
from qwen3vl_jax.network import Chunk, Features, empty_features
from qwen3vl_jax.phases import Runner
from qwen3vl_jax.prompt_cache import Recall


def encode(model: Any, inputs: Mapping[str, Any], recall: Recall | None) -> Features | None:
    """The features of all pictures that are needed; None without any.

    Args:
        model: a `Qwen3VL`.
        recall: what a prompt cache has. Pictures of which it has the tokens are left out.

    Raises:
        UsageError: pixels and grids that do not belong together.
    """
    count = feature_count(model.config, inputs)
    if count == 0 or (recall is not None and recall.all_restored):
        return None
    features = empty_features(count, model.config, model.dtype)
    for index, piece in enumerate(picture_pieces(model.config, inputs)):
        if recall is None:
            features = model.run_phase("vision", features, piece)
        elif recall.pieces[index].needed:
            restored, features = recall.restore_piece(index, features)
            if not restored:
                features = model.run_phase("vision", features, piece)
                recall.store_piece(index, features)
    return model.runner.settle(features)


def chunk_of(cache: KVCache, runner: Runner) -> int:
    """How many tokens of a prompt pass through the layers at once, into this cache."""
    return runner.chunk_tokens if cache.chunk_tokens is None else cache.chunk_tokens


def prefill(
    model: Any,
    inputs: Mapping[str, Any],
    cache: KVCache,
    features: Features | None,
    chunk_tokens: int | None,
    recall: Recall | None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Scores after each row's last real token, and the next cache; see `Qwen3VL.prefill`."""
    batch, following = prepare(model.config, inputs, start=cache.next_position, pictures=False)
    tokens = batch.tokens
    count = tokens.input_ids.shape[1]
    check_room(len(tokens.input_ids), count, cache)
    features = encode(model, inputs, recall) if features is None else features
    kept = jnp.zeros((cache.batch, 1, model.config.text.hidden_size), model.dtype)
    size = chunk_of(cache, model.runner) if chunk_tokens is None else chunk_tokens
    cuts = tuple(parts(count, cache, size)) if recall is None else recall.parts
    for index, part in enumerate(cuts):
        cache = with_room(cache, model.runner.seal)
        if recall is not None and recall.chunks[index].restored:
            restored, cache, kept = recall.restore_chunk(index, cache, kept, features)
            if restored:
                continue
            features = encode(model, inputs, None)  # some may have been left out
        kept, cache = _extend(model, tokens, part, features, cache, kept)
        if recall is not None:
            recall.store_chunk(index, cache, kept, features)
    scores = text.scores_at(model.run_phase("scores", kept), np.int32(0))
    return scores, dataclasses.replace(cache, next_position=following)


def _extend(
    model: Any,
    chunk: Chunk,
    part: Part,
    features: Features | None,
    cache: KVCache,
    kept: Float[Array, "B 1 H"],
) -> tuple[Float[Array, "B 1 H"], KVCache]:
    """Runs a part of the prompt through the layers."""
    new, here = cut(chunk, part.first, part.end, part.tokens), part.ends(chunk)
    kept, layers, valid = model.run_phase(
        "prefill",
        model.runner.embed(new.input_ids),
        new.positions,
        new.feature_rows,
        features,
        *cache.parts,
        new.valid,
        np.array(cache.length, np.int32),
        kept,
        np.where(here, last_real(chunk) - part.first, 0).astype(np.int32),
        here,
        blocks=cache.full is not None,
    )
    return kept, cache.after(part.end - part.first, layers, valid)
