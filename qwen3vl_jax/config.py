"""What a checkpoint's config.json says, as typed and range-checked data.

Both dialects are read: the released files (written by transformers 4.57) and what transformers 5
saves. A setting that would change the numbers and that we do not compute is an error that names it.

Source: transformers 5.23, `configuration_qwen3_vl.py` and `configuration_qwen3_vl_moe.py`.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3vl_jax.errors import ConfigError
from qwen3vl_jax.json_section import Section

MAX_CONFIG_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class VisionConfig:
    """The vision tower. `num_position_embeddings` is the area of a square table."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]
    rope_theta: float

    @property
    def head_dim(self) -> int:
        """Values of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Values of one patch: channels x frames x rows x columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged_patches(self) -> int:
        """Neighbouring patches that become one token."""
        return self.spatial_merge_size**2

    @property
    def table_side(self) -> int:
        """Rows, and columns, of the learned position table."""
        return math.isqrt(self.num_position_embeddings)


@dataclasses.dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary positions of the decoder. `scaling` is 'default', 'linear' or 'yarn'."""

    theta: float
    mrope_section: tuple[int, int, int]
    scaling: str = "default"
    factor: float = 1.0
    attention_factor: float | None = None
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class TextConfig:
    """The decoder. Dense when `num_experts` is 0."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    attention_bias: bool
    rope: RopeConfig
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def is_sparse(self, layer: int) -> bool:
        """Whether decoder layer `layer` has experts instead of one MLP."""
        chosen = self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0
        return chosen and layer not in self.mlp_only_layers


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """A whole Qwen3-VL. Hashable, so it can be a static argument of a jitted step."""

    model_type: str
    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    tie_word_embeddings: bool
    dtype: str
    transformers_version: str


def _keys(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Keys that describe a checkpoint or its training, and change nothing in a forward pass.
_BOOK_KEEPING = _keys("""
    architectures attention_dropout auto_map bos_token_id dtype eos_token_id id2label
    initializer_range label2id max_window_layers model_type name_or_path output_attentions
    output_hidden_states output_router_logits pad_token_id problem_type return_dict
    router_aux_loss_coef tie_word_embeddings torch_dtype transformers_version use_cache
""")
_TOP_KEYS = _BOOK_KEEPING | _keys("""
    text_config vision_config image_token_id video_token_id vision_start_token_id
    vision_end_token_id
""")
_VISION_KEYS = _BOOK_KEEPING | _keys("""
    depth hidden_size hidden_act intermediate_size num_heads in_channels patch_size
    spatial_merge_size temporal_patch_size out_hidden_size num_position_embeddings
    deepstack_visual_indexes rope_parameters
""")
_TEXT_KEYS = _BOOK_KEEPING | _keys("""
    vocab_size hidden_size hidden_act intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings rms_norm_eps attention_bias
    rope_theta rope_scaling rope_parameters num_experts num_local_experts num_experts_per_tok
    moe_intermediate_size decoder_sparse_step mlp_only_layers norm_topk_prob sliding_window
""")
_ROPE_KEYS = _keys("""
    rope_theta rope_type type mrope_section mrope_interleaved factor attention_factor beta_fast
    beta_slow mscale mscale_all_dim original_max_position_embeddings truncate
    partial_rotary_factor
""")


def load_config(path: str | Path) -> Config:
    """Reads `path`, a config.json or a directory that holds one.

    Raises:
        ConfigError: unreadable, malformed, out of range, or a setting that is not computed here.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read ({error.strerror}); give a directory with a config.json"
        ) from error
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{file}: a config.json has at most {MAX_CONFIG_BYTES:,} bytes")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: is not JSON ({type(error).__name__})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: must hold one JSON object")
    return parse_config(values)


