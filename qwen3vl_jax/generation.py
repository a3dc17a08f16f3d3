"""From a prompt to an answer: one loop over prefill, the choice of a token, and decode.

Nothing but the tokens themselves grows with their number: one program for every step, one host
array for the answer, the cache updated in place.
"""

import array
import dataclasses
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qwen3vl_jax.drafting import DRAFT_TOKENS, DraftCounts, Trial, propose_rows
from qwen3vl_jax.errors import BadInputError, UsageError
from qwen3vl_jax.generation_settings import GenerationSettings
from qwen3vl_jax.inputs import INPUT_NAMES
from qwen3vl_jax.sampling import NOT_FINITE, mark_seen, next_tokens, row_keys, start_history
from qwen3vl_jax.streaming import TextStream, decoder

__all__ = ["GenerationSettings", "Session", "Step", "Streamer", "generate", "split_arguments"]


@runtime_checkable
class Streamer(Protocol):
    """What transformers' streamers are: `put` gets the prompt [B, T], then [B] at every step."""

    def put(self, value: Any) -> None: ...

    def end(self) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One new token for every row: `tokens` holds padding where a row had finished before.

    `finished` includes the rows that this token finishes.
    """

    tokens: Int[np.ndarray, " batch"]
    finished: Bool[np.ndarray, " batch"]


class Session:
    """A batch of conversations in progress. Owns a KV cache and the logits after its last token.

    Several prompts and answers may follow each other: `prompt`, `answer`, `prompt`, ...
    An answer's last token has not been fed to the model: it is `unfed` and opens the next prompt.
    """

    def __init__(
        self, model: Any, *, batch: int, capacity: int, prompt_tokens: int | None = None
    ) -> None:
        """Makes the cache; `prompt_tokens` are those of the first prompt, if that is known."""
        self._model = model
        self._seen = np.zeros((batch, model.config.text.vocab_size), bool)
        self._cache: Any = model.new_cache(
            batch=batch, capacity=capacity, prompt_tokens=prompt_tokens
        )
        self._logits: Float[Array, "batch vocab"] | None = None
        self._drawn = 0
        self._told = [array.array("i") for _ in range(batch)]
        self._trial: Trial | None = None
        self.drafts = DraftCounts()
        self.unfed: Int[np.ndarray, " batch"] | None = None

    @property
    def intact(self) -> bool:
        """False once a step was interrupted: it had consumed the cache, which is lost."""
        return self._cache is not None

    @property
    def length(self) -> int:
        """Slots of the cache in use, without drafted tokens that nobody chose."""
        return int(self._cache.length) - self._on_trial

    @property
    def capacity(self) -> int:
        """Slots of the cache, used and free."""
        return int(self._cache.capacity)

    def prompt(self, inputs: Mapping[str, Any], *, capacity: int) -> float:
        """Feeds what a processor made of a prompt, to the end of what was fed before.

        Args:
            inputs: arrays named as in transformers; `attention_mask` covers these tokens only.
            capacity: slots that the cache must have for this prompt and its answer.

        Returns:
            Seconds that the vision tower took.
        """
        large = self.intact and self._cache.capacity >= capacity
        recall = self._model.recall(inputs, self._cache if large else None)
        started = time.perf_counter()
        features = self._model.encode(inputs, recall=recall)
        jax.block_until_ready(features)
        vision_s = time.perf_counter() - started
        ids = np.asarray(inputs["input_ids"])
        mask = inputs.get("attention_mask")
        real = np.ones_like(ids, bool) if mask is None else np.asarray(mask) != 0
        mark_seen(self._seen, ids, real)
        self._tell(ids, real)
        cache = self._take_cache()
        if cache.capacity < capacity:
            cache = self._model.grown(cache, capacity)
        self._logits, self._cache = self._model.prefill(
            inputs, cache, features=features, recall=recall
        )
        self.unfed = None
        return vision_s

    def answer(self, settings: GenerationSettings, tokenizer: Any = None) -> Iterator[Step]:
        """Yields one token for every row at a time, until all rows have finished.

        Stopping early, by leaving the iterator, is allowed after any step.

        Raises:
            UsageError: stop strings without a tokenizer.
            BadInputError: a row's logits are not finite.
        """
        batch = len(self._seen)
        stops = _stop_streams(settings, tokenizer, batch)
        seed = secrets.randbits(32) if settings.seed is None else settings.seed
        keys = row_keys(seed, batch)
        history = start_history(self._seen) if settings.sampling.needs_history else None
        ends = np.array(settings.eos_token_id, np.int64)
        finished = np.zeros(batch, bool)
        for index in range(settings.max_new_tokens):
            chosen, history = next_tokens(
                self._logits, history, keys, np.int32(self._drawn), sampling=settings.sampling
            )
            self._drawn += 1
            tokens = np.where(finished, np.int32(settings.padding), np.asarray(chosen))
            _check_finite(tokens, index)
            mark_seen(self._seen, tokens[:, None], ~finished[:, None])
            for row, stop in enumerate(stops):
                if not finished[row]:
                    stop.put(int(tokens[row]))
            stopped = np.array([stop.stopped for stop in stops] or [False] * batch)
            finished = finished | np.isin(tokens, ends) | stopped
            self.unfed = tokens
            yield Step(tokens, finished)
            if finished.all() or index + 1 == settings.max_new_tokens:
                return
            self._feed(tokens, finished, settings)

    def _feed(
        self,
        tokens: Int[np.ndarray, " batch"],
        finished: Bool[np.ndarray, " batch"],
        settings: GenerationSettings,
    ) -> None:
        self._tell(tokens[:, None], np.ones((len(tokens), 1), bool))
        if self._trial is not None and self._trial.foresaw(tokens):
            self._trial = dataclasses.replace(self._trial, used=self._trial.used + 1)
            self._logits = self._trial.logits()
            self.drafts = self.drafts.with_accepted()
        else:
            cache = self._take_cache()
            draft = self._draft(finished, settings, cache)
            if draft is None:
                self._logits, self._cache = self._model.decode(tokens, cache)
            else:
                tried = np.concatenate([tokens[:, None], draft], axis=1)
                scores, self._cache = self._model.verify(tried, cache)
                self._trial = Trial(draft, scores)
                self._logits = self._trial.logits()
                self.drafts = self.drafts.with_pass(DRAFT_TOKENS)
        self.unfed = None

    def _draft(
        self, finished: Bool[np.ndarray, " batch"], settings: GenerationSettings, cache: Any
    ) -> Int[np.ndarray, "batch drafted"] | None:
        """Tokens to try, always equally many; None without a guess, or without room for them."""
        if settings.draft is None or cache.room < 1 + DRAFT_TOKENS:
            return None
        told = [np.frombuffer(row, np.int32) for row in self._told]
        return propose_rows(told, finished, DRAFT_TOKENS, padding=settings.padding)

    @property
    def _on_trial(self) -> int:
        return 0 if self._trial is None else self._trial.left

    def _take_cache(self) -> Any:
        """The cache without tokens on trial.

        Who takes it consumes it: if that is interrupted, none is left, and `intact` says so.
        """
        cache, self._cache = self._cache, None
        left, self._trial = self._on_trial, None
        return self._model.forget(cache, left) if left else cache

    def _tell(
        self, ids: Int[np.ndarray, "batch tokens"], real: Bool[np.ndarray, "batch tokens"]
    ) -> None:
        """Notes, for drafts, what each row is fed."""
        for row, told in enumerate(self._told):
            told.frombytes(ids[row, real[row]].astype(np.int32).tobytes())


def generate(
    model: Any,
    inputs: Mapping[str, Any],
    settings: GenerationSettings,
    *,
    streamer: Streamer | None = None,
    tokenizer: Any = None,
) -> Int[np.ndarray, "batch total"]:
    """The prompts and their answers. Rows that finish early are filled with the pad token.

    Args:
        model: a `Qwen3VL`.
        inputs: what a processor returns: `input_ids` [batch, tokens], masks, pixels, grids.
        settings: when to end and how to choose.
        streamer: gets the prompt, then every step's tokens, then `end`, even if an error ends it.
        tokenizer: needed for stop strings only.

    Raises:
        UsageError: prompt and answer do not fit the model's positions; stop strings, no tokenizer.
        BadInputError: the logits are not finite.
    """
    ids = np.asarray(inputs["input_ids"])
    batch, tokens = ids.shape
    total = tokens + settings.max_new_tokens
    check_positions(model, tokens, settings.max_new_tokens)
    answer = np.full((batch, total), settings.padding, ids.dtype)
    answer[:, :tokens] = ids
    session = Session(model, batch=batch, capacity=total, prompt_tokens=tokens)
    try:
        if streamer is not None:
            streamer.put(ids)
        session.prompt(inputs, capacity=total)
        for step in session.answer(settings, tokenizer):
            answer[:, tokens] = step.tokens
            tokens += 1
            if streamer is not None:
                streamer.put(step.tokens)
    finally:
        if streamer is not None:
            streamer.end()
    return answer[:, :tokens]


def split_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a call like transformers' `generate(**inputs, **settings)`, told apart."""
    inputs = {name: value for name, value in arguments.items() if name in INPUT_NAMES}
    return inputs, {name: value for name, value in arguments.items() if name not in INPUT_NAMES}


