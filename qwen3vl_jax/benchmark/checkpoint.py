"""A Hugging Face directory from arrays in memory, so that loading can be timed."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen3vl_jax.config import Config

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


def hf_names(paths: Mapping[str, Any]) -> dict[str, list[str]]:
    """transformers' name of every tensor -> our paths that make it up, in order.

    Our experts are single arrays, theirs stacked; our vocabulary matrices are lists of row blocks.
    """
    names: dict[str, list[tuple[int, str]]] = {}
    for path in paths:
        name = path if path.startswith("lm_head.") else f"model.{path}"
        order = 0
        if ".experts." in name:
            before, _, after = name.partition(".experts.")
            number, _, last = after.partition(".")
            name, order = f"{before}.experts.{last}", int(number)
        elif name.rpartition(".")[2].isdigit():
            name, _, number = name.rpartition(".")
            order = int(number)
        names.setdefault(name, []).append((order, path))
    return {name: [path for _, path in sorted(parts)] for name, parts in names.items()}


def write(folder: Path, values: Mapping[str, Any], parameters: Mapping[str, jax.Array]) -> None:
    """config.json and one model.safetensors; complete when config.json is there."""
    folder.mkdir(parents=True, exist_ok=True)
    names = hf_names(parameters)
    header, end = {}, 0
    for name, paths in names.items():
        arrays = [parameters[path] for path in paths]
        start, end = end, end + sum(array.nbytes for array in arrays)
        header[name] = {
            "dtype": SAFETENSORS_NAMES[arrays[0].dtype.name],
            "shape": _shape(name, [array.shape for array in arrays]),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for path in itertools.chain.from_iterable(names.values()):
            file.write(np.asarray(parameters[path]).view(np.uint8).reshape(-1).data)
    (folder / "config.json").write_text(json.dumps(values, indent=1))


def _shape(name: str, shapes: list[tuple[int, ...]]) -> list[int]:
    if ".experts." in name:
        return [len(shapes), *shapes[0]]
    return [sum(shape[0] for shape in shapes), *shapes[0][1:]]
