"""Drafts change how often the model is run, and nothing else.

The oracle is generation without drafts. A model whose next token depends on every token in its
cache shows a token that was forgotten, or one that should have been.
"""

import dataclasses
import types
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import hypothesis.strategies as some
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny

from qwen3vl_jax import Processor, Qwen3VL, UsageError
from qwen3vl_jax.chat import Chat
from qwen3vl_jax.drafting import DRAFT_TOKENS, propose, propose_rows
from qwen3vl_jax.generation import GenerationSettings, Session, generate
from qwen3vl_jax.generation_settings import load_settings

VOCAB = 8
END, PAD = 6, 7
GetModel = Callable[..., Qwen3VL]


def naive_draft(told: Sequence[int], count: int) -> list[int] | None:
    for length in (3, 2):
        for end in range(len(told) - 1, length - 1, -1):
            if list(told[end - length : end]) == list(told[-length:]):
                longer = list(told)
                for place in range(end, end + count):
                    longer.append(longer[place])
                return longer[len(told) :]
    return None


@hypothesis.given(some.lists(some.integers(0, 2), min_size=1, max_size=14), some.integers(1, 9))
def test_a_draft_is_what_followed_the_latest_longest_match(told: list[int], count: int) -> None:
    draft = propose(np.array(told, np.int32), count)
    assert (None if draft is None else draft.tolist()) == naive_draft(told, count)


@pytest.mark.parametrize(
    ("told", "draft"),
    [
        ([1, 2, 3, 9, 1, 2], [3, 9, 1, 2]),
        ([1, 2, 3, 4, 5, 2, 3, 6, 1, 2, 3], [4, 5, 2, 3]),
        ([5, 5, 5], [5, 5, 5, 5]),
        ([1, 2, 3, 4], None),
        ([1, 2, 3, 2], None),
        ([4], None),
    ],
    ids=["goes on with itself", "longest before latest", "one token", "new", "one alone", "short"],
)
def test_a_draft_of_four(told: list[int], draft: list[int] | None) -> None:
    found = propose(np.array(told, np.int32), 4)
    assert (None if found is None else found.tolist()) == draft


def test_rows_are_drafted_together_and_finished_ones_with_padding() -> None:
    told = [np.array(row, np.int32) for row in ([1, 2, 1, 2], [3, 4, 5], [6, 6, 6])]
    over = np.array([False, True, False])
    draft = propose_rows(told, over, 3, padding=PAD)
    assert draft is not None
    assert draft.tolist() == [[1, 2, 1], [PAD] * 3, [6, 6, 6]]
    assert propose_rows(told, np.zeros(3, bool), 3, padding=PAD) is None


# ---- a model that remembers every token ----


class Remembering:
    """Looks like `Qwen3VL` to the loop. The next token depends on all tokens in the cache.

    It counts up to `period`, and now and then, by what it remembers, does something else.
    """

    def __init__(self, period: int = 4, stray: int = 5) -> None:
        text = types.SimpleNamespace(vocab_size=VOCAB, max_position_embeddings=1000)
        self.config = types.SimpleNamespace(text=text)
        self.period, self.stray = period, stray
        self.widths: list[int] = []

    def new_cache(self, *, batch: int, capacity: int, prompt_tokens: int | None = None) -> Any:
        return self._cache([[] for _ in range(batch)], capacity)

    def recall(self, inputs: dict[str, Any], cache: Any) -> None:
        return None

    def encode(self, inputs: dict[str, Any], *, recall: None) -> None:
        return None

    def prefill(
        self, inputs: dict[str, Any], cache: Any, *, features: None, recall: None
    ) -> tuple[Any, Any]:
        scores, cache = self._take(np.asarray(inputs["input_ids"]), cache)
        return jnp.array(scores[:, -1]), cache

    def decode(self, tokens: np.ndarray, cache: Any) -> tuple[Any, Any]:
        scores, cache = self.verify(tokens[:, None], cache)
        return scores[:, 0], cache

    def verify(self, tokens: np.ndarray, cache: Any) -> tuple[Any, Any]:
        assert tokens.dtype == np.int32
        self.widths.append(tokens.shape[1])
        scores, cache = self._take(tokens, cache)
        return jnp.array(scores), cache

    def forget(self, cache: Any, tokens: int) -> Any:
        self._use(cache)
        return self._cache([row[: len(row) - tokens] for row in cache.rows], cache.capacity)

    def _take(self, ids: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
        self._use(cache)
        rows = [list(row) for row in cache.rows]
        scores = np.zeros((*ids.shape, VOCAB), np.float32)
        for column in range(ids.shape[1]):
            for row, told in enumerate(rows):
                told.append(int(ids[row, column]))
                scores[row, column, self._next(told)] = 3.0
        assert len(rows[0]) <= cache.capacity
        return scores, self._cache(rows, cache.capacity)

    def _next(self, told: list[int]) -> int:
        remembered = sum(token * place for place, token in enumerate(told, 1))
        if remembered % self.stray == 0:
            return remembered % 7
        return (told[-1] + 1) % self.period

    @staticmethod
    def _use(cache: Any) -> None:
        assert not cache.used
        cache.used = True

    @staticmethod
    def _cache(rows: list[list[int]], capacity: int) -> Any:
        length = len(rows[0])
        return types.SimpleNamespace(
            rows=rows,
            batch=len(rows),
            capacity=capacity,
            length=length,
            room=capacity - length,
            used=False,
        )


PLAIN = GenerationSettings(max_new_tokens=30, eos_token_id=(END,), pad_token_id=PAD)
DRAFTED = dataclasses.replace(PLAIN, draft="prompt-lookup")


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    rows=some.integers(1, 3).flatmap(
        lambda size: some.lists(
            some.lists(some.integers(0, 5), min_size=size, max_size=size), min_size=1, max_size=3
        )
    ),
    period=some.integers(1, 6),
    stray=some.sampled_from([3, 11, 29, 1009]),
    count=some.integers(1, 40),
    temperature=some.sampled_from([0.0, 0.6]),
    penalty=some.sampled_from([0.0, 1.5]),
)
def test_tokens_are_those_without_drafts(
    rows: list[list[int]], period: int, stray: int, count: int, temperature: float, penalty: float
) -> None:
    plain = PLAIN.override(
        max_new_tokens=count, temperature=temperature, presence_penalty=penalty, seed=1
    )
    wanted = generate(Remembering(period, stray), {"input_ids": np.array(rows)}, plain)
    drafted = plain.override(draft="prompt-lookup")
    found = generate(Remembering(period, stray), {"input_ids": np.array(rows)}, drafted)
    np.testing.assert_array_equal(found, wanted)


