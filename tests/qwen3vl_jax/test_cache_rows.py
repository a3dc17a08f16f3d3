"""New tokens are put into a KV cache where it lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3vl_jax import kernels
from qwen3vl_jax.cache_rows import put


def filled(shape: tuple[int, ...], dtype: str, first: int) -> jax.Array:
    return (jnp.arange(np.prod(shape)) % 97 + first).reshape(shape).astype(dtype)


@pytest.mark.parametrize("start", [0, 4, 11, 30])
@pytest.mark.parametrize("count", [1, 5, 12])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "uint8"])
def test_rows_land_where_a_dynamic_update_slice_puts_them(
    dtype: str, count: int, start: int
) -> None:
    array, rows = filled((3, 12, 7), dtype, 1), filled((3, count, 7), dtype, 120)
    found = jax.jit(put)(array, rows, jnp.int32(start))
    expected = np.array(array)
    first = min(max(start, 0), 12 - count)
    expected[:, first : first + count] = np.asarray(rows)
    np.testing.assert_array_equal(np.asarray(found), expected)
    np.testing.assert_array_equal(np.asarray(array), np.asarray(filled((3, 12, 7), dtype, 1)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_cache_that_is_given_away_is_neither_copied_nor_written_anew(dtype: str) -> None:
    if not kernels.usable():
        pytest.skip(kernels.status().reason)
    array, rows = jnp.zeros((2, 4096, 128), dtype), jnp.ones((2, 1, 128), dtype)
    place = array.unsafe_buffer_pointer()
    compiled = jax.jit(put, donate_argnums=0).lower(array, rows, jnp.int32(5)).compile()
    memory = compiled.memory_analysis()
    assert (memory.alias_size_in_bytes, memory.temp_size_in_bytes) == (array.nbytes, 0)
    assert "convert" not in compiled.as_text()
    result = compiled(array, rows, jnp.int32(5))
    assert result.unsafe_buffer_pointer() == place
    assert float(result.sum()) == 2 * 128


def test_more_rows_than_there_are_slots_and_other_dtypes_are_refused() -> None:
    if not kernels.usable():
        pytest.skip(kernels.status().reason)
    for rows, dtype in ((9, "bfloat16"), (1, "float32")):
        array = jnp.zeros((2, 8, 4), dtype)
        with pytest.raises(jax.errors.JaxRuntimeError, match="put rows"):
            kernels.put_rows(
                array, filled((2, rows, 4), dtype, 0), jnp.int32(0)
            ).block_until_ready()


def test_another_platform_needs_no_kernel() -> None:
    array, rows = jnp.zeros((2, 8, 4), jnp.bfloat16), jnp.zeros((2, 1, 4), jnp.bfloat16)
    traced = jax.jit(put).trace(array, rows, jnp.int32(0))
    assert "put_rows" not in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("put_rows" in traced.lower().as_text()) == kernels.usable()
