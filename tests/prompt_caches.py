"""Models with a prompt cache in tests: what they are warned of, what they answer and restore."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tiny

from qwen3vl_jax import Qwen3VL
from qwen3vl_jax.planned.recalling import keep_prompts
from qwen3vl_jax.prompt_cache import PromptCache
from qwen3vl_jax.prompt_items import Item


class Told(list[str]):
    """Warnings."""

    def __call__(self, line: str) -> None:
        self.append(line)


def keeping(model: Qwen3VL, folder: Path, path: Path = tiny.DATA / "dense", **more: Any) -> Told:
    """Gives a model a prompt cache; what it is warned of."""
    told = Told()
    keep_prompts(model, path, folder, warn=told, **more)
    return told


def kept(model: Qwen3VL) -> PromptCache:
    """The prompt cache of a model that has one."""
    assert model.prompt_cache is not None
    return model.prompt_cache


def parts(model: Qwen3VL) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Chunks and pictures of the newest request."""
    latest = kept(model).latest
    assert latest is not None
    return latest.chunks, latest.pieces


def bits(model: Qwen3VL, inputs: Mapping[str, np.ndarray], **form: Any) -> list[bytes]:
    """Scores after the prompt and after each of two greedy tokens."""
    batch, length = inputs["input_ids"].shape
    cache = model.new_cache(batch=batch, capacity=length + 8, **form)
    recall = model.recall(inputs, cache)
    features = model.encode(inputs, recall=recall)
    scores, cache = model.prefill(inputs, cache, features=features, recall=recall)
    found = [np.asarray(scores)]
    for _ in range(2):
        scores, cache = model.decode(found[-1].argmax(-1).astype(np.int32), cache)
        found.append(np.asarray(scores))
    return [scores.tobytes() for scores in found]
