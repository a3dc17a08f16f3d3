"""Seven tiny random checkpoints, and what transformers computes from them.

Two are stored whole, five are made from these two. data/tiny/PROVENANCE.md says where all of it
comes from; data/tiny/make_references.py wrote the stored answers.
"""

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

DATA = Path(__file__).parent / "data" / "tiny"

STORED = ("dense", "moe_official_layout")
DERIVED = ("dense_tied", "moe", "moe_mixed", "dense_v4_names", "moe_v4_names")

# The checkpoint whose stored answers hold: another layout or dialect must not change a number.
ANSWERS = {
    "dense": "dense",
    "dense_tied": "dense_tied",
    "dense_v4_names": "dense",
    "moe": "moe",
    "moe_mixed": "moe_mixed",
    "moe_official_layout": "moe",
    "moe_v4_names": "moe",
}

Tensors = dict[str, np.ndarray]


def checkpoint(name: str, scratch: Path) -> Path:
    """The directory of a checkpoint as transformers would save it, made in `scratch` if derived."""
    if name in STORED:
        return DATA / name
    base = "dense" if name.startswith("dense") else "moe_official_layout"
    folder = scratch / name
    folder.mkdir()
    for path in (DATA / base).iterdir():
        # Another dialect of config.json changes no weight.
        kept = name.endswith("_v4_names") or not path.name.startswith("model")
        if kept and path.name != "config.json":
            shutil.copyfile(path, folder / path.name)
    shutil.copyfile(DATA / name / "config.json", folder / "config.json")
    if not name.endswith("_v4_names"):
        tensors = {"dense_tied": _tied, "moe": _moe, "moe_mixed": _mixed}[name]()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def inputs(case: str) -> Tensors:
    """What a processor gives for one case: token ids, masks, pixels, grids."""
    with np.load(DATA / "inputs.npz") as stored:
        found = {key.partition("/")[2]: stored[key] for key in stored if key.startswith(f"{case}/")}
    for name in ("pixel_values", "pixel_values_videos"):
        if name in found:
            # Stored as the pixels 0..255 they came from; equal bit for bit to the processor's.
            found[name] = (found[name].astype(np.float32) - np.float32(127.5)) / np.float32(127.5)
    return found


def answers(name: str) -> dict[str, Tensors]:
    """Case -> name -> array that transformers computed in float32 from a checkpoint."""
    found: dict[str, Tensors] = {}
    with np.load(DATA / ANSWERS[name] / "reference.npz") as stored:
        for key in stored:
            case, _, array = key.partition("/")
            found.setdefault(case, {})[array] = stored[key]
    return found


def _stored(name: str) -> Tensors:
    tensors: Tensors = {}
    for path in sorted((DATA / name).glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def _tied() -> Tensors:
    return {key: value for key, value in _stored("dense").items() if key != "lm_head.weight"}


def _moe() -> Tensors:
    """The released layout [experts, in, out] turned into the one that transformers 5 saves."""
    return {
        key: np.ascontiguousarray(value.swapaxes(1, 2)) if ".mlp.experts." in key else value
        for key, value in _stored("moe_official_layout").items()
    }


def _mixed() -> Tensors:
    """The MoE with layer 1 dense: it takes over the MLP of the dense checkpoint."""
    mlp = "model.language_model.layers.1.mlp."
    sparse = {key: value for key, value in _moe().items() if not key.startswith(mlp)}
    return sparse | {key: value for key, value in _stored("dense").items() if key.startswith(mlp)}
