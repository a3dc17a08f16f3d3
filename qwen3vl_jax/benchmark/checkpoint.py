"""A Hugging Face directory from arrays in memory, so that loading can be timed."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.weights import Entry, table

SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def shrunk_values(values: Mapping[str, Any], config: Config, dtype: str) -> dict[str, Any]:
    """A config.json with the layer counts of `config` and the dtype of its arrays."""
    text, vision = dict(values["text_config"]), dict(values["vision_config"])
    text["num_hidden_layers"] = config.text.num_hidden_layers
    text["dtype"] = dtype
    if config.text.num_experts:
        text["mlp_only_layers"] = list(config.text.mlp_only_layers)
    vision["depth"] = config.vision.depth
    vision["deepstack_visual_indexes"] = list(config.vision.deepstack_visual_indexes)
    return {**values, "text_config": text, "vision_config": vision, "dtype": dtype}


def hf_tensors(config: Config) -> dict[str, list[Entry]]:
    """transformers' name of every tensor -> the arrays of ours that make it up, in order."""
    tensors: dict[str, list[Entry]] = {}
    for entry in table(config):
        tensors.setdefault(entry.hf_name, []).append(entry)
    return tensors


def hf_shape(entries: list[Entry]) -> list[int]:
    """A tensor's shape: experts are stacked."""
    first = entries[0]
    return list(first.shape) if first.expert is None else [len(entries), *first.shape]


def write(
    folder: Path, values: Mapping[str, Any], config: Config, parameters: Mapping[str, Any]
) -> None:
    """config.json and one model.safetensors; complete when config.json is there."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = hf_tensors(config)
    header, end = {}, 0
    for name, entries in tensors.items():
        arrays = [parameters[entry.path] for entry in entries]
        start, end = end, end + sum(array.nbytes for array in arrays)
        header[name] = {
            "dtype": SAFETENSORS_NAMES[arrays[0].dtype.name],
            "shape": hf_shape(entries),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in itertools.chain.from_iterable(tensors.values()):
            file.write(np.asarray(parameters[entry.path]).view(np.uint8).reshape(-1).data)
    (folder / "config.json").write_text(json.dumps(values, indent=1))
