"""Attention against its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3vl_jax import attention as module
from qwen3vl_jax import kernels
from qwen3vl_jax.attention import attention, query_block


def by_definition(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    last_key: np.ndarray,
    valid: np.ndarray,
) -> np.ndarray:
    """One query and one head at a time."""
    batch, heads, count, size = queries.shape
    key_heads = len(keys) // batch
    mixed = np.zeros(queries.shape)
    for row, head, query in np.ndindex(batch, heads, count):
        index = row * key_heads + head // (heads // key_heads)
        seen = valid[row] & (np.arange(keys.shape[1]) <= last_key[query])
        scores = keys[index][seen] @ queries[row, head, query] / np.sqrt(size)
        weights = np.exp(scores - scores.max())
        mixed[row, head, query] = weights / weights.sum() @ values[index][seen]
    return mixed


def draw(count: int, slots: int = 37) -> tuple[np.ndarray, ...]:
    """Two rows, six query heads over two key heads; the second row begins with padding."""
    rng = np.random.default_rng(count)
    queries = rng.standard_normal((2, 6, count, 8))
    keys, values = rng.standard_normal((2, 4, slots, 8))
    valid = np.ones((2, slots), bool)
    valid[1, :3] = False
    last_key = np.arange(count, dtype=np.int32) + np.int32(slots - count - 2)
    return queries, keys, values, last_key, valid


@pytest.mark.parametrize("count", [1, 2, 16, 30])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kernel", ["on", "off"])
def test_attention_is_its_definition(
    count: int, dtype: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "off":
        monkeypatch.setattr(kernels, "usable", lambda: False)
    arrays = draw(count)
    # The same rounded numbers on both sides: what is compared is the computation.
    rounded = [jnp.asarray(array, dtype) for array in arrays[:3]]
    wanted = by_definition(*(np.asarray(a.astype(jnp.float32)) for a in rounded), *arrays[3:])
    found = np.asarray(attention(*rounded, *map(jnp.asarray, arrays[3:])).astype(jnp.float32))
    tolerance = {"float32": 1e-6, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
    np.testing.assert_allclose(found, wanted, atol=tolerance)


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = draw(35, slots=60)
    narrow = [jnp.asarray(array, jnp.float32) for array in arrays[:3]]
    monkeypatch.setattr(module, "SCORE_BLOCK_BYTES", 1)
    assert query_block(2 * 6 * 60, 35) == 16
    found = np.asarray(attention(*narrow, *map(jnp.asarray, arrays[3:])))
    np.testing.assert_allclose(found, by_definition(*arrays), atol=1e-6)


@pytest.mark.parametrize("count", [1, 5])
def test_the_derivative_is_that_of_the_definition(count: int) -> None:
    queries, keys, values, last_key, valid = draw(count)
    narrow = tuple(jnp.asarray(array, jnp.float32) for array in (queries, keys, values))
    rng = np.random.default_rng(0)
    direction = [rng.standard_normal(array.shape) for array in narrow]
    _, found = jax.jvp(
        lambda *arrays: attention(*arrays, jnp.asarray(last_key), jnp.asarray(valid)).sum(),
        narrow,
        tuple(jnp.asarray(array, jnp.float32) for array in direction),
    )
    step = 1e-6
    ahead, behind = (
        by_definition(
            *(a + sign * step * d for a, d in zip((queries, keys, values), direction, strict=True)),
            last_key,
            valid,
        ).sum()
        for sign in (1, -1)
    )
    assert float(found) == pytest.approx((ahead - behind) / (2 * step), rel=1e-3, abs=1e-3)


def test_a_query_that_may_see_nothing_gets_finite_numbers() -> None:
    *arrays, last_key, valid = map(jnp.asarray, draw(2))
    found = attention(*(a.astype(jnp.float32) for a in arrays), last_key, jnp.zeros_like(valid))
    assert np.isfinite(np.asarray(found)).all()
