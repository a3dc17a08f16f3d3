"""Settings from generation_config.json and from a caller: names, types, ranges, what is refused."""

import json
from pathlib import Path

import pytest
import tiny
import transformers

from qwen3vl_jax.errors import ConfigError, UsageError
from qwen3vl_jax.generation_settings import GenerationSettings, load_settings


def settings_file(folder: Path, **values: object) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def test_the_released_file_gives_the_released_settings(tmp_path: Path) -> None:
    released = {
        "bos_token_id": 151643,
        "pad_token_id": 151643,
        "do_sample": True,
        "eos_token_id": [151645, 151643],
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.0,
        "temperature": 0.7,
        "transformers_version": "4.56.0",
    }
    assert load_settings(settings_file(tmp_path, **released)) == GenerationSettings(
        do_sample=True,
        temperature=0.7,
        top_k=20,
        top_p=0.8,
        eos_token_id=(151645, 151643),
        pad_token_id=151643,
    )


def test_defaults_are_those_of_transformers() -> None:
    theirs = transformers.GenerationConfig()._get_default_generation_params()
    ours = GenerationSettings()
    for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty"):
        assert getattr(ours, name) == theirs[name], name


def test_without_the_file_the_end_tokens_come_from_config_json(tmp_path: Path) -> None:
    text = {"eos_token_id": 7, "pad_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text, "pad_token_id": 3}))
    settings = load_settings(tmp_path)
    assert (settings.eos_token_id, settings.do_sample) == ((7,), False)


def test_the_tiny_checkpoints_settings_are_read() -> None:
    settings = load_settings(tiny.DATA / "dense")
    assert (settings.eos_token_id, settings.pad_token_id, settings.top_k) == ((386, 384), 384, 20)


BAD_VALUES: dict[str, list[object]] = {
    "max_new_tokens": [0, -1, 1.5, True, "5", 1 << 40],
    "do_sample": [1, "yes"],
    "temperature": [-0.1, float("nan"), float("inf"), "hot", True],
    "top_k": [-1, 2.0, "all"],
    "top_p": [-0.1, 1.1, "x"],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0.0, -1.0, float("nan")],
    "presence_penalty": [-2.1, 3.0],
    "seed": [-1, 1 << 32, 0.5],
    "eos_token_id": [-1, [1, -2], "end", [None]],
    "pad_token_id": [-1, "pad"],
    "stop_strings": ["", ["ok", ""], [3], [str(i) for i in range(100)]],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BAD_VALUES.items() for value in values],
    ids=str,
)
def test_values_of_a_wrong_type_or_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        GenerationSettings().override(**{name: value})


UNSUPPORTED: dict[str, object] = {
    "num_beams": 4,
    "num_return_sequences": 2,
    "min_new_tokens": 5,
    "no_repeat_ngram_size": 3,
    "typical_p": 0.9,
    "bad_words_ids": [[3]],
    "suppress_tokens": [1],
    "guidance_scale": 1.5,
    "max_length": 100,
    "return_dict_in_generate": True,
    "watermarking_config": {},
}


@pytest.mark.parametrize(("name", "value"), UNSUPPORTED.items())
def test_settings_that_are_not_computed_are_errors_that_name_them(
    name: str, value: object, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"'{name}' = .* is not computed here"):
        GenerationSettings().override(**{name: value})
    with pytest.raises(ConfigError, match=rf"generation_config\.json: .*'{name}'"):
        load_settings(settings_file(tmp_path, **{name: value}))


def test_every_default_of_transformers_is_accepted(tmp_path: Path) -> None:
    theirs = transformers.GenerationConfig()._get_default_generation_params()
    assert load_settings(settings_file(tmp_path, **theirs)) == GenerationSettings()


def test_a_misspelt_setting_is_refused_with_the_name_that_was_meant() -> None:
    with pytest.raises(UsageError, match="'temprature' does not exist; did you mean 'temperature'"):
        GenerationSettings().override(temprature=1.0)


def test_a_temperature_turns_sampling_on_or_off() -> None:
    assert GenerationSettings().override(temperature=0.5).greedy is False
    assert GenerationSettings(do_sample=True).override(temperature=0.0).greedy is True
    assert GenerationSettings().override(temperature=0.5, do_sample=False).greedy is True
    assert GenerationSettings(do_sample=True).override(temperature=None).greedy is False


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, "nan"])
def test_a_settings_file_that_is_no_json_object_is_one_clear_line(
    content: str, tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"generation_config\.json: ") as caught:
        load_settings(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_directory_without_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        load_settings(tmp_path)
