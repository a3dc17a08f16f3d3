"""config.json: the six official sizes exactly, both dialects, and nothing accepted in silence."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from qwen3vl_jax import weights
from qwen3vl_jax.config import load_config, parse_config
from qwen3vl_jax.errors import ConfigError
from qwen3vl_jax.rope import inverse_frequencies

ROOT = Path(__file__).parents[2]
OFFICIAL = ROOT / "configs" / "models"
TINY = ROOT / "tests" / "data" / "tiny"

# Tensors and parameters of the released files; bytes are 2 per parameter (all bfloat16).
# Counted by transformers 5.23 on torch's meta device. Those of 2B, 4B, 8B, 32B and 30B agree with
# public indices and listings of the released files.
SIZES = {
    "2b": (625, 2_127_532_032, 4_255_064_064),
    "4b": (713, 4_437_815_808, 8_875_631_616),
    "8b": (750, 8_767_123_696, 17_534_247_392),
    "32b": (1058, 33_357_390_064, 66_714_780_128),
    "30b-a3b": (882, 31_070_754_032, 62_141_508_064),
    "235b-a22b": (1388, 235_670_022_896, 471_340_045_792),
}
VISION_PARAMETERS = {
    "2b": 406_957_056,
    "4b": 415_347_712,
    "8b": 576_388_336,
    "32b": 595_266_800,
    "30b-a3b": 538_631_408,
    "235b-a22b": 576_388_336,
}


def official(size: str) -> Path:
    return OFFICIAL / f"qwen3-vl-{size}-instruct.json"


@pytest.mark.parametrize("size", SIZES)
def test_an_official_size_has_exactly_its_tensors_parameters_and_bytes(size: str) -> None:
    table = weights.table(load_config(official(size)))
    parameters = sum(math.prod(entry.shape) for entry in table)
    tensors = len({entry.hf_name for entry in table})
    assert (tensors, parameters, 2 * parameters) == SIZES[size]
    vision = sum(math.prod(entry.shape) for entry in table if entry.path.startswith("visual."))
    assert vision == VISION_PARAMETERS[size]


@pytest.mark.parametrize("blocks", [1, 3, 8])
def test_vocabulary_blocks_change_no_count_and_no_other_name(blocks: int) -> None:
    config = load_config(official("8b"))
    rows = weights.block_rows(config.text.vocab_size, blocks)
    whole, split = weights.table(config), weights.table(config, vocab_rows=rows)
    assert sum(math.prod(entry.shape) for entry in split) == SIZES["8b"][1]
    assert len(split) == len(whole) + 2 * (blocks - 1)
    assert len({entry.path for entry in split}) == len(split)
    assert {entry.hf_name for entry in split} == {entry.hf_name for entry in whole}


def test_every_official_size_is_named_here() -> None:
    assert sorted(path.name for path in OFFICIAL.glob("*.json")) == sorted(
        official(size).name for size in SIZES
    )


@pytest.mark.parametrize(("ours", "theirs"), [("dense", "dense_v4_names"), ("moe", "moe_v4_names")])
def test_both_dialects_say_the_same(ours: str, theirs: str) -> None:
    assert load_config(TINY / ours / "config.json") == load_config(TINY / theirs)


def test_tying_is_taken_from_the_top_level_only() -> None:
    stored = json.loads((TINY / "moe" / "config.json").read_text())
    assert stored["text_config"]["tie_word_embeddings"] is True
    assert load_config(TINY / "moe").tie_word_embeddings is False
    assert load_config(TINY / "dense_tied").tie_word_embeddings is True


def changed(values: dict[str, Any], path: tuple[str, ...], value: object) -> dict[str, Any]:
    """A copy of `values` with one field replaced or added."""
    fresh = copy.deepcopy(values)
    place = fresh
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return fresh


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("text_config", "hidden_act"), "gelu"),
        (("text_config", "norm_topk_prob"), False),
        (("text_config", "sliding_window"), 4096),
        (("text_config", "partial_rotary_factor"), 0.5),
        (("text_config", "rope_scaling", "rope_type"), "longrope"),
        (("text_config", "rope_scaling", "mrope_interleaved"), False),
        (("text_config", "num_shared_experts"), 1),
        (("vision_config", "hidden_act"), "gelu"),
        (("vision_config", "window_size"), 112),
        (("vision_config", "rope_parameters"), {"rope_type": "yarn", "rope_theta": 1e4}),
        (("quantization_config",), {"quant_method": "fp8"}),
        (("model_type",), "qwen2_5_vl"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_a_setting_that_is_not_computed_is_an_error_that_names_it(
    path: tuple[str, ...], value: object
) -> None:
    values = json.loads(official("30b-a3b").read_text())
    with pytest.raises(ConfigError, match=path[-1]) as caught:
        parse_config(changed(values, path, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("text_config", "num_key_value_heads"), 3, "32 is not a multiple.* 3"),
        (("text_config", "rope_scaling", "mrope_section"), [24, 20, 16], "sums to 60.*64 pairs"),
        (("vision_config", "num_position_embeddings"), 2303, "2303 is not a square"),
        (("vision_config", "out_hidden_size"), 4096, "4096 differs from .* 2048"),
        (("vision_config", "deepstack_visual_indexes"), [8, 8, 24], "repeats a block"),
        (("vision_config", "deepstack_visual_indexes"), [8, 16, 27], "from 0 to 26"),
        (("vision_config", "num_heads"), 64, "head_dim 18 is not a multiple of 4"),
        (("text_config", "num_experts_per_tok"), 129, "from 1 to 128"),
        (("image_token_id",), 151936, "from 0 to 151,935"),
    ],
)
def test_a_contradiction_names_both_numbers(
    path: tuple[str, ...], value: object, says: str
) -> None:
    values = json.loads(official("30b-a3b").read_text())
    with pytest.raises(ConfigError, match=says):
        parse_config(changed(values, path, value))


NASTY: list[object] = [
    None, True, False, -1, 0, 1, 2**31, 2**63, 10**400, -(10**400), 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", "1", "\ud800\x00", [], {}, [[1]], {"a": {"b": [None]}},
    [-1, 10**30, "x"], [1.5], "default",
]  # fmt: skip


def fields(values: dict[str, Any], inside: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all settings, objects included."""
    found = []
    for key, value in values.items():
        found.append((*inside, key))
        if isinstance(value, dict):
            found += fields(value, (*inside, key))
    return found


