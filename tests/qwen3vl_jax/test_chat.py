"""A conversation that keeps its cache says what one that starts over would say."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny

from qwen3vl_jax import Processor, PromptError, UsageError
from qwen3vl_jax.chat import Chat, Turn
from qwen3vl_jax.generation import GenerationSettings, generate
from qwen3vl_jax.generation_settings import load_settings

MODEL = tiny.DATA / "dense"
GREEDY = dataclasses.replace(load_settings(MODEL), do_sample=False, max_new_tokens=6)
PICTURE = np.random.default_rng(0).integers(0, 255, (64, 96, 3)).astype(np.uint8)


def text(words: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": words}]


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("dense")


def asked(chat: Chat, model: Any, content: list[dict[str, Any]], **more: Any) -> tuple[Turn, str]:
    turn = chat.prepare(content)
    return turn, "".join(chat.ask(model, turn, **more))


def ids_of(turn: Turn) -> list[int]:
    return turn.inputs["input_ids"][0].tolist()


def test_later_turns_feed_only_what_is_new_and_answer_as_if_all_was_fed(
    model: Any, processor: Processor
) -> None:
    chat = Chat(processor, GREEDY, system="be brief")
    first, _ = asked(chat, model, [{"type": "image", "image": PICTURE}, *text("what is it?")])
    assert chat.last is not None
    before = list(chat.last.tokens)
    assert not first.continues
    assert chat.cached_tokens == len(ids_of(first)) + len(before) - 1

    second, _ = asked(chat, model, [*text("and this?"), {"type": "image", "image": PICTURE}])
    assert second.continues
    assert second.inputs["image_grid_thw"].shape == (1, 3)
    # The last token of the answer had been chosen, but not yet fed.
    assert ids_of(second)[0] == before[-1]

    together = {
        "input_ids": np.array([ids_of(first) + before[:-1] + ids_of(second)]),
        **{
            name: np.concatenate([first.inputs[name], second.inputs[name]])
            for name in ("pixel_values", "image_grid_thw")
        },
    }
    expected = generate(model, together, GREEDY)[0, together["input_ids"].shape[1] :]
    assert chat.last.tokens == tuple(expected.tolist())


def test_the_text_streamed_is_the_text_of_the_tokens(model: Any, processor: Processor) -> None:
    chat = Chat(processor, GREEDY)
    _, said = asked(chat, model, text("hello"))
    assert chat.last is not None
    assert said == chat.last.text == processor.decode(chat.last.tokens)
    assert chat.last.ending == "length"
    prompt = processor([{"role": "user", "content": "hello"}])["input_ids"]
    assert chat.last.prompt_tokens == prompt.shape[1]
    assert chat.last.prefill_s > 0
    assert chat.last.tokens_per_s is not None


def test_an_answer_can_be_stopped_and_the_conversation_goes_on(
    model: Any, processor: Processor
) -> None:
    chat = Chat(processor, GREEDY)
    asked(chat, model, text("hello"), should_stop=lambda: True)
    assert chat.last is not None
    assert (len(chat.last.tokens), chat.last.ending) == (1, "interrupted")
    turn, _ = asked(chat, model, text("go on"))
    assert turn.continues
    assert len(chat.last.tokens) == 6


def test_a_stop_string_ends_the_answer_and_is_not_shown(model: Any, processor: Processor) -> None:
    chat = Chat(processor, GREEDY)
    _, whole = asked(chat, model, text("hello"))
    stop = whole[2:4]
    chat = Chat(processor, dataclasses.replace(GREEDY, stop_strings=(stop,)))
    _, said = asked(chat, model, text("hello"))
    assert chat.last is not None
    assert (said, chat.last.ending) == (whole[: whole.index(stop)], "stop")


def test_clear_forgets_all_but_the_system_prompt(model: Any, processor: Processor) -> None:
    chat = Chat(processor, GREEDY, system="be brief")
    fresh = ids_of(chat.prepare(text("hello")))
    asked(chat, model, text("first"))
    chat.clear()
    assert (chat.cached_tokens, chat.last) == (0, None)
    assert ids_of(chat.prepare(text("hello"))) == fresh


def test_an_interrupted_prompt_is_forgotten_and_the_next_one_starts_over(
    model: Any, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(processor, GREEDY)
    _, answer = asked(chat, model, text("first"))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    turn = chat.prepare(text("second"))
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "prefill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(chat.ask(model, turn))
    again = chat.prepare(text("third"))
    assert not again.continues
    history = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "third"},
    ]
    np.testing.assert_array_equal(again.inputs["input_ids"], processor(history)["input_ids"])


def test_a_template_that_rewrites_earlier_turns_is_fed_whole(
    model: Any, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rewrites(*_: object, **__: object) -> None:
        raise PromptError("this chat template rewrites earlier turns")

    chat = Chat(processor, GREEDY)
    asked(chat, model, text("first"))
    monkeypatch.setattr(Processor, "continuation", rewrites)
    turn, _ = asked(chat, model, text("second"))
    assert not turn.continues
    history = [{"role": role, "content": ""} for role in ("user", "assistant", "user")]
    assert len(ids_of(turn)) > processor(history)["input_ids"].shape[1]
    assert chat.cached_tokens == len(ids_of(turn)) + GREEDY.max_new_tokens - 1


def test_a_conversation_longer_than_the_model_reaches_is_refused(
    model: Any, processor: Processor
) -> None:
    endless = GenerationSettings(max_new_tokens=1 << 20)
    with pytest.raises(UsageError, match="positions; lower max_new_tokens to"):
        asked(Chat(processor, endless), model, text("hello"))
