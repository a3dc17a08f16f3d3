"""The demo's model, its curriculum and its hyper-parameters."""

import dataclasses
from typing import Any

from qwen3vl_jax.demo import tokenizer
from qwen3vl_jax.demo.batches import GRID, Layout, Mixture
from qwen3vl_jax.demo.scenes import SceneRange
from qwen3vl_jax.train import Parameters, Settings

NAMING = Layout("naming", rows=64, pictures=1, tokens=0, turns=0)
FULL = Layout("full", rows=32, pictures=1, tokens=68, turns=1)
ONE = Layout("one", rows=32, pictures=1, tokens=112, turns=4)
TWO = Layout("two", rows=16, pictures=2, tokens=132, turns=4)
PAIRS = Layout("pairs", rows=24, pictures=2, tokens=132, turns=4, numbered=True)
NAMING_STEPS = 1300
FIRST_CYCLE = 8000
WORDING_SHARE = 0.3
NUMBERING_SHARE = 0.3
NUMBERING_LAYERS = 1  # after so many layers a vision token is to know its picture
SETTINGS = Settings(
    steps=14000,
    rates=(
        *((0, 0.0), (40, 1.5e-3), (4600, 1.5e-3), (FIRST_CYCLE, 0.0)),
        *((FIRST_CYCLE + 50, 1.2e-3), (10800, 1.2e-3), (14000, 0.0)),
    ),
    save_every_steps=100,
    log_every_steps=20,
)
TEXT_HIDDEN = 128
VISION_HIDDEN = 160


def config_values(token_ids: dict[str, int]) -> dict[str, Any]:
    """config.json of the demo model; `token_ids` are those of the added tokens."""
    end, pad = token_ids["<|im_end|>"], token_ids["<|endoftext|>"]
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": token_ids["<|image_pad|>"],
        "video_token_id": token_ids["<|video_pad|>"],
        "vision_start_token_id": token_ids["<|vision_start|>"],
        "vision_end_token_id": token_ids["<|vision_end|>"],
        "tie_word_embeddings": True,
        "dtype": "float32",
        "transformers_version": "4.57.0",
        "text_config": _text_values(end, pad),
        "vision_config": _vision_values(),
    }


def _text_values(end: int, pad: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3_vl_text",
        "vocab_size": tokenizer.VOCABULARY_SIZE,
        "hidden_size": TEXT_HIDDEN,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": pad,
        "eos_token_id": end,
        "pad_token_id": pad,
        "dtype": "float32",
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "default",
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": True,
    }


def _vision_values() -> dict[str, Any]:
    return {
        "model_type": "qwen3_vl",
        "depth": 4,
        "hidden_size": VISION_HIDDEN,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 480,
        "num_heads": 5,
        "in_channels": 3,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": TEXT_HIDDEN,
        "num_position_embeddings": GRID * GRID,
        "deepstack_visual_indexes": [1, 2],
        "initializer_range": 0.02,
    }


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """A part of the curriculum, up to step `until`; its layouts take turns."""

    until: int
    mixture: Mixture
    layouts: tuple[Layout, ...]


_ABOUT_ITEMS = {"colour": 1.0, "shape": 1.2, "size": 0.8, "position": 1.0, "object": 1.0}
_ONE = _ABOUT_ITEMS | {"count": 1.6, "exists": 1.2, "word": 1.0, "number": 1.2, "text": 0.8}
_ALL = _ONE | {
    "position": 1.6,
    "size": 0.6,
    "count": 2.4,
    "exists": 2.4,
    "which": 4.0,
    "several": 6.0,
}
_APART = _ONE | {"which": 8.0, "several": 2.0}
_LAST = _ALL | {"which": 8.0, "count": 3.0, "number": 2.0, "text": 1.2, "several": 5.0}


# First the vision tower alone learns to name what is in each cell. Then descriptions, then
# questions. Those about several things at once say more per token than single ones. The second
# cycle tells two pictures apart, on simple scenes first.
CURRICULUM = (
    Stage(NAMING_STEPS, Mixture(SceneRange(0, 5, 0.9), {}, 0.0), (NAMING,)),
    Stage(NAMING_STEPS + 200, Mixture(SceneRange(1, 4, 0.5), _ALL, 1.0), (FULL,)),
    Stage(NAMING_STEPS + 1300, Mixture(SceneRange(1, 3, 0.5), _ALL, 0.4), (ONE, NAMING, ONE)),
    Stage(FIRST_CYCLE, Mixture(SceneRange(1, 4, 0.6), _ALL, 0.25), (ONE, TWO, ONE, NAMING)),
    Stage(FIRST_CYCLE + 1000, Mixture(SceneRange(1, 2, 0.4), _APART, 0.5), (PAIRS, PAIRS, ONE)),
    Stage(
        SETTINGS.steps,
        Mixture(SceneRange(1, 4, 0.6), _LAST, 0.25),
        (PAIRS, ONE, PAIRS, ONE, NAMING),
    ),
)


def plan(number: int) -> tuple[Layout, Mixture]:
    """Layout and mixture of batch `number`."""
    stage = next(stage for stage in CURRICULUM if number < stage.until)
    return stage.layouts[number % len(stage.layouts)], stage.mixture


def start(parameters: Parameters) -> Parameters:
    """The weights to begin with: blocks that add little, positions that show, sharp attention.

    At their usual size the blocks' outputs hide embeddings of 0.1, and positions of 0.02 drown.
    Normalised queries and keys of 32 values score 5.7 at most, and 12.7 when they start at 1.5.
    """
    quiet = ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "mlp.linear_fc2.weight")
    factors = {name: 0.1 for name in parameters if name.endswith(quiet)}
    factors |= {
        name: 0.1 for name in parameters if "deepstack" in name and name.endswith("fc2.weight")
    }
    factors |= {
        name: 1.5 for name in parameters if name.endswith(("q_norm.weight", "k_norm.weight"))
    }
    factors["visual.pos_embed.weight"] = 10.0
    return {name: array * factors.get(name, 1.0) for name, array in parameters.items()}
