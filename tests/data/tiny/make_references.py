"""Writes reference.npz of the tiny checkpoints with transformers and torch, in float32.

    python tests/data/tiny/make_references.py

Needs the test extra. The inputs are stored (inputs.npz); the answers are recomputed in eager
attention, so that another version of transformers can be compared with the stored one.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).parents[2]))
import tiny

NEW_TOKENS = 64
ALL = ("text", "text_batch_left", "text_batch_right", "image", "two_images", "video", "video_odd")
ALL += ("image_video", "batch_left", "batch_right")
CASES = {
    "dense": ALL,
    "moe": ALL,
    "dense_tied": ("text", "image", "batch_left"),
    "moe_mixed": ("text", "image", "video", "batch_left"),
}


def compute(model: torch.nn.Module, case: str) -> dict[str, np.ndarray]:
    """Positions, vision features, decoder layers, logits and greedy tokens of one case."""
    given = {key: torch.from_numpy(value) for key, value in tiny.inputs(case).items()}
    inner, found = model.model, {}
    for kind, grid in (("image", "image_grid_thw"), ("video", "video_grid_thw")):
        if grid in given:
            pixels = given["pixel_values" if kind == "image" else "pixel_values_videos"]
            out = getattr(inner, f"get_{kind}_features")(pixels, given[grid], return_dict=True)
            found[f"{kind}_embeds"] = torch.cat(list(out.pooler_output))
            for index, feature in enumerate(out.deepstack_features):
                found[f"{kind}_deepstack_{index}"] = torch.cat(list(feature))
    if found:
        inner.rope_deltas = None
        grids = (given.get("image_grid_thw"), given.get("video_grid_thw"))
        found["position_ids"], found["rope_deltas"] = inner.get_rope_index(
            given["input_ids"], given["mm_token_type_ids"], *grids, given["attention_mask"]
        )
    layers: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: layers.append(out))
        for layer in inner.language_model.layers
    ]
    inner.rope_deltas = None
    found["logits"] = model(**given).logits
    for hook in hooks:
        hook.remove()
    if case == "image":
        found |= {f"layer_out_{index}": layer for index, layer in enumerate(layers)}
    if not case.endswith("_right"):
        inner.rope_deltas = None
        tokens = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
        found["greedy"] = tokens[:, given["input_ids"].shape[1] :]
    return {key: value.numpy() for key, value in found.items()}


def main() -> None:
    torch.set_grad_enabled(False)
    for name, cases in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = tiny.checkpoint(name, Path(scratch))
            model = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        model.generation_config.eos_token_id = None  # go on after an end of text
        arrays = {
            f"{case}/{key}": value for case in cases for key, value in compute(model, case).items()
        }
        np.savez_compressed(tiny.DATA / name / "reference.npz", **arrays)
        print(name, len(arrays))


if __name__ == "__main__":
    main()
