"""Writes the demo model as an ordinary Hugging Face directory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qwen3vl_jax.config import load_config
from qwen3vl_jax.demo import recipe, tokenizer
from qwen3vl_jax.demo.render import SIDE_PX
from qwen3vl_jax.weights import table

_PIXELS = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
}


def write_settings(directory: Path) -> None:
    """Tokenizer, config.json, generation_config.json and both preprocessor files.

    Pictures are brought to the area that the model was trained with; video frames likewise.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.write_tokenizer(directory)
    ids = tokenizer.added_ids(directory)
    area = SIDE_PX * SIDE_PX
    generation = {
        "bos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "do_sample": False,
        "transformers_version": "4.57.0",
    }
    image = {"size": {"longest_edge": area, "shortest_edge": area}, **_PIXELS}
    video = {"size": {"longest_edge": 32 * area, "shortest_edge": area}, **_PIXELS}
    _write_json(directory / "config.json", recipe.config_values(ids))
    _write_json(directory / "generation_config.json", generation)
    _write_json(
        directory / "preprocessor_config.json",
        {**image, "image_processor_type": "Qwen2VLImageProcessorFast"},
    )
    _write_json(
        directory / "video_preprocessor_config.json",
        {**video, "video_processor_type": "Qwen3VLVideoProcessor"},
    )


def write_weights(directory: Path, parameters: Mapping[str, Any]) -> int:
    """model.safetensors in bfloat16 beside the config.json of `directory`; returns its bytes."""
    from safetensors.numpy import save

    entries = table(load_config(directory))
    tensors = {
        entry.hf_name: np.asarray(parameters[entry.path]).astype(ml_dtypes.bfloat16)
        for entry in entries
    }
    path = directory / "model.safetensors"
    return path.write_bytes(save(tensors, metadata={"format": "pt"}))


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
