"""How far the logits move when a matrix is moved: by default, or as measured on a checkpoint.

Matrices are in classes, a role in one part of the layers. The sensitivity of a class is the
relative change of the logits for a relative change of all its matrices together. Errors of
different matrices add up as squares, so each of n has 1 / sqrt(n) of it.

    {"format": "qwen3vl-sensitivity", "version": 1, "classes": {"down_proj:0-9": 0.41, "head": 1.0}}
"""

import collections
import json
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from qwen3vl_jax.checkpoints.encodings import HEAD
from qwen3vl_jax.checkpoints.safetensors_file import strict_json
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import WeightError

FILE_NAME = "sensitivity.json"
FORMAT, VERSION = "qwen3vl-sensitivity", 1
PARTS = 3  # of the layers: first, middle, last

# Of all layers together, however many. Measured: 0.15 to 0.63, head 1.6, in the checkpoint of
# examples/; 1.2 to 3.7, head 1.0, with random weights. Trained models are nearer to the first.
DEFAULTS: Mapping[str, float] = MappingProxyType(
    {
        "q_proj": 0.5,
        "k_proj": 0.5,
        "v_proj": 1.0,
        "o_proj": 1.0,
        "gate_proj": 0.6,
        "up_proj": 0.6,
        "down_proj": 1.0,
        "experts.gate_up_proj": 0.8,
        "experts.down_proj": 1.0,
        "head": 1.5,
    }
)


def role_of(path: str) -> str:
    """A key of `DEFAULTS`."""
    if path == HEAD:
        return "head"
    words = path.removesuffix(".weight").split(".")
    return f"experts.{words[-1]}" if "experts" in words else words[-1]


def class_of(path: str, config: Config) -> str:
    """The role of a matrix, and the layers of its part: "q_proj:0-9"."""
    if path == HEAD:
        return "head"
    layers, layer = config.text.num_hidden_layers, int(path.split(".layers.")[1].partition(".")[0])
    part = layer * PARTS // layers
    first, after = (-(-edge * layers // PARTS) for edge in (part, part + 1))
    return f"{role_of(path)}:{first}-{after - 1}"


def classes(paths: Iterable[str], config: Config) -> dict[str, list[str]]:
    """All matrices of every class, in the order of `paths`."""
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(class_of(path, config), []).append(path)
    return found


def of_matrices(
    paths: Iterable[str], config: Config, measured: Mapping[str, float] | None
) -> dict[str, float]:
    """The sensitivity of each matrix alone, from what was measured of classes, or by default."""
    listed = list(paths)
    if measured is None:
        counts = collections.Counter(map(role_of, listed))
        return {p: DEFAULTS[role_of(p)] / math.sqrt(counts[role_of(p)]) for p in listed}
    return {
        path: measured[name] / math.sqrt(len(members))
        for name, members in classes(listed, config).items()
        for path in members
    }


def spelled(measured: Mapping[str, float]) -> bytes:
    """The content of a sensitivity.json."""
    body = {"format": FORMAT, "version": VERSION, "classes": dict(measured)}
    return json.dumps(body, indent=1, sort_keys=True).encode() + b"\n"


def read(content: bytes, label: str, wanted: Iterable[str]) -> dict[str, float]:
    """The classes of a sensitivity.json, which must be those of the model.

    Raises:
        WeightError: it is none, or one of another model.
    """
    try:
        body = strict_json(content, label)
        found = body["classes"]
        if (body["format"], body["version"], len(body)) != (FORMAT, VERSION, 3):
            raise ValueError("another format")
        if not all(map(_is_sensitivity, found.values())):
            raise ValueError("a sensitivity that is no number from 0")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightError(f"{label} is malformed ({error}); measure with --calibrate") from error
    names = set(wanted)
    if found.keys() != names:
        odd = min(found.keys() ^ names)
        raise WeightError(f"{label}: {odd!r} is in one of model and file; measure with --calibrate")
    return {name: float(value) for name, value in found.items()}


def _is_sensitivity(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf
