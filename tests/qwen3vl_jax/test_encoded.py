"""Products with packed int8 and int4 weights against NumPy in float64, and through the model."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax import lax

from memsched.codecs import CODECS, Int4, Int8
from qwen3vl_jax import Qwen3VL, kernels
from qwen3vl_jax.encoded import Encoded, PackedRows, formulation
from qwen3vl_jax.kernels import products
from qwen3vl_jax.layers import Linear
from qwen3vl_jax.linear import linear
from qwen3vl_jax.network import network_from_arrays

KINDS = ("int8", "int8:64", "int8:128", "int4:32", "int4:64", "int4:32:zero", "int4:64:zero")
# (out, in): whole vectors, a short last group, one number, an odd end of a run, less than a run.
SIZES = ((8, 128), (37, 45), (1, 1), (7, 300), (6, 31), (5, 193))
ROUNDING = {"float32": 0.0, "float16": 0.0, "bfloat16": 2.0**-8}  # of weights, for many rows


@pytest.fixture(scope="module")
def instruction_sets() -> tuple[str, ...]:
    """Those of the kernels here; a test that needs one is skipped without a compiler or AVX2."""
    found = kernels.status()
    if not found.active:
        pytest.skip(found.reason)
    return found.instruction_sets


def draw(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> jax.Array:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(values).astype(dtype)


def pack(kind: str, codes: np.ndarray, scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Packed rows, byte by byte, from codes as they are stored and one term for every group."""
    packed = []
    for row, scale, minimum in zip(codes.tolist(), scales, minima, strict=True):
        if kind.startswith("int8"):
            packed.append(np.array(row, np.int8).tobytes() + scale.astype("<f4").tobytes())
            continue
        parts = []
        for start in range(0, len(row), 32):
            run = row[start : start + 32]
            half = (len(run) + 1) // 2
            low, high = run[:half], run[half:] + [0] * (len(run) % 2)
            parts += [a | b << 4 for a, b in zip(low, high, strict=True)]
        terms = np.stack([scale, minimum], axis=1) if kind.endswith("zero") else scale
        packed.append(bytes(parts) + terms.astype("<f2").tobytes())
    return np.array([list(row) for row in packed], np.uint8)


def drawn(kind: str, outputs: int, inputs: int) -> tuple[jax.Array, np.ndarray]:
    """Packed rows of random codes, and the float64 matrix that they stand for."""
    generator = np.random.default_rng(outputs * 1000 + inputs)
    low, high = (-127, 127) if kind.startswith("int8") else (0, 15)
    codes = generator.integers(low, high, (outputs, inputs), endpoint=True)
    width = group_of(kind) or inputs
    shape = outputs, -(-inputs // width)
    stored = np.float32 if kind.startswith("int8") else np.float16
    scales, minima = (generator.standard_normal(shape).astype(stored) for _ in range(2))
    spread = [np.repeat(a.astype(float), width, axis=1)[:, :inputs] for a in (scales, minima)]
    centre = 8 if kind.startswith("int4") and not kind.endswith("zero") else 0
    matrix = (codes - centre) * spread[0] + (spread[1] if kind.endswith("zero") else 0)
    return jnp.asarray(pack(kind, codes, scales, minima)), matrix


def group_of(kind: str) -> int:
    codec = CODECS[kind]
    assert isinstance(codec, Int4 | Int8)
    return codec.group or 0


def whole(kind: str, rows: jax.Array) -> np.ndarray:
    """Rows as a kernel for few of them sees them: in units, whole multiples of a power of two."""
    unit, inputs = (64 if kind.startswith("int8") else 32), rows.shape[1]
    wide = np.pad(np.asarray(rows).astype(np.float64), ((0, 0), (0, -inputs % unit)))
    units = wide.reshape(len(wide), -1, unit)
    largest = np.maximum(np.abs(units).max(axis=-1, keepdims=True), 2.0**-112)
    step = np.exp2(np.floor(np.log2(largest)) - 14)
    words = np.minimum(np.rint(units / step), 32767)
    return (words * step).reshape(wide.shape)[:, :inputs]


def few(
    kind: str, rows: jax.Array, packed: jax.Array, instruction_set: str | None = None
) -> jax.Array:
    inputs, group = rows.shape[1], group_of(kind)
    if kind.startswith("int8"):
        return products.few_rows_int8(rows, packed, inputs, group, instruction_set=instruction_set)
    zero = kind.endswith("zero")
    return products.few_rows_int4(
        rows, packed, inputs, group, zero, instruction_set=instruction_set
    )


def many(kind: str, rows: jax.Array, packed: jax.Array) -> jax.Array:
    inputs, group = rows.shape[1], group_of(kind)
    if kind.startswith("int8"):
        return products.many_rows_int8(rows, packed, inputs, group)
    return products.many_rows_int4(rows, packed, inputs, group, kind.endswith("zero"))


def tile(
    kind: str, packed: jax.Array, start: int, size: int, inputs: int, dtype: str, name: str
) -> jax.Array:
    group, at, numbers = group_of(kind), jnp.int32(start), jnp.dtype(dtype)
    if kind.startswith("int8"):
        return products.int8_tile(packed, at, size, inputs, group, numbers, instruction_set=name)
    zero = kind.endswith("zero")
    return products.int4_tile(packed, at, size, inputs, group, zero, numbers, instruction_set=name)


def encoded(kind: str, weight: np.ndarray) -> Encoded:
    codec = CODECS[kind]
    assert isinstance(codec, Int4 | Int8)
    bits, zero = (4, codec.zero) if isinstance(codec, Int4) else (8, False)
    layout = PackedRows(bits, codec.group or 0, zero, codec)
    return Encoded(jnp.asarray(codec.encode(weight)), weight.shape, layout)


def assert_product(
    result: jax.Array, rows: jax.Array, matrix: np.ndarray, rounding: float = 0.0
) -> None:
    """Within the roundings of a float32 sum, and `rounding` of each weight, of the product."""
    wide = np.asarray(rows).astype(np.float64)
    assert result.dtype == jnp.float32
    allowed = (2.0**-20 + rounding) * (np.abs(wide) @ np.abs(matrix).T) + 1e-30
    assert np.all(np.abs(np.asarray(result) - wide @ matrix.T) <= allowed)


# ---- kernels ----


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_are_the_product_with_the_numbers_that_are_meant(
    kind: str, dtype: str, instruction_sets: tuple[str, ...]
) -> None:
    for outputs, inputs in SIZES if dtype == "float32" else SIZES[3:4]:
        packed, matrix = drawn(kind, outputs, inputs)
        x = draw((7, inputs), dtype, 1)  # blocks of four, two and one row
        for name in instruction_sets:
            assert_product(few(kind, x, packed, name), whole(kind, x), matrix)


def test_rows_of_bfloat16_and_of_whole_numbers_are_multiplied_as_they_are(
    instruction_sets: tuple[str, ...],
) -> None:
    generator = np.random.default_rng(7)
    near = generator.uniform(1, 128, (3, 193)) * generator.choice([-1, 1], (3, 193))
    rows = jnp.asarray(near, jnp.bfloat16)
    for kind in KINDS:
        packed, matrix = drawn(kind, 5, 193)
        np.testing.assert_array_equal(whole(kind, rows), np.asarray(rows).astype(np.float64))
        for name in instruction_sets:
            assert_product(few(kind, rows, packed, name), rows, matrix)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30, 3e36])
def test_rows_of_any_size_are_multiplied(scale: float, instruction_sets: tuple[str, ...]) -> None:
    for kind in ("int8", "int4:32", "int4:32:zero"):
        packed, matrix = drawn(kind, 5, 70)
        x = draw((2, 70)) * np.float32(scale)
        for name in instruction_sets:
            found = np.asarray(few(kind, x, packed, name)).astype(np.float64)
            bound = np.abs(whole(kind, x)).max() * np.abs(matrix).sum(axis=1).max()
            assert np.isfinite(found).all() or bound > 1e38
            if bound < 1e38:
                assert np.abs(found - whole(kind, x) @ matrix.T).max() <= 2.0**-20 * bound + 1e-37


