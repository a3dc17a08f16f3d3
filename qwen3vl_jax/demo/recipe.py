"""The demo's model, its curriculum and its hyper-parameters."""

import dataclasses

from typing import Any

from qwen3vl_jax.demo import tokenizer
from qwen3vl_jax.demo.batches import GRID, Layout, Mixture
from qwen3vl_jax.demo.scenes import SceneRange
from qwen3vl_jax.train import Settings

ONE = Layout("one", rows=32, pictures=1, tokens=112, turns=4)
TWO = Layout("two", rows=16, pictures=2, tokens=132, turns=4)
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
        "text_config": {
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
            "rope_scaling": {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True},
            "tie_word_embeddings": True,
        },
        "vision_config": {
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
        },
    }


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """A part of the curriculum, up to step `until`: every `two_every`-th batch has two pictures, 0 for none."""

    until: int
    mixture: Mixture
    two_every: int


_ABOUT_ITEMS = {"colour": 1.0, "shape": 1.2, "size": 0.8, "position": 1.0, "object": 1.0}
_ALL = _ABOUT_ITEMS | {"count": 1.6, "exists": 1.2, "word": 1.0, "number": 1.2, "text": 0.8}


def curriculum(steps: int) -> tuple[Stage, ...]:
    """One or two shapes, then several and text, then crowded scenes and pairs of pictures."""
    return (
        Stage(round(0.07 * steps), Mixture(SceneRange(1, 2, 0.3), _ALL, 0.9), two_every=0),
        Stage(round(0.25 * steps), Mixture(SceneRange(1, 4, 0.6), _ALL, 0.7), two_every=0),
        Stage(steps, Mixture(SceneRange(1, 6, 0.6), _ALL | {"which": 3.0}, 0.4), two_every=4),
    )


def plan(number: int, stages: tuple[Stage, ...]) -> tuple[Layout, Mixture]:
    """Layout and mixture of batch `number`."""
    stage = next((stage for stage in stages if number < stage.until), stages[-1])
    two = stage.two_every > 0 and number % stage.two_every == 0
    return (TWO if two else ONE), stage.mixture
