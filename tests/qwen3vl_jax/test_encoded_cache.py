"""Rows of a cache as int8 codes, and attention over them, against float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memsched.codecs import Int8
from qwen3vl_jax import kernels
from qwen3vl_jax.cache import LayerCache, new_cache
from qwen3vl_jax.cache_attention import TILE_SLOTS, cached_attention
from qwen3vl_jax.cache_rows import ENCODED, as_rows, factors, row_dtype, row_width
from qwen3vl_jax.config import load_config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.kernels import products
from qwen3vl_jax.long_attention import attend_block, heads
from qwen3vl_jax.long_cache import block_shape

SIZE = 24


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def packed(numbers: np.ndarray) -> jax.Array:
    return as_rows(jnp.asarray(numbers), ENCODED)


def decoded(rows: jax.Array) -> np.ndarray:
    """By the codec of weights, which reads the same bytes."""
    array = np.asarray(rows)
    shape = (*array.shape[:-1], array.shape[-1] - 4)
    return Int8().decode(array, shape, "float32").astype(np.float64)


def by_definition(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, last: np.ndarray, valid: np.ndarray
) -> np.ndarray:
    batch, count = len(queries), queries.shape[2]
    mixed = np.zeros(queries.shape)
    heads_of_keys = len(keys) // batch
    groups = queries.shape[1] // heads_of_keys
    for row, head, query in np.ndindex(batch, queries.shape[1], count):
        index = row * heads_of_keys + head // groups
        seen = valid[row] & (np.arange(keys.shape[1]) <= last[query])
        scores = keys[index][seen] @ queries[row, head, query] / np.sqrt(queries.shape[-1])
        weights = np.exp(scores - scores.max())
        mixed[row, head, query] = weights / weights.sum() @ values[index][seen]
    return mixed


def scene(count: int, slots: int) -> tuple[np.ndarray, ...]:
    """Queries of two rows and six heads over two key heads; the second row begins with padding."""
    valid = np.ones((2, slots), bool)
    valid[1, :3] = False
    last = np.arange(count, dtype=np.int32) + np.int32(slots - count - 2)
    keys, values = draw(4, slots, SIZE, seed=2), draw(4, slots, SIZE, seed=3)
    return 2 * draw(2, 6, count, SIZE, seed=1), keys, values, last, valid


# ---- rows ----


def test_a_row_is_one_of_the_codec_of_weights_and_errs_by_half_a_step_at_most() -> None:
    numbers = draw(3, 40, SIZE) * np.exp(draw(3, 40, 1, seed=1) * 20)
    numbers[0, :2] = 0
    numbers[1, 0] = 3.4e38
    rows = packed(numbers)
    assert (rows.shape, rows.dtype) == ((3, 40, SIZE + 4), np.uint8)
    step = np.abs(numbers).max(axis=-1, keepdims=True).astype(np.float64) / 127
    assert (np.abs(decoded(rows) - numbers) <= step * 0.5001).all()
    codes, scales = factors(rows, jnp.float32)
    assert scales is not None
    np.testing.assert_array_equal(codes * scales[..., None], decoded(rows).astype(np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_code_is_itself_in_every_dtype(dtype: str) -> None:
    numbers = np.arange(-127, 128, dtype=np.float32)[None, None]
    codes, scales = factors(packed(numbers), jnp.dtype(dtype))
    assert scales is not None
    np.testing.assert_array_equal(codes.astype(jnp.float32), numbers)
    assert scales.tolist() == [[1.0]]


def test_denormal_rows_become_finite_ones() -> None:
    assert np.abs(decoded(packed(np.full((1, 1, 8), 1e-44, np.float32)))).max() <= 1e-43


def test_raw_rows_stay_as_they_are() -> None:
    numbers = jnp.asarray(draw(1, 2, 8))
    assert as_rows(numbers, numbers.dtype) is numbers
    assert factors(numbers, jnp.float32) == (numbers, None)


def test_an_unknown_kind_of_cache_is_refused() -> None:
    with pytest.raises(UsageError, match="kv 'int4' is not one of raw, int8"):
        row_dtype("int4", "float32")


def test_bytes_of_a_cache_are_little_more_than_half() -> None:
    config = load_config("configs/models/qwen3-vl-2b-instruct.json").text

    def nbytes(kv: str) -> int:
        dtype = row_dtype(kv, jnp.bfloat16)
        made = jax.eval_shape(lambda: new_cache(config, batch=2, capacity=512, dtype=dtype).layers)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made))

    assert row_width(128, ENCODED) == 132
    assert nbytes("int8") / nbytes("raw") == 132 / 256
    assert block_shape(config, 1, ENCODED) == (2, 8, 1024, 132)


# ---- attention ----


@pytest.mark.parametrize("slots", [37, 3 * TILE_SLOTS - 40])
@pytest.mark.parametrize("count", [1, 2, 17])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kernel", ["on", "off"])
def test_attention_over_codes_is_that_over_their_numbers(
    count: int, slots: int, dtype: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "off":
        monkeypatch.setattr(kernels, "usable", lambda: False)
    queries, keys, values, last, valid = scene(count, slots)
    narrow = jnp.asarray(queries, dtype)
    cache = LayerCache(packed(keys), packed(values))
    found = cached_attention(narrow, cache, jnp.asarray(last), jnp.asarray(valid))
    assert found.dtype == narrow.dtype
    numbers = decoded(cache.keys), decoded(cache.values)
    wanted = by_definition(np.asarray(narrow.astype(jnp.float32)), *numbers, last, valid)
    # Beyond float32: weights are rounded before they meet values, and so are results.
    tolerance = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
    if count <= 8 and kernels.usable():  # queries meet codes as words of 16 bits
        tolerance = max(tolerance, 3e-4)
    np.testing.assert_allclose(np.asarray(found.astype(jnp.float32)), wanted, atol=tolerance)


@pytest.mark.parametrize("count", [1, 5])
def test_attention_over_codes_errs_by_no_more_than_its_steps_allow(count: int) -> None:
    queries, keys, values, last, valid = scene(count, 300)
    cache = LayerCache(packed(keys), packed(values))
    arguments = jnp.asarray(queries), cache, jnp.asarray(last), jnp.asarray(valid)
    error = np.abs(cached_attention(*arguments) - by_definition(queries, keys, values, last, valid))
    # A score is off by half a step of its key in every number; e to twice that scales the weights.
    steps = [np.abs(part).max() / 127 for part in (keys, values)]
    off = np.abs(queries).sum(axis=-1, keepdims=True) * steps[0] / 2 / np.sqrt(SIZE)
    bound = steps[1] / 2 + np.expm1(2 * off) * 2 * np.abs(values).max()
    assert (error <= bound).all()
    assert 0 < error.max() < 0.02


def test_one_tokens_kernel_agrees_on_every_instruction_set() -> None:
    names = kernels.status().instruction_sets
    if not names:
        pytest.skip(kernels.status().reason)
    for batch, heads_of_keys, groups, slots, size in ((2, 3, 5, 77, 40), (1, 1, 8, 130, 7)):
        rows = batch * heads_of_keys
        queries = draw(rows, groups, size)
        keys, values = packed(draw(rows, slots, size, seed=1)), packed(draw(rows, slots, size))
        seen = np.random.default_rng(4).random((batch, slots)) < 0.7
        seen[:, :64] &= slots < 100  # in the long case a whole tile is not seen
        wanted = by_definition(
            queries.reshape(batch, -1, 1, size),
            decoded(keys),
            decoded(values),
            np.array([slots]),
            seen,
        )
        for name in names:
            found = products.one_token_attention(
                jnp.asarray(queries), keys, values, jnp.asarray(seen), instruction_set=name
            )
            np.testing.assert_allclose(found, wanted.reshape(found.shape), rtol=5e-5, atol=5e-5)


def test_a_token_on_trial_is_attended_bit_for_bit_as_alone() -> None:
    if not kernels.usable():
        pytest.skip(kernels.status().reason)
    queries, keys, values, last, valid = map(jnp.asarray, scene(5, 90))
    cache = LayerCache(as_rows(keys, ENCODED), as_rows(values, ENCODED))
    together = cached_attention(queries, cache, last, valid)
    for token in range(5):
        part = slice(token, token + 1)
        alone = cached_attention(queries[:, :, part], cache, last[part], valid)
        np.testing.assert_array_equal(alone, together[:, :, part])


def test_a_block_of_codes_is_attended_as_a_cache_of_them() -> None:
    queries, keys, values, last, valid = scene(9, 48)
    cache = LayerCache(packed(keys), packed(values))
    given = jnp.asarray(queries), jnp.asarray(last), jnp.asarray(valid)
    partial = attend_block(
        given[0], jnp.stack([cache.keys, cache.values]), valid=given[2], last_key=given[1]
    )
    wanted = cached_attention(given[0], cache, given[1], given[2])
    np.testing.assert_allclose(heads(partial, given[0]), wanted, atol=1e-6)


@pytest.mark.parametrize("kernel", ["on", "off"])
@pytest.mark.parametrize("count", [1, 16])
def test_no_more_than_a_tile_is_ever_expanded(
    count: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "off":
        monkeypatch.setattr(kernels, "usable", lambda: False)

    def workspace(slots: int) -> int:
        def shape(*axes: int, dtype: str = "uint8") -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(axes, jnp.dtype(dtype))

        arguments = (
            shape(1, 16, count, 128, dtype="bfloat16"),
            *(shape(8, slots, 132), shape(8, slots, 132)),
            shape(count, dtype="int32"),
            shape(1, slots, dtype="bool"),
        )

        def attend(queries: Any, keys: Any, values: Any, last_key: Any, valid: Any) -> Any:
            return cached_attention(queries, LayerCache(keys, values), last_key, valid)

        compiled = jax.jit(attend).lower(*arguments).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    tile_bytes = 8 * TILE_SLOTS * 128 * 4
    assert workspace(16 * TILE_SLOTS) <= workspace(2 * TILE_SLOTS) + tile_bytes // 8
    assert workspace(16 * TILE_SLOTS) <= 4 * tile_bytes


def test_a_query_that_may_see_nothing_gets_finite_numbers() -> None:
    queries, keys, values, last, valid = scene(3, 40)
    cache = LayerCache(packed(keys), packed(values))
    found = cached_attention(
        jnp.asarray(queries), cache, jnp.asarray(last), jnp.asarray(np.zeros_like(valid))
    )
    assert np.isfinite(np.asarray(found)).all()