@pytest.mark.parametrize("narrow", [True, False], ids=["bfloat16 processor", "another"])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_are_the_product_with_the_numbers_that_are_meant(
    kind: str,
    dtype: str,
    narrow: bool,
    monkeypatch: pytest.MonkeyPatch,
    instruction_sets: tuple[str, ...],
) -> None:
    assert instruction_sets
    here = dataclasses.replace(kernels.status(), multiplies_bfloat16=narrow)
    monkeypatch.setattr(kernels, "status", lambda: here)
    monkeypatch.setattr(products, "TILE_BYTES", 1000)  # several tiles; the last one overlaps
    for outputs, inputs in ((37, 45), (5, 193))[: 2 if dtype == "bfloat16" else 1]:
        packed, matrix = drawn(kind, outputs, inputs)
        x = draw((19, inputs), dtype, 1)
        assert_product(many(kind, x, packed), x, matrix, ROUNDING[dtype] if narrow else 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tile_is_some_rows_as_numbers(kind: str, instruction_sets: tuple[str, ...]) -> None:
    for outputs, inputs in SIZES:
        packed, matrix = drawn(kind, outputs, inputs)
        start, size = outputs // 3, outputs - outputs // 3
        expected = jnp.asarray(matrix[start:].astype(np.float32))
        for name in instruction_sets:
            wide = tile(kind, packed, start, size, inputs, "float32", name)
            np.testing.assert_array_equal(wide, expected)
            narrow = tile(kind, packed, start, size, inputs, "bfloat16", name)
            np.testing.assert_array_equal(narrow, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_read_what_codecs_write(kind: str, instruction_sets: tuple[str, ...]) -> None:
    for outputs, inputs in SIZES:
        weight = np.array(draw((outputs, inputs)))
        packed = CODECS[kind].encode(weight)
        decoded = CODECS[kind].decode(packed, weight.shape, "float32")
        for name in instruction_sets:
            numbers = tile(kind, jnp.asarray(packed), 0, outputs, inputs, "float32", name)
            np.testing.assert_array_equal(numbers, decoded)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_rows_beside_it(
    kind: str, instruction_sets: tuple[str, ...]
) -> None:
    packed, _ = drawn(kind, 33, 77)
    x = draw((7, 77), "bfloat16", 1)
    for name in instruction_sets:
        together = few(kind, x, packed, name)
        for row in (0, 3, 5, 6):
            alone = few(kind, x[row : row + 1], packed, name)
            np.testing.assert_array_equal(together[row], alone[0])


ONE_OR_ALL_CORES = """
import os, sys
if sys.argv[1] == "one":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import hashlib, jax, numpy as np
from qwen3vl_jax.kernels import products
generator = np.random.default_rng(0)
x = jax.numpy.asarray(generator.standard_normal((3, 512), np.float32))
codes = generator.integers(0, 60, (999, 512 // 2 + 2 * 16), np.uint8)
y = products.few_rows_int4(x, jax.numpy.asarray(codes), 512, 32, False)
print(hashlib.sha256(np.asarray(y).tobytes()).hexdigest())
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


def test_not_a_number_passes_through_and_zeros_stay_zeros(
    instruction_sets: tuple[str, ...],
) -> None:
    for kind in KINDS:
        packed, matrix = drawn(kind, 6, 45)
        x = draw((1, 45)).at[0, 44].set(jnp.nan)
        for name in instruction_sets:
            assert np.isnan(np.asarray(few(kind, x, packed, name))).all()
            assert not np.asarray(few(kind, jnp.zeros((2, 45)), packed, name)).any()
        assert np.isfinite(matrix).all()


@pytest.mark.parametrize(
    ("kind", "width", "inputs", "says"),
    [
        ("int8", 63 + 4, 64, "as many bytes"),
        ("int8:64", 65 + 4, 65, "as many bytes"),
        ("int4:32", 32 + 2, 64, "as many bytes"),
        ("int4:32:zero", 32 + 4, 64, "as many bytes"),
    ],
)
def test_packed_rows_of_another_length_are_refused(
    kind: str, width: int, inputs: int, says: str, instruction_sets: tuple[str, ...]
) -> None:
    packed, x = jnp.zeros((4, width), jnp.uint8), draw((1, inputs))
    for name in instruction_sets:
        with pytest.raises(jax.errors.JaxRuntimeError, match=says):
            few(kind, x, packed, name).block_until_ready()
        with pytest.raises(jax.errors.JaxRuntimeError, match=says):
            tile(kind, packed, 0, 4, inputs, "float32", name).block_until_ready()


def test_other_groups_and_tiles_beyond_the_end_are_refused(
    instruction_sets: tuple[str, ...],
) -> None:
    assert instruction_sets
    x, packed = draw((1, 96)), jnp.zeros((4, 96 + 4), jnp.uint8)
    with pytest.raises(jax.errors.JaxRuntimeError, match="groups of 64, 128"):
        products.few_rows_int8(x, packed, 96, 96).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match="8 bits, or 4 bits"):
        products.few_rows_int4(x, packed, 96, 0, False).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match="not all in w"):
        products.int8_tile(packed, jnp.int32(2), 3, 96, 0, jnp.float32).block_until_ready()
    with pytest.raises(ValueError, match="rows have 96 numbers, and packed rows 95"):
        products.few_rows_int8(x, packed, 95, 0)


# ---- weights ----


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kind", ["int8:64", "int4:32:zero"])
@pytest.mark.parametrize("count", [1, 20, 60])
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "plain"])
def test_linear_takes_an_encoded_weight(
    kernel: bool, count: int, kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel and not kernels.usable():
        pytest.skip(kernels.status().reason)
    monkeypatch.setattr(kernels, "usable", lambda: kernel)
    raw = np.array(draw((40, 96)))
    weight, bias, x = encoded(kind, raw), draw((40,), dtype, 3), draw((2, count, 96), dtype, 1)
    result = jax.jit(lambda *given: linear(*given))(x, weight, bias)  # nothing traced before
    assert (result.shape, result.dtype) == ((2, count, 40), dtype)
    decoded = CODECS[kind].decode(np.asarray(weight.packed), raw.shape, "float32")
    few_rows = formulation(2 * count, dtype, kernel=kernel) == "few_rows"
    flat = x.reshape(-1, 96)
    wide = (whole(kind, flat) if few_rows else np.asarray(flat).astype(np.float64)).reshape(x.shape)
    offset = np.asarray(bias).astype(np.float64)
    true, sums = wide @ decoded.T + offset, np.abs(wide) @ np.abs(decoded).T + np.abs(offset)
    last = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    allowed = (2.0**-20 + ROUNDING[dtype]) * sums + last * np.abs(true) + 1e-7
    assert np.all(np.abs(np.asarray(result).astype(np.float64) - true) <= 1.01 * allowed)


def test_rows_of_other_lengths_are_refused() -> None:
    weight = encoded("int8", np.array(draw((8, 64))))
    with pytest.raises((TypeError, ValueError)):
        linear(draw((2, 65)), weight)


def test_an_encoded_weight_is_one_leaf_and_equal_ones_share_a_program() -> None:
    first, second = (encoded("int4:64", np.array(draw((8, 64), seed=seed))) for seed in (1, 2))
    leaves, structure = jax.tree.flatten(first)
    assert [leaf.shape for leaf in leaves] == [first.packed.shape]
    assert structure == jax.tree.structure(second)
    assert structure != jax.tree.structure(encoded("int4:32", np.array(draw((8, 64)))))
    step = jax.jit(lambda x, weight: linear(x, weight))
    for weight in (first, second):
        step(draw((1, 64)), weight)
    assert step._cache_size() == 1


def test_a_module_holds_an_encoded_weight() -> None:
    module = Linear(64, 8, bias=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    raw = module.weight.get_value()
    module.weight = nnx.Param(encoded("int8", np.array(raw)))
    assert module.weight.shape == (8, 64)
    x = draw((3, 64))
    graph, state = nnx.split(module)
    result = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x)
    np.testing.assert_allclose(result, x @ raw.T, atol=0.2)
    assert np.abs(result - x @ raw.T).max() > 0


def test_an_encoded_weight_is_chosen_inside_a_loop() -> None:
    weights = [encoded("int8", np.array(draw((24, 24), seed=seed)) / 5) for seed in range(3)]
    x = draw((2, 24))

    def step(index: jax.Array, x: jax.Array) -> jax.Array:
        branches = [lambda x, weight=weight: linear(x, weight) for weight in weights]
        return lax.switch(index, branches, x)

    looped = jax.jit(lambda x: lax.fori_loop(0, 3, step, x))(x)
    expected = x
    for weight in weights:
        expected = linear(expected, weight)
    np.testing.assert_allclose(looped, expected, rtol=1e-4, atol=1e-4)


def is_matrix(path: str, array: jax.Array) -> bool:
    gathered = path.endswith("pos_embed.weight") or "embed_tokens" in path
    return array.ndim == 2 and not gathered


@pytest.mark.parametrize("name", ["dense", "moe_official_layout"])
def test_a_model_computes_with_encoded_weights_what_it_would_with_decoded_ones(
    name: str, tiny_model: Callable[..., Qwen3VL]
) -> None:
    model, given = tiny_model(name), tiny.inputs("image")
    arrays = {p: a for p, a in model.parameters.items() if is_matrix(p, a)}
    packed = {path: encoded("int8:64", np.array(array)) for path, array in arrays.items()}
    decoded = {
        path: jnp.asarray(CODECS["int8:64"].decode(np.asarray(w.packed), w.shape, "float32"))
        for path, w in packed.items()
    }
    assert len(packed) > 20
    models = [
        Qwen3VL(
            model.config,
            network_from_arrays(model.network, {**model.parameters, **weights}),
            model.settings,
        )
        for weights in (packed, decoded)
    ]
    scores = [each(**given) for each in models]
    np.testing.assert_allclose(*scores, atol=5e-4 * float(np.abs(scores[1]).max()))
    answers = [each.generate(**given, max_new_tokens=4, do_sample=False) for each in models]
    np.testing.assert_array_equal(*answers)


def test_a_program_for_another_platform_calls_no_kernel() -> None:
    weight, x = encoded("int4:32", np.array(draw((32, 64)))), draw((1, 64))
    traced = jax.jit(linear).trace(x, weight)
    assert "qwen3vl_encoded" not in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("qwen3vl_encoded" in traced.lower().as_text()) == kernels.usable()


@pytest.mark.parametrize("count", [1, 100])
def test_no_copy_of_a_weight_in_float32_is_made(count: int) -> None:
    weight = encoded("int4:32", np.zeros((4096, 1024), np.float32))
    x = jax.ShapeDtypeStruct((count, 1024), jnp.bfloat16)
    memory = jax.jit(linear).lower(x, weight).compile().memory_analysis()
    product = 2 * count * 4096 * 4
    assert memory.temp_size_in_bytes < product + 2 * products.TILE_BYTES


def test_more_rows_leave_the_registers() -> None:
    assert [formulation(rows, "bfloat16", kernel=True) for rows in (1, 16, 17)] == [
        "few_rows", "few_rows", "many_rows",
    ]  # fmt: skip
    assert formulation(32, "float32", kernel=True) == "few_rows"
    assert formulation(1, "bfloat16", kernel=False) == "plain"
