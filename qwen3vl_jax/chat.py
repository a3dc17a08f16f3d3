"""A conversation whose KV cache is kept from turn to turn: only what is new is computed."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from qwen3vl_jax.errors import PromptError
from qwen3vl_jax.generation import GenerationSettings, Session, check_positions
from qwen3vl_jax.streaming import TextStream, decoder

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """One finished answer and what it took.

    `prompt_tokens` counts the tokens that were computed for this turn, pictures included.
    `tokens_per_s` is measured from the second decode step on, as the first one may compile;
    None for answers that are too short. `ending`: "end", "stop", "length" or "interrupted".
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    vision_s: float
    prefill_s: float
    decode_s: float
    tokens_per_s: float | None
    ending: str


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """One question as arrays. They follow what the cache holds if it `continues`, or start anew."""

    question: Message
    inputs: Mapping[str, np.ndarray]
    continues: bool


class Chat:
    """Talks with one model. Owns the messages so far, and the session that holds their cache."""

    def __init__(
        self, processor: Any, settings: GenerationSettings, *, system: str | None = None
    ) -> None:
        self._processor = processor
        self._settings = settings
        self._system: list[Message] = [] if system is None else [_message("system", system)]
        self.clear()

    def clear(self) -> None:
        """Forgets what was said, except for the system prompt."""
        self._messages = list(self._system)
        self._answer: list[int] | None = None
        self._session: Session | None = None
        self.last: Answer | None = None

    @property
    def cached_tokens(self) -> int:
        """Tokens that the next turn need not compute again."""
        return self._session.length if self._session is not None and self._session.intact else 0

    def prepare(self, content: list[Message]) -> Turn:
        """Makes arrays of one user message; of it alone, if the cache holds all before it.

        Args:
            content: the message's parts, as a processor takes them.
        """
        question = _message("user", content)
        session, answer = self._session, self._answer
        if session is not None and session.intact and answer is not None:
            held = len(answer) if session.unfed is None else len(answer) - 1
            try:
                inputs = self._processor.continuation(self._messages, answer, [question], held=held)
                return Turn(question, inputs, continues=True)
            except PromptError:
                # The template rewrites earlier turns, so the whole conversation is fed again.
                pass
        return Turn(question, self._processor([*self._said(), question]), continues=False)

    def ask(
        self, model: Any, turn: Turn, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[str]:
        """Yields the answer's text as it grows; afterwards `last` describes it.

        A question whose prompt fails or is interrupted is forgotten.

        Args:
            model: the same `Qwen3VL` in every turn.
            turn: from `prepare`, called after the turn before this one.
            should_stop: asked after every token.
        """
        started = time.perf_counter()
        session, vision_s = self._prompted(model, turn)
        self._messages = [*self._said(), turn.question]
        answer: list[int] = []
        self._answer = answer
        stream = TextStream(decoder(self._processor.tokenizer), self._settings.stop_strings)
        pieces: list[str] = []
        moments: list[float] = []
        ending = "length"
        for step in session.answer(dataclasses.replace(self._settings, stop_strings=())):
            # Of the first, the second and the latest token.
            moments[2:] = [time.perf_counter()]
            answer.append(int(step.tokens[0]))
            pieces.append(stream.put(answer[-1]))
            if pieces[-1]:
                yield pieces[-1]
            if stream.stopped or step.finished[0] or should_stop():
                ended = "end" if step.finished[0] else "interrupted"
                ending = "stop" if stream.stopped else ended
                break
        pieces.append(stream.end())
        if pieces[-1]:
            yield pieces[-1]
        self.last = Answer(
            text="".join(pieces),
            tokens=tuple(answer),
            prompt_tokens=turn.inputs["input_ids"].shape[1],
            vision_s=vision_s,
            prefill_s=moments[0] - started - vision_s,
            decode_s=moments[-1] - moments[0],
            tokens_per_s=_rate(len(answer), moments),
            ending=ending,
        )

    def _prompted(self, model: Any, turn: Turn) -> tuple[Session, float]:
        session = self._session if turn.continues else None
        tokens = turn.inputs["input_ids"].shape[1] + (0 if session is None else session.length)
        capacity = tokens + self._settings.max_new_tokens
        check_positions(model, tokens, self._settings.max_new_tokens)
        if session is None:
            self._session = None  # Two caches at once may not fit.
            session = self._session = Session(
                model, batch=1, capacity=capacity, prompt_tokens=tokens
            )
        elif capacity > session.capacity:
            # A larger cache is a new shape and compiles anew, so it should last for some turns.
            capacity = min(2 * capacity, model.config.text.max_position_embeddings)
        return session, session.prompt(turn.inputs, capacity=capacity)

    def _said(self) -> list[Message]:
        if self._answer is None:
            return self._messages
        text = self._processor.decode(self._answer)
        return [*self._messages, _message("assistant", text)]


def _message(role: str, content: str | list[Message]) -> Message:
    return {"role": role, "content": content}


def _rate(tokens: int, moments: list[float]) -> float | None:
    return (tokens - 2) / (moments[2] - moments[1]) if tokens > 2 else None
