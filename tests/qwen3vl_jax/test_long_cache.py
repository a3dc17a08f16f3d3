"""A cache in blocks holds what a plain one holds; attention over it is the same sum."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import strategies as st

from qwen3vl_jax import Qwen3VL
from qwen3vl_jax.attention import attention
from qwen3vl_jax.cache import KVCache
from qwen3vl_jax.config import load_config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.generation import Session
from qwen3vl_jax.generation_settings import GenerationSettings
from qwen3vl_jax.long_attention import attend_block, heads, merged
from qwen3vl_jax.long_cache import block_shape, in_blocks

CONFIGS = Path(__file__).parents[2] / "configs" / "models"
GetModel = Callable[..., Qwen3VL]
BLOCK = 16
TOKENS = 64  # new ones: five blocks and more of text
TOLERANCE = 1e-5  # of the largest score
SUBJECTS = (
    ("dense", "batch_left"),
    ("dense_tied", "two_images"),
    ("moe_mixed", "text_batch_right"),
)


def answers(model: Qwen3VL, inputs: Any, tokens: int, **form: Any) -> tuple[np.ndarray, KVCache]:
    """Scores after the prompt and after each of some greedy tokens, and the cache."""
    batch, length = inputs["input_ids"].shape
    cache = model.new_cache(batch=batch, capacity=length + tokens, **form)
    scores, cache = model.prefill(inputs, cache)
    found = [np.asarray(scores)]
    for _ in range(tokens):
        scores, cache = model.decode(found[-1].argmax(-1).astype(np.int32), cache)
        found.append(np.asarray(scores))
    return np.stack(found), cache


def in_small_blocks(model: Qwen3VL, patch: pytest.MonkeyPatch) -> None:
    """All caches that are made for this model from now on are in blocks."""
    make = model.new_cache
    patch.setattr(model, "new_cache", lambda **asked: make(**asked, block_slots=BLOCK))


@pytest.mark.parametrize(("name", "prompt"), SUBJECTS)
def test_scores_and_tokens_are_those_of_a_plain_cache(
    name: str, prompt: str, tiny_model: GetModel
) -> None:
    model, inputs = tiny_model(name), tiny.inputs(prompt)
    plain, _ = answers(model, inputs, TOKENS)
    found, cache = answers(model, inputs, TOKENS, block_slots=BLOCK)
    assert cache.full is not None
    assert len(cache.full[0]) == (cache.length - 1) // BLOCK >= 4
    assert np.abs(found - plain).max() <= TOLERANCE * np.abs(plain).max()
    assert np.array_equal(found.argmax(-1), plain.argmax(-1))


@hypothesis.settings(max_examples=6)
@hypothesis.given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(0, 99)
)
def test_blocks_merge_to_attention_over_all_keys(
    batch: int, groups: int, count: int, blocks: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    heads_of_keys, slots, size = 2, 8, 4
    rows, total = batch * heads_of_keys, blocks * slots

    def drawn(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=shape) * 3, jnp.float32)

    queries = drawn(batch, heads_of_keys * groups, count, size)
    both = drawn(2, rows, total, size)
    valid = random.random((batch, total)) < 0.6
    valid[:, -slots] = True  # every query sees something
    last = np.sort(random.integers(total - slots, total, count)).astype(np.int32)
    partial = None
    for first in range(0, total, slots):
        part = attend_block(
            queries,
            both[:, :, first : first + slots],
            jnp.asarray(valid[:, first : first + slots]),
            jnp.asarray(last - np.int32(first)),
        )
        partial = part if partial is None else merged(partial, part)
    assert partial is not None
    found = np.asarray(heads(partial, queries))
    wanted = np.asarray(attention(queries, *both, jnp.asarray(last), jnp.asarray(valid)))
    assert np.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_many_queries_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    arrays = [
        jnp.asarray(random.normal(size=s), jnp.float32) for s in ((1, 4, 33, 8), (2, 2, 16, 8))
    ]
    valid, last = jnp.ones((1, 16), bool), jnp.arange(33, dtype=jnp.int32) // jnp.int32(3)
    whole = attend_block(*arrays, valid, last)
    monkeypatch.setattr("qwen3vl_jax.attention.SCORE_BLOCK_BYTES", 4 * 2 * 16 * 16)
    parts = attend_block(*arrays, valid, last)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        assert np.allclose(one, other, rtol=1e-6, atol=1e-6)


def test_growing_copies_nothing(tiny_model: GetModel) -> None:
    model, inputs = tiny_model("dense"), tiny.inputs("text")
    _, cache = answers(model, inputs, 8, block_slots=BLOCK)
    assert cache.full is not None
    before = [block for layer in cache.full for block in layer]
    cache = model.grown(cache, 200)
    _, cache = model.decode(np.array([5], np.int32), cache)
    assert cache.capacity == 208
    after = [block for layer in cache.full or () for block in layer]
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert not any(block.is_deleted() for block in before)


@pytest.mark.parametrize("chunk_tokens", [5, 16, 512])
def test_no_pass_crosses_a_border(chunk_tokens: int, tiny_model: GetModel) -> None:
    model = tiny_model("dense")
    inputs = {"input_ids": np.tile(tiny.inputs("text")["input_ids"], (1, 3))[:, :41]}
    count = inputs["input_ids"].shape[1]
    wanted = model.prefill(inputs, model.new_cache(batch=1, capacity=count))[0]
    cache = model.new_cache(batch=1, capacity=count + 40, block_slots=BLOCK)
    scores, cache = model.prefill(inputs, cache, chunk_tokens=chunk_tokens)
    assert np.allclose(scores, wanted, atol=1e-4)
    assert cache.length == count
    with pytest.raises(UsageError, match="its current block has room for"):
        model.verify(np.zeros((1, cache.room + 1), np.int32), cache)


def told(model: Qwen3VL, **settings: Any) -> tuple[list[int], Session]:
    prompt = {"input_ids": np.tile(tiny.inputs("text")["input_ids"][:, :8], (1, 4))}
    session = Session(model, batch=1, capacity=96)
    session.prompt(prompt, capacity=96)
    chosen = GenerationSettings(max_new_tokens=60, **settings)
    return [int(step.tokens[0]) for step in session.answer(chosen)], session


def test_drafts_stay_within_a_block_and_change_no_token(
    tiny_model: GetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("dense")
    plain, _ = told(model)
    in_small_blocks(model, monkeypatch)
    found, session = told(model, draft="prompt-lookup")
    assert session.drafts.accepted > 0
    assert found == plain
    assert session.length == 32 + 59


def test_what_full_blocks_hold_cannot_be_forgotten(tiny_model: GetModel) -> None:
    model, inputs = tiny_model("dense"), tiny.inputs("text")
    scores, cache = answers(model, inputs, 3, block_slots=BLOCK)
    held = cache.length - cache.sealed_slots
    again = model.forget(cache, 2)
    repeated, again = model.decode(scores[1].argmax(-1).astype(np.int32), again)
    assert np.allclose(repeated, scores[2], atol=1e-5)
    with pytest.raises(UsageError, match=f"the first {cache.sealed_slots} stay"):
        model.forget(again, held + 1)


@pytest.mark.parametrize("tokens", [3, 10])
def test_a_plain_cache_becomes_one_in_blocks(tokens: int, tiny_model: GetModel) -> None:
    model, inputs = tiny_model("dense"), tiny.inputs("batch_left")
    plain, cache = answers(model, inputs, tokens)
    wanted, _ = model.decode(plain[-1].argmax(-1).astype(np.int32), cache)
    _, cache = answers(model, inputs, tokens)
    old = jax.tree.leaves(cache.layers)
    cut = in_blocks(cache, 100, BLOCK, lambda name, block: (block, block))
    assert all(array.is_deleted() for array in old)
    assert cut.full is not None
    assert len(cut.full[0]) == (cache.length - 1) // BLOCK
    found, cut = model.decode(plain[-1].argmax(-1).astype(np.int32), cut)
    assert cut.capacity == 112
    assert np.allclose(found, wanted, atol=1e-4)


def test_blocks_are_of_four_megabytes_but_hold_a_chunk() -> None:
    config = load_config(CONFIGS / "qwen3-vl-2b-instruct.json").text
    assert block_shape(config, 1, "bfloat16") == (2, 8, 1024, 128)
    assert block_shape(config, 1, "float32") == (2, 8, 512, 128)
    assert block_shape(config, 4, "bfloat16") == (2, 32, 512, 128)
