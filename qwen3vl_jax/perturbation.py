"""Measures how far the logits move when matrices do: one class of them after another.

Every matrix of a class goes through a coarse codec and back; the model is run on a few prompts with
these and without. All weights are in memory, and one class of them twice.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qwen3vl_jax.calibration import inputs_of, model_in_memory
from qwen3vl_jax.checkpoints.encodings import (
    HEAD,
    TABLES,
    Encoding,
    everywhere,
    packed,
    unpacked,
    with_own_head,
)
from qwen3vl_jax.checkpoints.sensitivity import classes
from qwen3vl_jax.model import Qwen3VL
from qwen3vl_jax.network import abstract_network, network_from_arrays

CODEC = "int4:32"
Arrays = dict[str, Any]


def measured_sensitivities(
    path: Path, prompts: Sequence[str], *, dtype: str | None, say: Callable[[str], None]
) -> dict[str, float]:
    """The sensitivity of every class of matrices: logits' relative change for the weights'.

    Args:
        path: a checkpoint that is not encoded.
        prompts: what users ask; the first 8 are taken.
        dtype: of the weights; None keeps what config.json says.
        say: gets a line for each class that is done.

    Raises:
        UsageError: no prompt, or no room for the weights.
    """
    inputs, model = inputs_of(path, prompts), model_in_memory(path, dtype=dtype)
    paths = tuple(everywhere(model.config, CODEC))
    arrays = _with_own_head(model.parameters)
    wanted = _logits(model, arrays, inputs)
    found: dict[str, float] = {}
    groups = classes(paths, model.config)
    for name, members in groups.items():
        changed, moved = _moved(arrays, members)
        difference = _relative(_logits(model, arrays | changed, inputs), wanted)
        found[name] = difference / moved if moved else 0.0
        say(f"sensitivity {len(found)} of {len(groups)}, {name}: {found[name]:.3g}")
    return found


def measured_error(path: Path, store: Path, prompts: Sequence[str], *, dtype: str | None) -> float:
    """How far the logits of a store are from those of what it was made of, relative.

    Raises:
        UsageError: no prompt.
    """
    inputs, found = inputs_of(path, prompts), []
    for directory in (path, store):
        model = Qwen3VL.from_pretrained(directory, dtype=dtype)
        found.append(_scores(model, inputs))
        model.close()
        del model  # one at a time
    return _relative(found[1], found[0])


def _scores(model: Qwen3VL, inputs: dict[str, np.ndarray]) -> Float[np.ndarray, "N V"]:
    """Of all real tokens, without what is added to all of a token's: it changes no probability."""
    scores = np.asarray(model(**inputs), np.float32)[inputs["attention_mask"] > 0]
    return scores - scores.mean(axis=1, keepdims=True)


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    size = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(found - wanted)) / size if size else 0.0


def _with_own_head(parameters: Arrays) -> Arrays:
    """A tied head as an array of its own, so that it can be moved alone."""
    if any(name.startswith(HEAD) for name in parameters):
        return parameters
    rows = {n: a for n, a in parameters.items() if n.startswith(TABLES[0])}
    return parameters | {HEAD + n.removeprefix(TABLES[0]): array for n, array in rows.items()}


def _logits(
    model: Qwen3VL, arrays: Arrays, inputs: dict[str, np.ndarray]
) -> Float[np.ndarray, "N V"]:
    """Scores of the model with other weights."""
    config = with_own_head(model.config)
    rows = arrays[f"{HEAD}.0"].shape[0]
    empty = abstract_network(config, dtype=model.dtype, vocab_rows=rows)
    network = network_from_arrays(empty, arrays)
    return _scores(Qwen3VL(config, network, model.settings), inputs)


def _moved(arrays: Arrays, members: Sequence[str]) -> tuple[Arrays, float]:
    """The matrices of a class after the codec, and the root of their mean squared change."""
    changed, squares = {}, []
    for path in members:
        values = wrong = 0.0
        for name in _names(arrays, path):
            before = np.asarray(arrays[name])
            after = _through_codec(before, name)
            values += float(np.square(before.astype(np.float32)).sum(dtype=np.float64))
            gap = after.astype(np.float32) - before.astype(np.float32)
            wrong += float(np.square(gap).sum(dtype=np.float64))
            changed[name] = _placed(after)
        squares.append(wrong / values if values else 0.0)
    return changed, math.sqrt(sum(squares) / len(squares))


def _names(arrays: Arrays, path: str) -> list[str]:
    """An array, or the blocks of rows that the head is in."""
    return [path] if path in arrays else [name for name in arrays if name.startswith(f"{path}.")]


def _through_codec(values: np.ndarray, name: str) -> np.ndarray:
    encoding = Encoding(CODEC, values.shape, values.dtype.name)
    return unpacked(packed(values, name, encoding), encoding)


def _placed(values: np.ndarray) -> Array:
    return jax.device_put(jnp.asarray(values))
