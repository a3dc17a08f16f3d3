"""Penalties and filters against transformers' own processors, draws against their distribution."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3vl_jax import sampling as ours
from qwen3vl_jax.generation_settings import Sampling
from qwen3vl_jax.sampling import NOT_FINITE

VOCAB = 3000  # more than sampling.CANDIDATES, so that both ways of filtering are used
LEFT = -np.inf


def logits_of(seed: int, scale: float = 4.0, vocab: int = VOCAB) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(3, vocab)) * scale).astype(np.float32)


def torch_filtered(logits: np.ndarray, ids: np.ndarray, processors: list[Any]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    scores = torch.from_numpy(logits.copy())
    for processor in processors:
        scores = processor(torch.from_numpy(ids), scores)
    return scores.numpy()


def processors(name: str, *arguments: Any) -> Any:
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.generation import logits_process
    return getattr(logits_process, name)(*arguments)


filter_scores = jax.jit(ours.filter_scores, static_argnames="sampling")


def filtered(logits: np.ndarray, **settings: Any) -> np.ndarray:
    return np.asarray(filter_scores(logits, sampling=Sampling(**settings)))


def test_a_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    seen = np.array([[True, True, False, False]])
    logits = jnp.array([[2.0, -2.0, 2.0, -2.0]])
    history = ours.start_history(seen)
    got = ours.penalise(logits, history, Sampling(repetition_penalty=2.0))
    np.testing.assert_array_equal(got, [[1.0, -4.0, 2.0, -2.0]])


def test_a_presence_penalty_counts_the_answer_once_and_the_prompt_not_at_all() -> None:
    logits = jnp.zeros((1, 3), jnp.float32)
    history = ours.History(jnp.array([[True, True, False]]), jnp.array([[False, True, False]]))
    got = ours.penalise(logits, history, Sampling(presence_penalty=1.5))
    np.testing.assert_array_equal(got, [[0.0, -1.5, 0.0]])


@pytest.mark.parametrize("penalty", [0.5, 1.05, 1.3])
def test_the_repetition_penalty_is_transformers_one_and_skips_left_padding(penalty: float) -> None:
    torch = pytest.importorskip("torch")
    logits = logits_of(1)
    ids = np.random.default_rng(2).integers(0, VOCAB, (3, 40))
    mask = np.arange(40)[None, :] >= np.array([[0], [5], [17]])
    seen = np.zeros((3, VOCAB), bool)
    ours.mark_seen(seen, ids, mask)
    got = ours.penalise(
        jnp.array(logits), ours.start_history(seen), Sampling(repetition_penalty=penalty)
    )
    ignored = torch.tensor([0, 5, 17])
    oracle = processors("RepetitionPenaltyLogitsProcessor", penalty, ignored)
    # torch multiplies by the reciprocal of the penalty: one rounding more.
    np.testing.assert_allclose(got, torch_filtered(logits, ids, [oracle]), rtol=2e-7)


def test_ids_beyond_the_vocabulary_are_not_counted_as_seen() -> None:
    seen = np.zeros((1, 4), bool)
    ours.mark_seen(seen, np.array([[1, 4, 9]]), np.ones((1, 3), bool))
    np.testing.assert_array_equal(seen, [[False, True, False, False]])


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"temperature": 0.7}, ["Temperature"]),
        ({"top_k": 1}, ["TopK"]),
        ({"top_k": 20}, ["TopK"]),
        ({"top_k": 2500}, ["TopK"]),
        ({"top_k": VOCAB + 5}, ["TopK"]),
        ({"top_p": 0.8}, ["TopP"]),
        ({"top_p": 0.1}, ["TopP"]),
        ({"top_p": 0.0}, ["TopP"]),
        ({"min_p": 0.05}, ["MinP"]),
        ({"min_p": 1.0}, ["MinP"]),
        ({"temperature": 0.7, "top_k": 20, "top_p": 0.8}, ["Temperature", "TopK", "TopP"]),
        ({"temperature": 3.0, "top_k": 50, "top_p": 0.9, "min_p": 0.3}, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [0.3, 4.0], ids=["flat", "peaked"])
def test_filters_keep_exactly_what_transformers_keeps(
    settings: dict[str, Any], names: list[str] | None, scale: float
) -> None:
    """Flat logits need the full sort for top-p, peaked ones only the largest candidates."""
    order = {"Temperature": "temperature", "TopK": "top_k", "TopP": "top_p", "MinP": "min_p"}
    chain = [
        processors(f"{name}LogitsWarper", settings[order[name]]) for name in names or list(order)
    ]
    logits = logits_of(3, scale)
    want = torch_filtered(logits, np.zeros((3, 1), np.int64), chain)
    got = filtered(logits, **settings)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_the_order_of_filters_matters_and_is_temperature_first() -> None:
    # Before the temperature the second token has 0.27 of the mass, after it 0.0003.
    got = filtered(np.array([[1.0, 0.0]], np.float32), temperature=0.125, min_p=0.01)
    np.testing.assert_array_equal(got, [[8.0, LEFT]])


def test_equal_tokens_at_the_kth_place_all_stay() -> None:
    got = filtered(np.array([[1.0, 3.0, 1.0, 0.0]], np.float32), top_k=2)
    np.testing.assert_array_equal(got, [[1.0, 3.0, 1.0, LEFT]])


def test_top_p_removes_the_least_likely_that_hold_at_most_one_minus_p() -> None:
    chances = np.array([[0.5, 0.25, 0.125, 0.125]], np.float32)
    kept = np.isfinite(filtered(np.log(chances), top_p=0.74))
    np.testing.assert_array_equal(kept, [[True, True, False, False]])
    kept = np.isfinite(filtered(np.log(chances), top_p=0.76))
    np.testing.assert_array_equal(kept, [[True, True, False, True]])


def draws(logits: np.ndarray, count: int, sampling: Sampling, seed: int = 7) -> np.ndarray:
    keys = ours.row_keys(seed, len(logits))
    drawn = [
        ours.next_tokens(logits, None, keys, np.int32(step), sampling=sampling)[0]
        for step in range(count)
    ]
    return np.stack([np.asarray(tokens) for tokens in drawn])


@pytest.mark.parametrize("padding", [0, 2000], ids=["few tokens", "among many"])
def test_tokens_are_drawn_with_their_chances(padding: int) -> None:
    """Chi-square with 4 degrees of freedom stays below 18.47 in 999 of 1,000 honest samples."""
    chances = np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32)
    # So unlikely that none is drawn, yet none is ruled out: every token must be looked at.
    rest = np.full(padding, -40.0, np.float32)
    logits = np.concatenate([np.log(chances), rest])[None]
    count = 2000
    tokens = draws(logits, count, Sampling())[:, 0]
    observed = np.bincount(tokens, minlength=5)
    assert observed.sum() == count
    assert len(observed) == 5
    expected = chances * count
    assert ((observed - expected) ** 2 / expected).sum() < 18.47


def test_rare_tokens_have_their_share_together() -> None:
    """One half of the mass is one token, the other half 2,999 tokens that hold 1/5998 each."""
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 1234] = np.log(VOCAB - 1)
    tokens = draws(logits, 2000, Sampling())[:, 0]
    # Four standard deviations of a fair coin thrown 2,000 times.
    assert abs((tokens == 1234).sum() - 1000) < 4 * 22.4
    rare = tokens[tokens != 1234]
    # As many different ones as throws into 2,999 cells hit on average: 850, give or take.
    assert abs(len(np.unique(rare)) - 2999 * (1 - np.exp(-len(rare) / 2999))) < 60


def test_what_is_ruled_out_is_never_drawn() -> None:
    logits = np.full((1, VOCAB), LEFT, np.float32)
    allowed = [0, 777, 778, VOCAB - 1]
    logits[0, allowed] = 0.1
    tokens = draws(logits, 300, Sampling())[:, 0]
    assert sorted(set(tokens.tolist())) == allowed


def test_the_same_seed_draws_the_same_and_another_seed_differs() -> None:
    logits = logits_of(6, scale=0.5)
    first = draws(logits, 10, Sampling(top_k=40), seed=1)
    np.testing.assert_array_equal(first, draws(logits, 10, Sampling(top_k=40), seed=1))
    assert (first != draws(logits, 10, Sampling(top_k=40), seed=2)).any()
    assert len(np.unique(first)) > 5


def test_a_row_with_its_own_seed_draws_as_it_does_alone() -> None:
    logits = logits_of(8, scale=0.5, vocab=100)
    together = ours.next_tokens(
        logits, None, ours.row_keys([4, 5, 6], 3), np.int32(2), sampling=Sampling()
    )[0]
    for row, seed in enumerate((4, 5, 6)):
        alone = ours.next_tokens(
            logits[row : row + 1],
            None,
            ours.row_keys(seed, 1),
            np.int32(2),
            sampling=Sampling(),
        )[0]
        assert alone[0] == together[row]


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = np.array([[0.0, 2.0, 2.0], [5.0, 1.0, 4.0]], np.float32)
    tokens, history = ours.next_tokens(
        logits, None, ours.row_keys(0, 2), np.int32(0), sampling=Sampling(temperature=0.0)
    )
    np.testing.assert_array_equal(tokens, [1, 0])
    assert history is None


def test_penalties_hold_for_greedy_too_and_the_history_grows() -> None:
    logits = np.array([[3.0, 2.9, 0.0]], np.float32)
    history = ours.start_history(np.zeros((1, 3), bool))
    sampling = Sampling(temperature=0.0, presence_penalty=0.5)
    tokens = []
    for step in range(3):
        token, history = ours.next_tokens(
            logits, history, ours.row_keys(0, 1), np.int32(step), sampling=sampling
        )
        tokens.append(int(token[0]))
    # Both are lowered by 0.5 once used: 3.0, then 2.9, then 2.5 against 2.4.
    assert tokens == [0, 1, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_finite_are_reported_and_others_are_not(
    bad: float, temperature: float
) -> None:
    logits = np.zeros((3, 4), np.float32)
    logits[1] = bad if bad == -np.inf else [0.0, bad, 0.0, 0.0]
    tokens = ours.next_tokens(
        logits, None, ours.row_keys(0, 3), np.int32(0), sampling=Sampling(temperature=temperature)
    )[0]
    assert (np.asarray(tokens) == NOT_FINITE).tolist() == [False, True, False]