def session_of(model: Any, prompt: list[int], *, capacity: int) -> Session:
    session = Session(model, batch=1, capacity=capacity)
    session.prompt({"input_ids": np.array([prompt])}, capacity=capacity)
    return session


def test_a_repetitive_answer_takes_one_pass_for_eight_tokens() -> None:
    model = Remembering(period=4, stray=10**9)
    session = session_of(model, [0, 1, 2, 3, 0, 1], capacity=100)
    settings = dataclasses.replace(DRAFTED, max_new_tokens=34)
    answer = [int(step.tokens[0]) for step in session.answer(settings)]
    assert answer == [(2 + place) % 4 for place in range(34)]
    # 33 tokens are fed: 8 a pass, and one more pass for the last of them.
    assert model.widths == [1 + DRAFT_TOKENS] * 5
    assert (session.drafts.passes, session.drafts.drafted, session.drafts.accepted) == (5, 35, 28)
    assert session.length == 6 + 33


def test_all_passes_of_several_tokens_have_one_width() -> None:
    model = Remembering(period=3, stray=7)
    session = session_of(model, [0, 1, 2, 0, 1], capacity=100)
    list(session.answer(dataclasses.replace(DRAFTED, max_new_tokens=60, eos_token_id=())))
    assert set(model.widths) == {1, 1 + DRAFT_TOKENS}


def test_where_the_cache_ends_tokens_are_fed_one_by_one() -> None:
    model = Remembering(period=2, stray=10**9)
    session = session_of(model, [0, 1, 0, 1], capacity=4 + 12)
    assert len(list(session.answer(dataclasses.replace(DRAFTED, max_new_tokens=13)))) == 13
    assert model.widths == [8, 1, 1, 1, 1]
    assert session.length == session.capacity == 16


def test_rows_accept_as_many_tokens_as_the_least_lucky_one() -> None:
    class Two(Remembering):
        """Row 0 counts on; row 1 stops counting at its tenth token."""

        def _next(self, told: list[int]) -> int:
            return 5 if told[0] == 1 and len(told) == 9 else (told[-1] + 1) % 2

    model = Two()
    session = Session(model, batch=2, capacity=60)
    session.prompt({"input_ids": np.array([[0, 1, 0, 1], [1, 0, 1, 0]])}, capacity=60)
    settings = dataclasses.replace(DRAFTED, max_new_tokens=9)
    rows = np.stack([step.tokens for step in session.answer(settings)], axis=1)
    assert rows.tolist() == [[0, 1, 0, 1, 0, 1, 0, 1, 0], [1, 0, 1, 0, 1, 5, 0, 1, 0]]
    # The draft's first four were right in both rows; [5, 0] never came before in row 1.
    assert session.drafts.accepted >= 4
    assert model.widths[:2] == [8, 1]


def test_an_answer_left_early_is_followed_as_if_there_had_been_no_draft() -> None:
    def second_answer(settings: GenerationSettings) -> tuple[list[list[int]], int]:
        session = session_of(Remembering(period=4, stray=9), [0, 1, 2, 3, 0, 1], capacity=80)
        for index, _ in enumerate(session.answer(settings)):
            if index == 3:
                break
        length = session.length
        session.prompt({"input_ids": np.array([[3, 2, 1]])}, capacity=80)
        return [step.tokens.tolist() for step in session.answer(settings)], length

    assert second_answer(DRAFTED) == second_answer(PLAIN)


