"""The loop, on a model whose next token is known: a table says which token follows which."""

import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tokenizers
import transformers

from qwen3vl_jax.errors import BadInputError, ConfigError, UsageError
from qwen3vl_jax.generation import GenerationSettings, Session, generate, split_arguments
from qwen3vl_jax.generation_settings import load_settings

VOCAB = 12
END, PAD = 9, 10
# 1 -> 2 -> 3 -> 4 -> END; 5 -> 6 -> END; 7 -> 7 for ever; 0 -> NaN.
FOLLOWS = {1: 2, 2: 3, 3: 4, 4: END, 5: 6, 6: END, 7: 7, END: 1, PAD: PAD}


class TableModel:
    """Looks like `Qwen3VL` to the loop. Checks that the cache is passed on and has room."""

    def __init__(self, positions: int = 1000) -> None:
        text = types.SimpleNamespace(vocab_size=VOCAB, max_position_embeddings=positions)
        self.config = types.SimpleNamespace(text=text)
        self.decoded: list[list[int]] = []
        self.prompts: list[list[list[int]]] = []

    def new_cache(self, *, batch: int, capacity: int) -> Any:
        return types.SimpleNamespace(batch=batch, capacity=capacity, length=0, used=False)

    def encode(self, inputs: dict[str, Any]) -> None:
        return None

    def prefill(self, inputs: dict[str, Any], cache: Any, *, features: None) -> tuple[Any, Any]:
        ids = np.asarray(inputs["input_ids"])
        self.prompts.append(ids.tolist())
        return self._logits(ids[:, -1]), self._next(cache, ids.shape[1])

    def decode(self, tokens: np.ndarray, cache: Any) -> tuple[Any, Any]:
        assert tokens.dtype == np.int32
        assert tokens.shape == (cache.batch,)
        self.decoded.append(tokens.tolist())
        return self._logits(tokens), self._next(cache, 1)

    def _next(self, cache: Any, more: int) -> Any:
        assert not cache.used
        cache.used = True
        assert cache.length + more <= cache.capacity
        return types.SimpleNamespace(
            **{**vars(cache), "length": cache.length + more, "used": False}
        )

    def _logits(self, last: np.ndarray) -> Any:
        logits = np.zeros((len(last), VOCAB), np.float32)
        for row, token in enumerate(last.tolist()):
            if token == 0:
                logits[row] = np.nan
            else:
                logits[row, FOLLOWS[token]] = 5.0
        return jnp.array(logits)


