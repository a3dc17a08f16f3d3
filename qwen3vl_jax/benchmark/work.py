"""One benchmark's inputs, and the bytes and arithmetic that no implementation can do without."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.weights import table

REPEATED_TOKENS, REPEATS = 16, 4
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """A prompt of one picture and text, then greedy decoding."""

    config: Config
    dtype: str
    text_tokens: int
    image_height: int  # pixels; 0 for no picture
    image_width: int
    new_tokens: int

    @property
    def patches(self) -> int:
        """Patches of the picture."""
        return self.image_height * self.image_width // self.config.vision.patch_size**2

    @property
    def prompt_tokens(self) -> int:
        """All tokens of the prompt: text, picture and the two marks around it."""
        merged = self.patches // self.config.vision.merged_patches
        return self.text_tokens + (merged + 2 if merged else 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """What one run of a phase must at least read and compute."""

    read_bytes: int
    flops: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.read_bytes + other.read_bytes, self.flops + other.flops)

    def bound_s(self, *, read_bytes_per_s: float, flops_per_s: float) -> float:
        """Seconds that no run can beat: the slower of reading and computing."""
        return max(self.read_bytes / read_bytes_per_s, self.flops / flops_per_s)


def shrunk(config: Config, layers: int | None) -> Config:
    """The same model with its first `layers` decoder layers and vision blocks only.

    Raises:
        UsageError: if it has not that many, or none is asked for.
    """
    if layers is None:
        return config
    if not 1 <= layers <= config.text.num_hidden_layers:
        raise UsageError(
            f"--layers {layers}: this model has 1 to {config.text.num_hidden_layers} decoder layers"
        )
    depth = min(layers, config.vision.depth)
    # DeepStack features are added after the first decoder layers: no more of them than layers.
    indexes = tuple(range(depth))[: len(config.vision.deepstack_visual_indexes)]
    vision = dataclasses.replace(config.vision, depth=depth, deepstack_visual_indexes=indexes)
    text = dataclasses.replace(
        config.text,
        num_hidden_layers=layers,
        mlp_only_layers=tuple(layer for layer in config.text.mlp_only_layers if layer < layers),
    )
    return dataclasses.replace(config, text=text, vision=vision)


def config_file(size: str, folder: Path) -> Path:
    """The file that `size` names: a path, or a part of the name of one in `folder`, e.g. 2b.

    Raises:
        UsageError: if there is none, with the names that there are.
    """
    if size.endswith(".json"):
        return Path(size)
    files = sorted(folder.glob("*.json"))
    found = [file for file in files if size.lower() in file.stem.lower().split("-")]
    if len(found) != 1:
        names = ", ".join(file.stem for file in files)
        raise UsageError(f"--size {size}: not a part of exactly one of {names}")
    return found[0]


def inputs(work: Workload, *, seed: int) -> dict[str, np.ndarray]:
    """Arrays as a processor returns them: the picture first, then random ordinary tokens."""
    generator = np.random.default_rng(seed)
    config = work.config
    pictures = [config.image_token_id, config.video_token_id]
    marks = [config.vision_start_token_id, config.vision_end_token_id]
    ordinary = np.setdiff1d(np.arange(config.text.vocab_size), pictures + marks)
    text = generator.choice(ordinary, work.text_tokens)
    if not work.patches:
        return {"input_ids": text[None], "attention_mask": np.ones((1, len(text)), np.int64)}
    merged = work.prompt_tokens - work.text_tokens - 2
    picture = [config.vision_start_token_id, *[config.image_token_id] * merged]
    ids = np.concatenate([picture, [config.vision_end_token_id], text])[None]
    side = config.vision.patch_size
    pixels = generator.standard_normal((work.patches, config.vision.patch_values), np.float32)
    return {
        "input_ids": ids,
        "attention_mask": np.ones(ids.shape, np.int64),
        "mm_token_type_ids": (ids == config.image_token_id).astype(np.int64),
        "pixel_values": pixels,
        "image_grid_thw": np.array([[1, work.image_height // side, work.image_width // side]]),
    }


def repetitive_inputs(work: Workload, *, seed: int) -> dict[str, np.ndarray]:
    """A prompt of a few ordinary tokens, said over and over again."""
    few = dataclasses.replace(work, text_tokens=REPEATED_TOKENS, image_height=0, image_width=0)
    ids = np.tile(inputs(few, seed=seed)["input_ids"], REPEATS)
    return {"input_ids": ids, "attention_mask": np.ones(ids.shape, np.int64)}


def costs(work: Workload) -> dict[str, Cost]:
    """What vision, the prompt's text and one decoded token cost, from the shapes of all weights.

    Biases, norms, softmax and rotations are left out of the arithmetic: under one per cent.
    """
    shapes = {entry.path: entry.shape for entry in table(work.config)}
    return {"vision": _vision(work, shapes), **_text(work, shapes)}


def _vision(work: Workload, shapes: Mapping[str, tuple[int, ...]]) -> Cost:
    vision = work.config.vision
    tower = {path: shape for path, shape in shapes.items() if path.startswith("visual.")}
    products = sum(
        # A merger works on tokens, everything else on patches.
        2 * math.prod(shape) * work.patches // (vision.merged_patches if "merger" in path else 1)
        for path, shape in tower.items()
        if len(shape) > 1 and "pos_embed" not in path
    )
    attention = 4 * work.patches**2 * vision.hidden_size * vision.depth
    weights = sum(math.prod(shape) for shape in tower.values()) if work.patches else 0
    return Cost(weights * ITEM_BYTES[work.dtype], products + attention)


def _text(work: Workload, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Cost]:
    text, item, tokens = work.config.text, ITEM_BYTES[work.dtype], work.prompt_tokens
    several, one = (_layer_numbers(work.config, shapes, count) for count in (tokens, 1))
    head_name = "language_model.embed_tokens." if work.config.tie_word_embeddings else "lm_head."
    head = sum(math.prod(shape) for path, shape in shapes.items() if path.startswith(head_name))
    # Every pair of a query and a key it sees costs 4 operations per value: a score and a sum.
    per_pair = 4 * text.num_attention_heads * text.head_dim * text.num_hidden_layers
    seen = tokens + (work.new_tokens + 1) // 2
    cached = 2 * text.num_key_value_heads * text.head_dim * text.num_hidden_layers * seen
    return {
        "prefill": Cost(
            (several + head) * item,
            2 * (one * tokens + head) + per_pair * tokens * (tokens + 1) // 2,
        ),
        "decode": Cost((one + head + cached) * item, 2 * (one + head) + per_pair * seen),
    }


def _layer_numbers(config: Config, shapes: Mapping[str, tuple[int, ...]], tokens: int) -> int:
    """Numbers of the decoder layers' weights that `tokens` tokens read: of the experts a part."""
    text = config.text
    chosen, experts = text.num_experts_per_tok * tokens, max(text.num_experts, 1)
    return sum(
        math.prod(shape) * (min(chosen, experts) if ".experts." in path else experts) // experts
        for path, shape in shapes.items()
        if path.startswith("language_model.layers.")
    )