def test_an_interrupted_pass_leaves_the_session_not_intact() -> None:
    model = Remembering(period=2, stray=10**9)
    session = session_of(model, [0, 1, 0, 1], capacity=50)

    def interrupted(tokens: np.ndarray, cache: Any) -> Any:
        raise KeyboardInterrupt

    model.verify = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        list(session.answer(DRAFTED))
    assert not session.intact


def test_a_way_of_drafting_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="draft 'model' is not one of prompt-lookup"):
        PLAIN.override(draft="model")


# ---- the real model, float32 ----


def again(seed: int) -> np.ndarray:
    """Six tokens three times over; the tiny model repeats itself after these."""
    return np.tile(np.random.default_rng(seed).integers(10, 380, 6), 3)[None]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_model_says_the_same_with_drafts(seed: int, tiny_model: GetModel) -> None:
    model, settings = tiny_model("dense"), GenerationSettings(max_new_tokens=60)

    def said(settings: GenerationSettings) -> tuple[list[int], Session]:
        session = Session(model, batch=1, capacity=90)
        session.prompt({"input_ids": again(seed)}, capacity=90)
        return [int(step.tokens[0]) for step in session.answer(settings)], session

    wanted, plain = said(settings)
    found, drafted = said(dataclasses.replace(settings, draft="prompt-lookup"))
    assert found == wanted
    assert drafted.length == plain.length == 18 + 59
    assert 0 < drafted.drafts.accepted < drafted.drafts.drafted


@pytest.mark.parametrize(("name", "case"), [("dense", "batch_left"), ("moe_mixed", "text")])
def test_drafts_that_are_partly_wrong_change_nothing(
    name: str, case: str, tiny_model: GetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = tiny_model(name), tiny.inputs(case)
    start, count = given["input_ids"].shape[1], 14
    wanted = model.generate(**given, max_new_tokens=count, do_sample=False)
    widths = []

    def guess(told: Any, finished: np.ndarray, count: int, *, padding: int) -> np.ndarray:
        # The answer itself, wrong from the fourth token on in every row, or the second in one.
        fed = min(len(row) for row in told) - given["attention_mask"].sum(axis=1).min()
        draft = np.zeros((len(told), count), np.int32)
        ahead = wanted[:, start + fed : start + fed + 3]
        draft[:, : ahead.shape[1]] = ahead
        draft[-1, 1] += len(widths) % 2
        widths.append(ahead.shape[1])
        return draft

    monkeypatch.setattr("qwen3vl_jax.generation.propose_rows", guess)
    found = model.generate(**given, max_new_tokens=count, do_sample=False, draft="prompt-lookup")
    np.testing.assert_array_equal(found, wanted)
    # A pass says four tokens and two, in turns: of 13 tokens that are fed, 5 start a pass.
    assert len(widths) == 5


def test_tokens_in_one_pass_are_tokens_one_by_one(tiny_model: GetModel) -> None:
    model, given = tiny_model("dense"), tiny.inputs("batch_left")
    batch, count = given["input_ids"].shape
    new = np.random.default_rng(3).integers(0, 384, (batch, 5)).astype(np.int32)

    def cache() -> Any:
        return model.prefill(given, model.new_cache(batch=batch, capacity=count + 8))[1]

    scores, together = model.verify(new, cache())
    apart = cache()
    for column in range(5):
        wanted, apart = model.decode(new[:, column], apart)
        found = parity.relative(np.asarray(scores[:, column]), np.asarray(wanted))
        assert found < parity.TOLERANCE
    assert together.length == apart.length
    np.testing.assert_array_equal(together.next_position, apart.next_position)
    np.testing.assert_array_equal(together.valid, apart.valid)


def test_forgotten_tokens_leave_no_trace(tiny_model: GetModel) -> None:
    model, given = tiny_model("dense"), tiny.inputs("batch_left")
    batch, count = given["input_ids"].shape

    def cache() -> Any:
        return model.prefill(given, model.new_cache(batch=batch, capacity=count + 8))[1]

    tried = np.full((batch, 4), 100, np.int32)
    tried[:, 0] = 17
    _, after = model.verify(tried, cache())
    after = model.forget(after, 3)
    _, never = model.decode(tried[:, 0], cache())
    assert after.length == never.length
    np.testing.assert_array_equal(after.valid, never.valid)
    np.testing.assert_array_equal(after.next_position, never.next_position)
    found, _ = model.decode(np.full(batch, 18, np.int32), after)
    wanted, _ = model.decode(np.full(batch, 18, np.int32), never)
    assert parity.relative(np.asarray(found), np.asarray(wanted)) < parity.TOLERANCE


def test_a_conversation_says_the_same_with_drafts(tiny_model: GetModel) -> None:
    model = tiny_model("dense")
    processor = Processor.from_pretrained(tiny.DATA / "dense")
    plain = load_settings(tiny.DATA / "dense").override(do_sample=False, max_new_tokens=16)

    def said(settings: GenerationSettings) -> list[str]:
        chat = Chat(processor, settings)
        answers = []
        for words in ("one two one two one two", "and again: one two one"):
            turn = chat.prepare([{"type": "text", "text": words}])
            answers.append("".join(chat.ask(model, turn)))
        return answers

    assert said(plain.override(draft="prompt-lookup")) == said(plain)