class Letters:
    """A tokenizer whose token 1 is 'a', 2 'b' and so on; END and PAD are special."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        return "".join("" if i in (END, PAD) else chr(ord("a") + i - 1) for i in ids)


GREEDY = GenerationSettings(max_new_tokens=6, eos_token_id=(END,), pad_token_id=PAD)


def prompt(*rows: list[int]) -> dict[str, np.ndarray]:
    return {"input_ids": np.array(rows, np.int64)}


def test_greedy_answers_end_with_an_end_token() -> None:
    model = TableModel()
    tokens = generate(model, prompt([7, 1]), GREEDY)
    assert tokens.tolist() == [[7, 1, 2, 3, 4, END]]
    # The end token need not be computed with, nor fed back.
    assert model.decoded == [[2], [3], [4]]


def test_an_answer_ends_after_max_new_tokens() -> None:
    tokens = generate(TableModel(), prompt([7]), dataclasses.replace(GREEDY, max_new_tokens=3))
    assert tokens.tolist() == [[7, 7, 7, 7]]


@pytest.mark.parametrize("ends", [(END, 3), (3,), (3, 0)])
def test_any_token_of_a_list_of_ends_ends_an_answer(ends: tuple[int, ...]) -> None:
    settings = dataclasses.replace(GREEDY, eos_token_id=ends)
    assert generate(TableModel(), prompt([1]), settings).tolist() == [[1, 2, 3]]


def test_rows_that_finish_early_are_padded_and_stay_finished() -> None:
    model = TableModel()
    tokens = generate(model, prompt([PAD, 5], [7, 1], [7, 7]), GREEDY)
    assert tokens.tolist() == [
        [PAD, 5, 6, END, PAD, PAD, PAD, PAD],
        [7, 1, 2, 3, 4, END, PAD, PAD],
        [7, 7, 7, 7, 7, 7, 7, 7],
    ]
    assert model.decoded[2] == [PAD, 4, 7]


def test_a_batch_ends_with_its_last_row() -> None:
    tokens = generate(TableModel(), prompt([5], [1]), GREEDY)
    assert tokens.tolist() == [[5, 6, END, PAD, PAD], [1, 2, 3, 4, END]]


def test_without_a_pad_token_the_first_end_token_pads() -> None:
    settings = dataclasses.replace(GREEDY, pad_token_id=None)
    assert generate(TableModel(), prompt([5], [1]), settings)[0].tolist() == [5, 6, END, END, END]


def test_a_stop_string_ends_an_answer_and_its_last_token_is_kept() -> None:
    settings = dataclasses.replace(GREEDY, stop_strings=("zz", "bc"))
    tokens = generate(TableModel(), prompt([1], [5]), settings, tokenizer=Letters())
    assert tokens.tolist() == [[1, 2, 3], [5, 6, END]]


def test_stop_strings_without_a_tokenizer_are_refused() -> None:
    settings = dataclasses.replace(GREEDY, stop_strings=("x",))
    with pytest.raises(UsageError, match="need the tokenizer"):
        generate(TableModel(), prompt([1]), settings)


def test_logits_that_are_not_finite_are_an_error_that_names_row_and_token() -> None:
    with pytest.raises(BadInputError, match="new token 0, row 1, are not finite"):
        generate(TableModel(), prompt([1], [0]), GREEDY)


def test_an_answer_beyond_the_models_positions_is_refused_with_what_would_fit() -> None:
    with pytest.raises(UsageError, match="lower max_new_tokens to 4"):
        generate(TableModel(positions=6), prompt([1, 2]), GREEDY)


def test_penalties_count_the_prompt_or_the_answer_from_step_to_step() -> None:
    # A second choice 5.0 - 1.5 behind: 7 gives way to 1 after it was seen, or used once.
    model = TableModel()
    table = np.zeros((1, VOCAB), np.float32)
    table[0, [7, 1]] = 5.0, 3.5
    model._logits = lambda last: jnp.array(table)  # type: ignore[method-assign]
    seen = dataclasses.replace(GREEDY, repetition_penalty=2.0, max_new_tokens=3)
    assert generate(model, prompt([7]), seen).tolist() == [[7, 1, 7, 7]]
    assert generate(model, prompt([3]), seen).tolist() == [[3, 7, 1, 7]]
    used = dataclasses.replace(GREEDY, presence_penalty=2.0, max_new_tokens=3)
    assert generate(model, prompt([7]), used).tolist() == [[7, 7, 1, 7]]


def test_sampling_with_a_seed_is_repeatable_and_without_one_is_not() -> None:
    settings = GenerationSettings(max_new_tokens=60, do_sample=True, temperature=100.0, seed=5)
    # At this temperature all tokens are about equally likely; 0 would end in NaN and is left out.
    model = TableModel()
    model._logits = lambda last: jnp.zeros((len(last), VOCAB), jnp.float32)  # type: ignore[method-assign]
    first = generate(model, prompt([1]), settings)
    np.testing.assert_array_equal(first, generate(model, prompt([1]), settings))
    unseeded = dataclasses.replace(settings, seed=None)
    assert (generate(model, prompt([1]), unseeded) != generate(model, prompt([1]), unseeded)).any()


def test_a_session_keeps_its_cache_from_turn_to_turn() -> None:
    model = TableModel()
    session = Session(model, batch=1, capacity=20)
    session.prompt(prompt([7, 1]), capacity=20)
    assert [step.tokens.tolist() for step in session.answer(GREEDY)] == [[2], [3], [4], [END]]
    assert session.unfed is not None
    assert session.unfed.tolist() == [END]
    assert session.length == 5
    session.prompt(prompt([END, 5]), capacity=20)
    assert [step.tokens.tolist() for step in session.answer(GREEDY)] == [[6], [END]]
    assert model.prompts == [[[7, 1]], [[END, 5]]]
    assert session.length == 8


def test_a_session_left_after_a_step_is_intact_and_after_an_interrupted_one_is_not() -> None:
    model = TableModel()
    session = Session(model, batch=1, capacity=20)
    session.prompt(prompt([7]), capacity=20)
    for _ in session.answer(GREEDY):
        break
    assert session.intact

    def interrupted(tokens: np.ndarray, cache: Any) -> Any:
        raise KeyboardInterrupt

    model.decode = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        list(session.answer(GREEDY))
    assert not session.intact


def test_arguments_of_one_call_are_told_apart() -> None:
    inputs, settings = split_arguments({"input_ids": 1, "pixel_values": 2, "max_new_tokens": 3})
    assert (inputs, settings) == ({"input_ids": 1, "pixel_values": 2}, {"max_new_tokens": 3})


class Recorder:
    """A streamer that keeps what it was given."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: Any) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.got.append("end")


def test_a_streamer_gets_the_prompt_then_every_step_then_the_end() -> None:
    streamer = Recorder()
    generate(TableModel(), prompt([7, 5], [7, 6]), GREEDY, streamer=streamer)
    assert streamer.got == [[[7, 5], [7, 6]], [6, END], [END, PAD], "end"]


def test_a_streamer_is_ended_when_generation_fails() -> None:
    streamer = Recorder()
    with pytest.raises(BadInputError):
        generate(TableModel(), prompt([0]), GREEDY, streamer=streamer)
    assert streamer.got == [[[0]], "end"]


def letter_tokenizer() -> Any:
    vocabulary = {chr(ord("a") + i - 1): i for i in range(1, 9)} | {"<end>": END, "<pad>": PAD}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(["<end>", "<pad>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


def test_transformers_text_streamer_prints_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    streamer = transformers.TextStreamer(
        letter_tokenizer(), skip_prompt=True, skip_special_tokens=True
    )
    generate(TableModel(), prompt([7, 1]), GREEDY, streamer=streamer)
    assert capsys.readouterr().out == "bcd\n"


def test_transformers_text_iterator_streamer_hands_over_the_answer() -> None:
    streamer = transformers.TextIteratorStreamer(letter_tokenizer(), skip_prompt=False)
    generate(TableModel(), prompt([7, 1]), GREEDY, streamer=streamer)
    assert "".join(streamer) == "gabcd<end>"


# ---- settings ----


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