def parse_config(values: Mapping[str, Any]) -> Config:
    """Checks the parsed JSON of a config.json; raises ConfigError."""
    top = Section("", values)
    model_type = values.get("model_type")
    if model_type not in ("qwen3_vl", "qwen3_vl_moe"):
        raise top.fail("model_type", 'must be "qwen3_vl" or "qwen3_vl_moe"')
    top.refuse_unknown(_TOP_KEYS)
    text = _text(top.section("text_config"), sparse=model_type == "qwen3_vl_moe")
    vision = _vision(top.section("vision_config"))
    _check_together(text, vision)
    token = {
        name: top.integer(name, default, 0, text.vocab_size - 1)
        for name, default in (
            ("image_token_id", 151655),
            ("video_token_id", 151656),
            ("vision_start_token_id", 151652),
            ("vision_end_token_id", 151653),
        )
    }
    # Only the top level decides: transformers 5 saves text_config.tie_word_embeddings = true for
    # untied MoE models.
    tied = top.flag("tie_word_embeddings", default=False)
    dtype = values.get("dtype", values.get("torch_dtype", values["text_config"].get("dtype")))
    version = values.get("transformers_version", "")
    return Config(
        model_type=model_type,
        text=text,
        vision=vision,
        tie_word_embeddings=tied,
        dtype=dtype if dtype in ("float32", "bfloat16", "float16") else "bfloat16",
        transformers_version=version if isinstance(version, str) else "",
        **token,
    )


def _vision(section: Section) -> VisionConfig:
    section.refuse_unknown(_VISION_KEYS)
    section.exactly("hidden_act", "gelu_pytorch_tanh")
    theta = 10000.0
    if section.values.get("rope_parameters") is not None:
        rope = section.section("rope_parameters")
        rope.refuse_unknown(frozenset(("rope_theta", "rope_type")))
        rope.exactly("rope_type", "axial")
        theta = rope.number("rope_theta", theta, 1.001, 1e12)
    depth = section.integer("depth", 27, 1, 1024)
    return VisionConfig(
        depth=depth,
        hidden_size=section.integer("hidden_size", 1152, 4, 65536),
        intermediate_size=section.integer("intermediate_size", 4304, 1, 1 << 20),
        num_heads=section.integer("num_heads", 16, 1, 1024),
        in_channels=section.integer("in_channels", 3, 3, 3),
        patch_size=section.integer("patch_size", 16, 1, 256),
        temporal_patch_size=section.integer("temporal_patch_size", 2, 1, 16),
        spatial_merge_size=section.integer("spatial_merge_size", 2, 1, 16),
        out_hidden_size=section.integer("out_hidden_size", 3584, 1, 65536),
        num_position_embeddings=section.integer("num_position_embeddings", 2304, 1, 1 << 20),
        deepstack_visual_indexes=section.integers(
            "deepstack_visual_indexes", (8, 16, 24), 0, depth - 1
        ),
        rope_theta=theta,
    )


