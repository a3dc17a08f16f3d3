"""The loop, on a model whose next token is known: a table says which token follows which."""

import dataclasses
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tokenizers
import transformers

from qwen3vl_jax.errors import BadInputError, UsageError
from qwen3vl_jax.generation import GenerationSettings, Session, generate, split_arguments

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

    def new_cache(self, *, batch: int, capacity: int, prompt_tokens: int | None = None) -> Any:
        return types.SimpleNamespace(batch=batch, capacity=capacity, length=0, used=False)

    def recall(self, inputs: dict[str, Any], cache: Any) -> None:
        return None

    def encode(self, inputs: dict[str, Any], *, recall: None) -> None:
        return None

    def prefill(
        self, inputs: dict[str, Any], cache: Any, *, features: None, recall: None
    ) -> tuple[Any, Any]:
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


# ---- with the real model ----

GROWTH = """
import dataclasses, gc, sys
import numpy as np, psutil
from qwen3vl_jax import Qwen3VL
from qwen3vl_jax.generation import GenerationSettings, Session

gc.disable()
model = Qwen3VL.from_pretrained(sys.argv[1])
settings = GenerationSettings(
    max_new_tokens=2200, do_sample=True, seed=1, repetition_penalty=1.1, presence_penalty=0.5
)
session = Session(model, batch=2, capacity=2210)
session.prompt({"input_ids": np.array([[5, 6, 7], [8, 9, 10]])}, capacity=2210)
rss = psutil.Process().memory_info
for index, step in enumerate(session.answer(settings)):
    if index == 200:
        before = rss().rss
print(index + 1 - 200, rss().rss - before)
"""


def test_two_thousand_tokens_without_a_garbage_collector_add_at_most_20_megabytes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, tiny.DATA / "dense"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tokens, growth_bytes = map(int, done.stdout.split())
    assert tokens == 2000
    assert growth_bytes <= 20_000_000


def test_rows_of_a_padded_batch_answer_as_they_do_alone(tiny_model: Any) -> None:
    model = tiny_model("dense")
    settings = GenerationSettings(max_new_tokens=8)
    short, long = [5, 9, 20], [30, 31, 32, 33, 34, 35, 36]
    padded = {
        "input_ids": np.array([[384] * 4 + short, long]),
        "attention_mask": np.array([[0] * 4 + [1] * 3, [1] * 7]),
    }
    together = generate(model, padded, settings)[:, 7:]
    for row, ids in enumerate((short, long)):
        alone = generate(model, prompt(ids), settings)[0, len(ids) :]
        np.testing.assert_array_equal(together[row], alone)


def test_greedy_tokens_are_the_best_of_the_whole_forward_pass(tiny_model: Any) -> None:
    model = tiny_model("dense")
    tokens = generate(model, prompt([40, 41, 42]), GenerationSettings(max_new_tokens=8))
    best = np.asarray(model(input_ids=tokens)).argmax(axis=-1)
    np.testing.assert_array_equal(tokens[:, 3:], best[:, 2:-1])
