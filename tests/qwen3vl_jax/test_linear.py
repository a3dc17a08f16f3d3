"""`linear` and the kernels behind it against NumPy in float64, and against each other."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qwen3vl_jax import kernels
from qwen3vl_jax.kernels import build
from qwen3vl_jax.linear import FORMULATIONS, NEED_KERNELS, formulation, linear

# Half a unit in the last place, relative: what rounding a result to the dtype costs at most.
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
ONE_BY_ONE = 2.0**-21  # of a sum of 384 numbers in a row; other products sum in several lanes
# (out, in): multiples of a vector, odd ones, one number.
SIZES = ((64, 96), (37, 45), (1, 1))


@pytest.fixture(scope="module")
def instruction_sets() -> tuple[str, ...]:
    """Those of the kernels here; a test that needs one is skipped without a compiler or AVX2."""
    found = kernels.status()
    if not found.active:
        pytest.skip(found.reason)
    return found.instruction_sets


def draw(shape: tuple[int, ...], dtype: str, seed: int = 0) -> jax.Array:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(values).astype(dtype)


def wide(array: jax.Array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def assert_product(
    result: jax.Array, x: jax.Array, weight: jax.Array, rounding: float, of_sum: float = 2.0**-22
) -> None:
    """Within one rounding of the result, and those of a float32 sum, from the true product."""
    true = wide(x) @ wide(weight).T
    sums = np.abs(wide(x)) @ np.abs(wide(weight)).T
    allowed = 1.01 * rounding * np.abs(true) + of_sum * sums + 1e-7
    assert np.all(np.abs(wide(result) - true) <= allowed)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 16, 17, 33])
def test_linear_is_the_product_for_every_number_of_rows(rows: int, dtype: str) -> None:
    for outputs, inputs in SIZES:
        x, weight = draw((rows, inputs), dtype, 1), draw((outputs, inputs), dtype, 2)
        result = jax.jit(linear)(x, weight)
        assert result.shape == (rows, outputs)
        assert result.dtype == dtype
        assert_product(result, x, weight, ROUNDING[dtype])


@pytest.mark.parametrize("name", [name for name in FORMULATIONS if name not in NEED_KERNELS])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_every_formulation_is_the_product_in_float32(dtype: str, name: str) -> None:
    x, weight = draw((3, 70), dtype, 1), draw((600, 70), dtype, 2)
    result = jax.jit(FORMULATIONS[name])(x, weight)
    assert result.dtype == jnp.float32
    assert_product(result, x, weight, 0.0)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_kernel_of_every_instruction_set_agrees_with_xla(
    dtype: str, instruction_sets: tuple[str, ...]
) -> None:
    for outputs, inputs in (*SIZES, (700, 300)):
        for rows in (1, 7):
            x, weight = draw((rows, inputs), dtype, 1), draw((outputs, inputs), dtype, 2)
            for name in instruction_sets:
                result = kernels.few_rows_product(x, weight, instruction_set=name)
                assert_product(result, x, weight, 0.0)
                plain = FORMULATIONS["contract"](x, weight)
                np.testing.assert_allclose(result, plain, rtol=1e-5, atol=1e-5 * inputs**0.5)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_many_rows_are_the_product_at_every_edge_of_a_tile(
    dtype: str, instruction_sets: tuple[str, ...]
) -> None:
    # Strips of 384 numbers, tasks of 64 outputs, panels of 16 or 32, tiles of 6 or 12 rows.
    for rows, outputs, inputs in (
        (1, 1, 1),
        (5, 17, 7),
        (13, 64, 384),
        (24, 97, 393),
        (7, 130, 769),
    ):
        x, weight = draw((rows, inputs), dtype, 1), draw((outputs, inputs), dtype, 2)
        for name in instruction_sets:
            result = kernels.many_rows_product(x, weight, instruction_set=name)
            assert_product(result, x, weight, 0.0, of_sum=ONE_BY_ONE)


def test_more_rows_than_are_packed_at_once(instruction_sets: tuple[str, ...]) -> None:
    x, weight = draw((1500, 40), "bfloat16", 1), draw((24, 40), "bfloat16", 2)
    for name in instruction_sets:
        result = kernels.many_rows_product(x, weight, instruction_set=name)
        assert_product(result, x, weight, 0.0)
        few = kernels.many_rows_product(x[1400:1403], weight, instruction_set=name)
        np.testing.assert_array_equal(few, result[1400:1403])


def test_leading_axes_stay_and_the_bias_is_added_before_rounding() -> None:
    x, weight = draw((2, 3, 16), "bfloat16", 1), draw((8, 16), "bfloat16", 2)
    bias = draw((8,), "bfloat16", 3)
    result = linear(x, weight, bias)
    true = wide(x) @ wide(weight).T + wide(bias)
    assert result.shape == (2, 3, 8)
    # One rounding to bfloat16, not two: within half a unit in the last place.
    half_unit = 2.0 ** (np.floor(np.log2(np.abs(true))) - 8)
    assert np.all(np.abs(wide(result) - true) <= half_unit + 1e-5)
    assert linear(x[0, 0], weight).shape == (8,)


def test_an_operand_of_another_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match=r"x is float32 and weight \(8, 16\) is bfloat16"):
        linear(draw((2, 16), "float32"), draw((8, 16), "bfloat16"))


def test_not_a_number_and_infinity_pass_through() -> None:
    weight = jnp.eye(40, dtype=jnp.bfloat16)
    x = jnp.zeros((1, 40), jnp.bfloat16).at[0, 3].set(jnp.nan)
    assert np.isnan(wide(linear(x, weight))).all()
    x = jnp.ones((1, 40), jnp.bfloat16)
    result = linear(x, weight.at[5, 5].set(jnp.inf))
    assert np.flatnonzero(np.isinf(wide(result)[0])).tolist() == [5]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_gradients_are_those_of_a_product(rows: int, dtype: str) -> None:
    x, weight = draw((rows, 24), dtype, 1), draw((10, 24), dtype, 2)
    bias, factor = draw((10,), dtype, 3), draw((rows, 10), dtype, 4)

    def loss(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        return (linear(x, weight, bias) * factor).astype(jnp.float32).sum()

    by_x, by_weight, by_bias = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, weight, bias)
    assert by_x.dtype == by_weight.dtype == dtype
    assert_product(by_x, factor, weight.T, ROUNDING[dtype])
    assert_product(by_weight, factor.T, x.T, ROUNDING[dtype])
    np.testing.assert_allclose(wide(by_bias), wide(factor).sum(0), atol=rows * ROUNDING[dtype] * 4)


def test_second_and_forward_derivatives_exist_for_few_rows() -> None:
    x, weight = draw((1, 6), "float32", 1), draw((9, 6), "float32", 2)

    @jax.jit
    def curvature(along: jax.Array) -> jax.Array:
        energy = jax.grad(lambda x: 0.5 * jnp.square(linear(x, weight)).sum())
        return jax.jvp(energy, (x,), (along,))[1]

    expected = wide(weight).T @ wide(weight).sum(1)
    np.testing.assert_allclose(curvature(jnp.ones_like(x))[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_linear_runs_inside_a_loop_on_a_chosen_weight(dtype: str) -> None:
    weights, x = draw((4, 24, 24), dtype, 1), draw((2, 24), dtype, 2)
    order = jnp.array([2, 0, 3])

    def step(index: jax.Array, x: jax.Array) -> jax.Array:
        return linear(x, weights[order[index]]) * jnp.asarray(0.2, dtype)

    looped = jax.jit(lambda x: lax.fori_loop(0, 3, step, x))(x)
    expected = x
    for index in range(3):
        expected = step(jnp.int32(index), expected)
    # In the loop XLA may fuse the factor with the rounding.
    np.testing.assert_allclose(wide(looped), wide(expected), atol=4 * ROUNDING[dtype])


def test_linear_can_be_mapped_over_weights() -> None:
    x, weights = draw((2, 24), "bfloat16", 1), draw((3, 9, 24), "bfloat16", 2)
    mapped = jax.jit(jax.vmap(linear, in_axes=(None, 0)))(x, weights)
    for result, weight in zip(mapped, weights, strict=True):
        assert_product(result, x, weight, ROUNDING["bfloat16"])


@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_row_does_not_depend_on_the_rows_beside_it(
    dtype: str, instruction_sets: tuple[str, ...]
) -> None:
    x, weight = draw((9, 70), dtype, 1), draw((33, 70), dtype, 2)
    for name in instruction_sets:
        together = kernels.few_rows_product(x, weight, instruction_set=name)
        for row in (0, 4, 8):
            alone = kernels.few_rows_product(x[row : row + 1], weight, instruction_set=name)
            np.testing.assert_array_equal(together[row], alone[0])


ONE_OR_ALL_CORES = """
import os, sys
if sys.argv[1] == "one":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import hashlib, jax, numpy as np
from qwen3vl_jax import kernels
assert kernels.status().active
generator = np.random.default_rng(0)
x, w = (jax.numpy.asarray(generator.standard_normal(s, np.float32)) for s in ((3, 512), (999, 512)))
print(hashlib.sha256(np.asarray(kernels.few_rows_product(x, w)).tobytes()).hexdigest())
"""


def test_results_do_not_depend_on_the_number_of_threads(instruction_sets: tuple[str, ...]) -> None:
    assert instruction_sets
    digests = {
        subprocess.run(
            [sys.executable, "-c", ONE_OR_ALL_CORES, cores],
            check=True, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
            cwd=Path(__file__).parents[2],
        ).stdout
        for cores in ("one", "all")
    }  # fmt: skip
    assert len(digests) == 1


def test_a_program_for_another_platform_calls_no_kernel() -> None:
    shapes = (
        jax.ShapeDtypeStruct((1, 64), jnp.bfloat16),
        jax.ShapeDtypeStruct((32, 64), jnp.bfloat16),
    )
    traced = jax.jit(linear).trace(*shapes)
    assert "qwen3vl_linear" not in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("qwen3vl_linear" in traced.lower().as_text()) == kernels.usable()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 4])
def test_no_copy_of_a_weight_in_float32_is_made(rows: int, dtype: str) -> None:
    weight = jax.ShapeDtypeStruct((4096, 1024), jnp.dtype(dtype))
    x = jax.ShapeDtypeStruct((rows, 1024), jnp.dtype(dtype))
    for kernel in {False, kernels.usable()}:
        product = FORMULATIONS[formulation(rows, dtype, kernel=kernel, widen=kernels.widen())]
        memory = jax.jit(product).lower(x, weight).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 4096 * 1024 * 4 / 2


SLOWER = 2.0  # A choice twice as slow as the best means that the table has grown old.
ROUNDS = 200


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("rows", [1, 4, 128])
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "xla"])
def test_the_chosen_formulation_is_still_the_fast_one(kernel: bool, rows: int, dtype: str) -> None:
    if kernel and not kernels.usable():
        pytest.skip(kernels.status().reason)
    weight, x = draw((2048, 1024), dtype, 1), draw((rows, 1024), dtype, 2)
    steps = {
        name: jax.jit(product).lower(x, weight).compile()
        for name, product in FORMULATIONS.items()
        if kernel or name not in NEED_KERNELS
    }
    chosen = formulation(rows, dtype, kernel=kernel, widen=kernels.widen())
    best = dict.fromkeys(steps, float("inf"))
    # The least of many short runs in turn survives a busy machine; more runs where it does not.
    for number in range(ROUNDS):
        for name, step in steps.items():
            best[name] = min(best[name], seconds(lambda step=step: step(x, weight)))
        if number >= 3 and best[chosen] <= min(best.values()) * SLOWER:
            return
    pytest.fail(f"{dtype}, {rows} rows: {chosen} was chosen, but seconds were {best}")


def seconds(run: Callable[[], jax.Array]) -> float:
    start = time.perf_counter()
    run().block_until_ready()
    return time.perf_counter() - start


# ---- one token's attention ----


def attention_oracle(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, seen: np.ndarray
) -> np.ndarray:
    mixed = np.zeros(queries.shape)
    heads = len(keys) // len(seen)
    for head in range(len(keys)):
        slots = np.flatnonzero(seen[head // heads])
        scores = queries[head] @ keys[head, slots].T / np.sqrt(queries.shape[-1])
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        mixed[head] = shares / shares.sum(axis=1, keepdims=True) @ values[head, slots]
    return mixed


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    ("batch", "key_heads", "groups", "slots", "size"),
    [(1, 2, 2, 64, 32), (2, 3, 5, 77, 40), (2, 1, 1, 200, 128), (1, 1, 8, 130, 7)],
)
def test_one_tokens_attention_is_softmax_attention(
    batch: int, key_heads: int, groups: int, slots: int, size: int, dtype: str,
    instruction_sets: tuple[str, ...],
) -> None:  # fmt: skip
    rows = batch * key_heads
    queries = draw((rows, groups, size), dtype, 1) * jnp.asarray(3, dtype)
    keys, values = draw((rows, slots, size), dtype, 2), draw((rows, slots, size), dtype, 3)
    seen = np.random.default_rng(4).random((batch, slots)) < 0.7
    seen[:, -64:] &= slots < 100  # in the long cases a whole tile is not seen
    seen[:, 1] = True
    true = attention_oracle(wide(queries), wide(keys), wide(values), seen)
    for name in instruction_sets:
        mixed = kernels.one_token_attention(
            queries, keys, values, jnp.asarray(seen), instruction_set=name
        )
        assert mixed.dtype == jnp.float32
        np.testing.assert_allclose(mixed, true, rtol=2e-5, atol=2e-5)


def test_slots_that_are_not_seen_may_hold_anything(instruction_sets: tuple[str, ...]) -> None:
    queries, keys = draw((2, 2, 32), "float32", 1), draw((2, 100, 32), "float32", 2)
    seen = jnp.arange(100)[None] < 70
    dirty = jnp.where(seen[0][None, :, None], keys, jnp.nan)
    clean = jnp.where(seen[0][None, :, None], keys, 0)
    for name in instruction_sets:
        expected = kernels.one_token_attention(queries, clean, clean, seen, instruction_set=name)
        mixed = kernels.one_token_attention(queries, dirty, clean, seen, instruction_set=name)
        np.testing.assert_array_equal(mixed, expected)
        nothing = kernels.one_token_attention(
            queries, keys, keys, jnp.zeros((1, 100), bool), instruction_set=name
        )
        np.testing.assert_array_equal(nothing, 0)


# ---- building ----


def test_a_library_is_built_once_in_a_private_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instruction_sets: tuple[str, ...]
) -> None:
    assert instruction_sets
    directory = tmp_path / "cache"
    build.load(directory)
    (library,) = directory.iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert library.stat().st_mode & 0o077 == 0
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    assert build.load(directory).qwen3vl_has_avx2() == 1
    library.chmod(0o722)
    with pytest.raises(PermissionError, match="writable by nobody else"):
        build.load(directory)
    directory.chmod(0o777)
    with pytest.raises(PermissionError, match="mode 777"):
        build.load(directory)


@pytest.mark.parametrize(
    ("compiler", "says"),
    [("/nonexistent/compiler", "does not exist"), ("false", "failed with exit code 1")],
)
def test_without_a_working_compiler_there_is_a_reason_and_no_kernel(
    compiler: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QWEN3VL_JAX_KERNELS", raising=False)
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = kernels.status.__wrapped__()
    assert not found.active
    assert says in found.reason
    assert list(tmp_path.rglob("*.so")) == list(tmp_path.rglob("*.tmp")) == []


def test_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3VL_JAX_KERNELS", "off")
    assert kernels.status.__wrapped__().reason == "switched off by QWEN3VL_JAX_KERNELS=off"