def _text(section: Section, *, sparse: bool) -> TextConfig:
    section.refuse_unknown(_TEXT_KEYS)
    section.exactly("hidden_act", "silu")
    section.exactly("norm_topk_prob", True)
    section.exactly("sliding_window", None)
    hidden_size = section.integer("hidden_size", 2048 if sparse else 4096, 1, 65536)
    heads = section.integer("num_attention_heads", 16 if sparse else 32, 1, 1024)
    layers = section.integer("num_hidden_layers", 24 if sparse else 32, 1, 1024)
    head_dim = section.integer("head_dim", hidden_size // heads if sparse else 128, 2, 4096)
    max_position = section.integer("max_position_embeddings", 128000, 1, 1 << 24)
    experts: dict[str, Any] = {}
    if sparse:
        name = "num_experts" if "num_experts" in section.values else "num_local_experts"
        count = section.integer(name, 60, 0, 65536)
        experts = {
            "num_experts": count,
            "num_experts_per_tok": section.integer("num_experts_per_tok", 4, 1, max(count, 1)),
            "moe_intermediate_size": section.integer("moe_intermediate_size", 1408, 1, 1 << 20),
            "decoder_sparse_step": section.integer("decoder_sparse_step", 1, 1, 1024),
            "mlp_only_layers": section.integers("mlp_only_layers", (), 0, layers - 1),
        }
    return TextConfig(
        vocab_size=section.integer("vocab_size", 151936, 1, 1 << 22),
        hidden_size=hidden_size,
        intermediate_size=section.integer(
            "intermediate_size", 5632 if sparse else 22016, 1, 1 << 20
        ),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=section.integer("num_key_value_heads", heads, 1, heads),
        head_dim=head_dim,
        max_position_embeddings=max_position,
        rms_norm_eps=section.number("rms_norm_eps", 1e-6, 0.0, 1.0),
        attention_bias=section.flag("attention_bias", default=False),
        rope=_rope(section, max_position),
        **experts,
    )


def _rope(text: Section, max_position: int) -> RopeConfig:
    """`rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (released files)."""
    theta = {key: text.values[key] for key in ("rope_theta",) if key in text.values}
    for key in ("rope_scaling", "rope_parameters"):
        if text.values.get(key) is not None:
            theta |= text.section(key).values
    rope = Section(f"{text.name}rope.", theta)
    rope.refuse_unknown(_ROPE_KEYS)
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind not in ("default", "linear", "yarn"):
        raise rope.fail("rope_type", 'is computed here only as "default", "linear" or "yarn"')
    rope.exactly("mrope_interleaved", True)
    rope.exactly("partial_rotary_factor", 1.0, None)
    section = rope.integers("mrope_section", (24, 20, 20), 0, 4096)
    if len(section) != 3:
        raise rope.fail("mrope_section", "must hold three numbers: time, height, width")
    # The class default of transformers 5 is 5e5; every released file gives 5e6 explicitly.
    plain = RopeConfig(rope.number("rope_theta", 500000.0, 1.001, 1e12), section)
    if kind == "default":
        return plain
    given = rope.values.get("attention_factor")
    return dataclasses.replace(
        plain,
        scaling=kind,
        factor=rope.number("factor", None, 1.0, 1e4),
        attention_factor=None if given is None else rope.number("attention_factor", None, 0.0, 1e4),
        original_max_position_embeddings=rope.integer(
            "original_max_position_embeddings", max_position, 1, 1 << 24
        ),
        beta_fast=rope.number("beta_fast", 32.0, 0.0, 1e4),
        beta_slow=rope.number("beta_slow", 1.0, 0.0, 1e4),
        mscale=rope.number("mscale", 0.0, 0.0, 1e4),
        mscale_all_dim=rope.number("mscale_all_dim", 0.0, 0.0, 1e4),
        truncate=rope.flag("truncate", default=True),
    )


def _check_together(text: TextConfig, vision: VisionConfig) -> None:
    """Rules between settings: each names both numbers."""
    heads, shared = text.num_attention_heads, text.num_key_value_heads
    pairs, section = text.head_dim // 2, list(text.rope.mrope_section)
    levels = vision.deepstack_visual_indexes
    rules = {
        f"num_attention_heads {heads} is not a multiple of num_key_value_heads {shared}": (
            heads % shared == 0
        ),
        f"text head_dim {text.head_dim} is not even": text.head_dim % 2 == 0,
        f"mrope_section {section} sums to {sum(section)}, but head_dim {text.head_dim} has "
        f"{pairs} pairs": sum(section) == pairs,
        f"mrope_section {section} cannot take turns within {pairs} pairs": (
            3 * max(section[1:]) <= pairs + 2
        ),
        f"vision hidden_size {vision.hidden_size} is not a multiple of num_heads "
        f"{vision.num_heads}": vision.hidden_size % vision.num_heads == 0,
        f"vision head_dim {vision.head_dim} is not a multiple of 4": vision.head_dim % 4 == 0,
        f"num_position_embeddings {vision.num_position_embeddings} is not a square": (
            vision.table_side**2 == vision.num_position_embeddings
        ),
        f"vision out_hidden_size {vision.out_hidden_size} differs from text hidden_size "
        f"{text.hidden_size}": vision.out_hidden_size == text.hidden_size,
        f"deepstack_visual_indexes {list(levels)} repeats a block": len(set(levels)) == len(levels),
        f"deepstack_visual_indexes has {len(levels)} blocks, but there are only "
        f"{text.num_hidden_layers} decoder layers to take them": (
            len(levels) <= text.num_hidden_layers
        ),
    }
    for message, holds in rules.items():
        if not holds:
            raise ConfigError(f"config: {message}")