def with_yarn(values: dict[str, Any]) -> dict[str, Any]:
    rope = {
        "rope_type": "yarn", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "factor": 3.0,
        "mrope_interleaved": True, "original_max_position_embeddings": 262144, "truncate": True,
        "attention_factor": None, "beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 1,
    }  # fmt: skip
    text = values["text_config"] | {"rope_parameters": rope, "rope_scaling": None}
    return values | {"text_config": text}


@pytest.mark.parametrize("size", ["2b", "30b-a3b", "yarn"])
def test_nasty_values_give_a_config_or_a_config_error(size: str, tmp_path: Path) -> None:
    values = json.loads(official("2b" if size == "yarn" else size).read_text())
    values = with_yarn(values) if size == "yarn" else values
    parse_config(values)
    messages = []
    for path in fields(values):
        for nasty in NASTY:
            try:
                config = parse_config(json.loads(json.dumps(changed(values, path, nasty))))
                inverse_frequencies(config.text.rope, config.text.head_dim)
            except ConfigError as error:
                messages.append(str(error))
    assert len(messages) > 10 * len(fields(values))
    assert not [message for message in messages if "\n" in message or len(message) > 400]


NO_CONFIG = {
    "empty": "",
    "cut off": "{",
    "a list": "[]",
    "null": "null",
    "a number": "1",
    "no JSON": "nan",
    "deep lists": "[" * 100_000,
    "deep objects": '{"a":' * 900 + "1" + "}" * 900,
    "a huge number": '{"model_type": ' + "9" * 5000 + "}",
    "a zero byte": "\x00",
    "no sections": '{"model_type": "qwen3_vl"}',
    "too large": " " * (2 << 20),
}


@pytest.mark.parametrize("text", NO_CONFIG.values(), ids=NO_CONFIG)
def test_a_file_that_is_no_config_is_a_config_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_config(path)


@pytest.mark.parametrize("depth", [500, 990, 3000])
def test_a_deeply_nested_value_is_a_config_error(depth: int, tmp_path: Path) -> None:
    text = official("2b").read_text().replace('"tie_word_embeddings": true,', "", 1)
    nested = text.rstrip().removesuffix("}") + ', "tie_word_embeddings": ' + "[" * depth
    path = tmp_path / "config.json"
    path.write_text(nested + "]" * depth + "}")
    with pytest.raises(ConfigError):
        load_config(path)


def test_a_directory_without_a_config_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_config(tmp_path)


def test_bytes_that_are_no_text_are_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ConfigError):
        load_config(tmp_path)