def check_positions(model: Any, prompt_tokens: int, new_tokens: int) -> None:
    """Raises UsageError if a prompt and its answer are longer than the model's positions."""
    limit = model.config.text.max_position_embeddings
    if prompt_tokens + new_tokens > limit:
        raise UsageError(
            f"{prompt_tokens:,} prompt tokens and max_new_tokens {new_tokens:,} exceed the model's "
            f"{limit:,} positions; lower max_new_tokens to {max(limit - prompt_tokens, 0):,}, "
            "shorten the prompt, or use smaller pictures"
        )


def _stop_streams(settings: GenerationSettings, tokenizer: Any, batch: int) -> list[TextStream]:
    if not settings.stop_strings:
        return []
    if tokenizer is None:
        raise UsageError("stop_strings need the tokenizer: generate(..., tokenizer=tokenizer)")
    decode = decoder(tokenizer)
    return [TextStream(decode, settings.stop_strings) for _ in range(batch)]


def _check_finite(tokens: Int[np.ndarray, " batch"], index: int) -> None:
    rows = np.flatnonzero(tokens == NOT_FINITE)
    if rows.size:
        raise BadInputError(
            f"logits of new token {index}, row {rows[0]}, are not finite: a weight or a pixel is "
            "NaN or infinite, or float16 overflowed; verify the checkpoint, or use bfloat16"
        )
