"""From logits to the next token: penalties, filters and the draw, as pure jitted functions.

The order is that of transformers: repetition penalty, presence penalty, temperature, top-k, top-p,
min-p, then one draw. Source: transformers 5.23, `generation/logits_process.py` and
`GenerationMixin._get_logits_processor`. Transformers has no presence penalty; it is defined here as
in vLLM: subtracted once from every token that the answer already holds.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from qwen3vl_jax.generation_settings import Sampling

# A full sort of 151,936 logits takes 45 ms on a CPU, the 1,024 largest 0.8 ms. Top-p sorts
# everything only where these do not hold enough.
CANDIDATES = 1024
NOT_FINITE = -1


class History(NamedTuple):
    """Which tokens each row has met: anywhere (prompt and answer), and in its answer."""

    seen: Bool[Array, "batch vocab"]
    answered: Bool[Array, "batch vocab"]


def mark_seen(
    seen: Bool[np.ndarray, "batch vocab"],
    ids: Int[np.ndarray, "batch tokens"],
    counts: Bool[np.ndarray, "batch tokens"],
) -> None:
    """Sets, on the host, what each row has met. Where `counts` is false (padding) nothing is."""
    rows, _ = np.nonzero(counts)
    kept = ids[counts]
    known = kept < seen.shape[1]
    seen[rows[known], kept[known]] = True


def start_history(seen: Bool[np.ndarray, "batch vocab"]) -> History:
    """The history before the first token of an answer."""
    # Two arrays of their own: both are donated at every step.
    return History(jnp.array(seen), jnp.zeros(seen.shape, jnp.bool_))


def row_keys(seed: int | Sequence[int], batch: int) -> Key[Array, " batch"]:
    """One random key for every row: row i of a seed, or row 0 of each of `batch` seeds."""
    if isinstance(seed, int):
        return jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(np.uint32(seed)), np.arange(batch, dtype=np.uint32)
        )
    roots = jax.vmap(jax.random.key)(np.array(seed, np.uint32))
    return jax.vmap(jax.random.fold_in)(roots, np.zeros(batch, np.uint32))


def penalise(
    logits: Float[Array, "batch vocab"], history: History, sampling: Sampling
) -> Float[Array, "batch vocab"]:
    """Repetition penalty (seen logits shrink towards the unlikely), then presence penalty."""
    repetition, presence = sampling.repetition_penalty, sampling.presence_penalty
    if repetition != 1.0:
        shrunk = jnp.where(logits < 0, logits * repetition, logits / repetition)
        logits = jnp.where(history.seen, shrunk, logits)
    if presence != 0.0:
        logits = logits - presence * history.answered.astype(logits.dtype)
    return logits


def keep_top_k(scores: Float[Array, "batch vocab"], top_k: int) -> Float[Array, "batch vocab"]:
    """All but the k largest become -inf. What is equal to the k-th stays."""
    # min() and not the last one: XLA makes a full sort of a slice of top_k, 60 times slower.
    kept = jax.lax.top_k(scores, min(top_k, scores.shape[-1]))[0]
    return jnp.where(scores < kept.min(axis=-1, keepdims=True), -jnp.inf, scores)


def keep_top_p(scores: Float[Array, "batch vocab"], top_p: float) -> Float[Array, "batch vocab"]:
    """The least likely tokens that together hold at most 1 - p become -inf; one always stays.

    Among equal tokens the lower ids go first.
    """
    chances = jax.nn.softmax(scores, axis=-1)
    top, ids = jax.lax.top_k(chances, min(CANDIDATES, scores.shape[-1]))
    beyond = jnp.maximum(1 - top.sum(axis=-1, keepdims=True), 0)

    def among_candidates() -> Bool[Array, "batch vocab"]:
        return _nucleus(top, ids, beyond, top_p, vocab_size=scores.shape[-1])

    def among_all() -> Bool[Array, "batch vocab"]:
        every = jnp.broadcast_to(jnp.arange(scores.shape[-1], dtype=ids.dtype), scores.shape)
        nothing = jnp.zeros_like(beyond)
        return _nucleus(chances, every, nothing, top_p, vocab_size=scores.shape[-1])

    if scores.shape[-1] <= CANDIDATES:
        stays = among_candidates()
    else:
        stays = jax.lax.cond(jnp.all(beyond <= 1 - top_p), among_candidates, among_all)
    return jnp.where(stays, scores, -jnp.inf)


def _nucleus(
    chances: Float[Array, "batch some"],
    ids: Int[Array, "batch some"],
    below: Float[Array, "batch 1"],
    top_p: float,
    *,
    vocab_size: int,
) -> Bool[Array, "batch vocab"]:
    """True where a token stays; what is not among `ids` goes, and `below` is its chance in all."""
    chances, ids = jax.lax.sort((chances, ids), num_keys=2)
    stays = below + jnp.cumsum(chances, axis=-1) > 1 - top_p
    stays = stays.at[:, -1].set(True)
    rows = jnp.arange(len(ids))[:, None]
    return jnp.zeros((len(ids), vocab_size), jnp.bool_).at[rows, ids].set(stays)


def keep_min_p(scores: Float[Array, "batch vocab"], min_p: float) -> Float[Array, "batch vocab"]:
    """Tokens less likely than `min_p` times the likeliest become -inf."""
    chances = jax.nn.softmax(scores, axis=-1)
    return jnp.where(chances < min_p * chances.max(axis=-1, keepdims=True), -jnp.inf, scores)


def filter_scores(
    logits: Float[Array, "batch vocab"], sampling: Sampling
) -> Float[Array, "batch vocab"]:
    """Temperature, top-k, top-p and min-p in this order; what is ruled out becomes -inf."""
    scores = logits / sampling.temperature
    if sampling.top_k > 0:
        scores = keep_top_k(scores, sampling.top_k)
    if sampling.top_p < 1.0:
        scores = keep_top_p(scores, sampling.top_p)
    if sampling.min_p > 0.0:
        scores = keep_min_p(scores, sampling.min_p)
    return scores


def draw(scores: Float[Array, "batch vocab"], keys: Key[Array, " batch"]) -> Int[Array, " batch"]:
    """One token for every row with the chances softmax(scores); each row depends on its key alone.

    First a block of the vocabulary is drawn, then a token of it. One draw from all would compare
    running sums near 1 that float32 cannot tell apart, where a vocabulary has many rare tokens.
    """
    batch, vocab_size = scores.shape
    size = math.isqrt(vocab_size - 1) + 1
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    padded = jnp.pad(weights, ((0, 0), (0, size * size - vocab_size)))
    blocks = padded.reshape(batch, size, size)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,), jnp.float32))(keys)
    block = _pick(blocks.sum(axis=-1), uniform[:, :1])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * size + _pick(inside, uniform[:, 1:])


def _pick(
    weights: Float[Array, "batch some"], uniform: Float[Array, "batch 1"]
) -> Int[Array, " batch"]:
    """The first place where the running sum exceeds `uniform` of the whole. Weights of 0 never win.

    The sum may be rounded up at such a place, and down at the last one: hence the two guards.
    """
    sums = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0)
    whole = sums.max(axis=-1, keepdims=True)
    return jnp.argmax(sums > uniform * whole, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="sampling", donate_argnames="history")
def next_tokens(
    logits: Float[Array, "batch vocab"],
    history: History | None,
    keys: Key[Array, " batch"],
    step: Int[Array | np.ndarray, ""],
    *,
    sampling: Sampling,
) -> tuple[Int[Array, " batch"], History | None]:
    """The next token of every row, and the history with it.

    Args:
        logits: float32, of each row's last token.
        history: needed for penalties only, otherwise None; donated.
        keys: from `row_keys`; the same at every step, and unused when greedy.
        step: number of the token, so that every step draws anew.

    Returns:
        Token ids, int32; `NOT_FINITE` where a row's largest logit is NaN or infinite.
    """
    scores = logits if history is None else penalise(logits, history, sampling)
    if sampling.temperature == 0.0:
        tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    else:
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        tokens = draw(filter_scores(scores, sampling), step_keys)
    if history is not None:
        rows = jnp.arange(len(tokens))
        history = History(*(told.at[rows, tokens].set(True) for told in history))
    # max() hands NaN on, so one reduction finds both NaN and infinity.
    return jnp.where(jnp.isfinite(logits.max(axis=-1)), tokens, NOT_FINITE), history
