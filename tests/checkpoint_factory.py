"""Tiny random checkpoints, as transformers would save them, made with numpy and safetensors.

    values = config_values("moe", tied=False)            a config.json
    tensors = random_tensors(values, layout="released")  HF name -> array
    save(directory, values, tensors, shards=3)           a complete model directory

Names and shapes are written out here, independently of our table.
"""

import copy
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SIDE_FILES = {
    "generation_config.json": b'{"eos_token_id": [1, 2]}\n',
    "preprocessor_config.json": b'{"patch_size": 4}\n',
    "video_preprocessor_config.json": b'{"patch_size": 4}\n',
    "tokenizer.json": b'{"model": {"type": "BPE", "vocab": {}}}\n',
    "tokenizer_config.json": b'{"chat_template": null}\n',
    "chat_template.jinja": b"{{ messages }}\n",
}

_TEXT = {
    "attention_bias": False,
    "dtype": "float32",
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 40,
}
_MOE = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
    "num_experts_per_tok": 2,
}
_VISION = {
    "deepstack_visual_indexes": [0],
    "depth": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 8,
    "in_channels": 3,
    "intermediate_size": 12,
    "num_heads": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": 16,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_ROPE = {"mrope_interleaved": True, "mrope_section": [2, 1, 1], "rope_type": "default"}


def config_values(
    kind: str = "dense",
    *,
    tied: bool = False,
    dialect: str = "5",
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    **top: Any,
) -> dict[str, Any]:
    """A config.json of a tiny model.

    Args:
        kind: "dense", "moe", or "mixed" (layer 0 dense, layer 1 sparse).
        dialect: "5" for what transformers 5 saves, "4" for the names of the released files.
        text, vision, top: settings to replace.
    """
    sparse = kind != "dense"
    model_type = "qwen3_vl_moe" if sparse else "qwen3_vl"
    values: dict[str, Any] = {
        "dtype": "float32",
        "image_token_id": 30,
        "model_type": model_type,
        "text_config": _TEXT | {"model_type": f"{model_type}_text"},
        "tie_word_embeddings": tied,
        "transformers_version": "5.23.0" if dialect == "5" else "4.57.0.dev0",
        "video_token_id": 31,
        "vision_config": _VISION | {"model_type": f"{model_type}_vision"},
        "vision_end_token_id": 33,
        "vision_start_token_id": 32,
    }
    section = values["text_config"]
    if sparse:
        experts = "num_local_experts" if dialect == "5" else "num_experts"
        section |= _MOE | {experts: 3, "mlp_only_layers": [0] if kind == "mixed" else []}
    if dialect == "5":
        section["rope_parameters"] = _ROPE | {"rope_theta": 5000000}
    else:
        section |= {"rope_theta": 5000000, "rope_scaling": dict(_ROPE)}
        values["vision_config"]["model_type"] = model_type
    section |= text or {}
    values["vision_config"] |= vision or {}
    return copy.deepcopy(values | top)


def random_tensors(
    values: dict[str, Any], *, dtype: str = "float32", layout: str = "saved", seed: int = 0
) -> Tensors:
    """Every tensor of the model with random values.

    Args:
        layout: "saved" for experts as transformers 5 saves them, [E, out, in]; "released" for
            [E, in, out]. The values are the same: one is the transpose of the other.
    """
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in _shapes(values).items():
        array = generator.standard_normal(shape).astype(DTYPES[dtype])
        if ".experts." in name and layout == "released":
            array = np.ascontiguousarray(array.swapaxes(1, 2))
        tensors[name] = array
    return tensors


def save(
    directory: Path, values: dict[str, Any], tensors: Tensors, *, shards: int | None = None
) -> Path:
    """Write a model directory with one model.safetensors, or an index and `shards` files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values, indent=2))
    for name, content in SIDE_FILES.items():
        (directory / name).write_bytes(content)
    if shards is None:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    homes: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        names = sorted(tensors)[number::shards]
        save_file({n: tensors[n] for n in names}, directory / file, metadata={"format": "pt"})
        homes |= dict.fromkeys(names, file)
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": homes}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return directory


def checkpoint(
    directory: Path,
    kind: str = "dense",
    *,
    dtype: str = "float32",
    layout: str = "saved",
    shards: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> Tensors:
    """`config_values`, `random_tensors` and `save` in one; returns the tensors."""
    values = config_values(kind, **settings)
    tensors = random_tensors(values, dtype=dtype, layout=layout, seed=seed)
    save(directory, values, tensors, shards=shards)
    return tensors


def _shapes(values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    text = values["text_config"]
    matrix = (text["vocab_size"], text["hidden_size"])
    shapes: dict[str, tuple[int, ...]] = {"model.language_model.embed_tokens.weight": matrix}
    for layer in range(text["num_hidden_layers"]):
        sparse = "moe_intermediate_size" in text and layer not in text["mlp_only_layers"]
        for name, shape in _layer(text, sparse).items():
            shapes[f"model.language_model.layers.{layer}.{name}"] = shape
    shapes["model.language_model.norm.weight"] = matrix[1:]
    if not values["tie_word_embeddings"]:
        shapes["lm_head.weight"] = matrix
    return shapes | {f"model.visual.{n}": s for n, s in _vision(values["vision_config"]).items()}


def _layer(text: dict[str, Any], sparse: bool) -> dict[str, tuple[int, ...]]:
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    queries = text["num_attention_heads"] * text["head_dim"]
    keys = text["num_key_value_heads"] * text["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_norm.weight": (text["head_dim"],),
        "self_attn.k_norm.weight": (text["head_dim"],),
    }
    for name, rows in (("q", queries), ("k", keys), ("v", keys), ("o", hidden)):
        shapes[f"self_attn.{name}_proj.weight"] = (rows, queries if name == "o" else hidden)
        if text["attention_bias"]:
            shapes[f"self_attn.{name}_proj.bias"] = (rows,)
    if not sparse:
        return shapes | {
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
    experts = text["num_experts" if "num_experts" in text else "num_local_experts"]
    width = text["moe_intermediate_size"]
    return shapes | {
        "mlp.gate.weight": (experts, hidden),
        "mlp.experts.gate_up_proj": (experts, 2 * width, hidden),
        "mlp.experts.down_proj": (experts, hidden, width),
    }


def _vision(vision: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    wide = hidden * vision["spatial_merge_size"] ** 2
    kernel = (3, vision["temporal_patch_size"], vision["patch_size"], vision["patch_size"])
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (hidden, *kernel),
        "patch_embed.proj.bias": (hidden,),
        "pos_embed.weight": (vision["num_position_embeddings"], hidden),
    }
    for prefix in (f"blocks.{block}." for block in range(vision["depth"])):
        for name, rows, columns in (
            ("attn.qkv", 3 * hidden, hidden),
            ("attn.proj", hidden, hidden),
            ("mlp.linear_fc1", inner, hidden),
            ("mlp.linear_fc2", hidden, inner),
        ):
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            shapes[f"{prefix}{name}.bias"] = (rows,)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[prefix + name] = (hidden,)
    taps = range(len(vision["deepstack_visual_indexes"]))
    for prefix in ("merger.", *(f"deepstack_merger_list.{tap}." for tap in taps)):
        norm = hidden if prefix == "merger." else wide
        shapes |= {f"{prefix}norm.weight": (norm,), f"{prefix}norm.bias": (norm,)}
        for name, rows in (("linear_fc1", wide), ("linear_fc2", vision["out_hidden_size"])):
            shapes |= {f"{prefix}{name}.weight": (rows, wide), f"{prefix}{name}.bias": (rows,)}
    return shapes
