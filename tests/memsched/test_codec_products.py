"""Products with encoded matrices against NumPy in float64, and how much of a matrix they expand."""

from collections.abc import Iterator

import codec_layouts as layouts
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from codec_layouts import draw
from jax import lax

from memsched.codecs import CODECS, Codec, products

# dtype of the rows, how many, (out, in): whole blocks, odd ends of fours, runs, groups; the least.
SIZES = (
    ("float32", 17, (32, 128)),
    ("float32", 1, (33, 193)),
    ("bfloat16", 3, (5, 3)),
    ("float16", 1, (1, 1)),
)
LARGEST_BYTES = 2 << 20  # of what a product may hold at a time, says Codec.product


def assert_product(
    name: str, result: jax.Array, rows: jax.Array, packed: np.ndarray, shape: tuple[int, int]
) -> None:
    """Within the roundings of sums in float32 of what the layout means."""
    assert (result.shape, result.dtype) == ((len(rows), shape[0]), jnp.float32)
    wide = np.asarray(rows).astype(np.float64)
    matrix = layouts.read(name, packed, shape)
    # A sum of n numbers is off by about sqrt(n) units of 2^-24, here at most 2^4 of them.
    allowed = 2.0**-20 * (np.abs(wide) @ layouts.magnitude(name, packed, shape).T) + 1e-30
    assert np.all(np.abs(np.asarray(result) - wide @ matrix.T) <= allowed)


def product(codec: Codec, rows: jax.Array, packed: np.ndarray, shape: tuple[int, int]) -> jax.Array:
    return jax.jit(lambda rows, packed: codec.product(rows, packed, shape))(rows, packed)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CODECS)
def test_a_product_is_that_with_the_numbers_that_are_meant(
    name: str, size: tuple[str, int, tuple[int, int]]
) -> None:
    dtype, count, shape = size
    packed = CODECS[name].encode(draw(shape))
    rows = jnp.asarray(draw((count, shape[1]), dtype, seed=1))
    assert_product(name, product(CODECS[name], rows, packed, shape), rows, packed, shape)


@pytest.mark.parametrize("name", CODECS)
def test_the_last_tile_may_overlap_the_one_before(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "TILE_NUMBERS", 350)  # seven rows of 45, and 37 are no sevens
    shape = (37, 45)
    packed = CODECS[name].encode(draw(shape))
    rows = jnp.asarray(draw((3, 45), seed=1))
    assert_product(name, product(CODECS[name], rows, packed, shape), rows, packed, shape)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_raw_matrix_in_16_bits_is_multiplied_as_it_is(dtype: str) -> None:
    rows, matrix = jnp.asarray(draw((3, 70), seed=1)), draw((20, 70), dtype)
    assert_product("raw", product(CODECS["raw"], rows, matrix, (20, 70)), rows, matrix, (20, 70))


@pytest.mark.parametrize("name", CODECS)
def test_a_row_that_is_no_number_leaves_the_others_alone(name: str) -> None:
    shape = (5, 33)
    packed = CODECS[name].encode(draw(shape))
    rows = jnp.asarray(draw((3, 33), seed=1))
    odd = rows.at[1, 0].set(jnp.nan)
    result = CODECS[name].product(odd, jnp.asarray(packed), shape)  # not in a jitted call
    assert np.isnan(np.asarray(result[1])).all()
    assert_product(name, result[::2], rows[::2], packed, shape)


@pytest.mark.parametrize("name", CODECS)
def test_no_rows_have_an_empty_product(name: str) -> None:
    codec, none = CODECS[name], jax.ShapeDtypeStruct((0, 33), jnp.float32)
    packed = jnp.asarray(codec.encode(draw((5, 33))))
    result = jax.eval_shape(lambda rows: codec.product(rows, packed, (5, 33)), none)
    assert (result.shape, result.dtype) == ((0, 5), jnp.float32)


# ---- what is in memory ----


def equations(jaxpr: jax.extend.core.Jaxpr) -> Iterator[jax.extend.core.JaxprEqn]:
    """All of a program, also those inside loops and calls."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, jax.extend.core.ClosedJaxpr):
                    yield from equations(inner.jaxpr)
                elif isinstance(inner, jax.extend.core.Jaxpr):
                    yield from equations(inner)


def program(name: str, count: int, shape: tuple[int, int]) -> list[jax.extend.core.JaxprEqn]:
    """What the product with a float32 matrix does. No matrix is made for it."""
    codec = CODECS[name]
    packed_shape, dtype = codec.packed(shape, "float32")
    traced = jax.make_jaxpr(lambda rows, packed: codec.product(rows, packed, shape))(
        jax.ShapeDtypeStruct((count, shape[1]), jnp.float32),
        jax.ShapeDtypeStruct(packed_shape, jnp.dtype(dtype)),
    )
    return list(equations(traced.jaxpr))


@pytest.mark.parametrize("shape", [(4096, 1024), (1024, 4096), (5000, 1001)])
@pytest.mark.parametrize("name", CODECS)
def test_nothing_larger_than_a_tile_is_made(name: str, shape: tuple[int, int]) -> None:
    for count in (1, 17):
        made = program(name, count, shape)
        assert any(equation.primitive.name == "dot_general" for equation in made)
        large = {
            (equation.primitive.name, variable.aval.shape, variable.aval.dtype.name)
            for equation in made
            for variable in equation.outvars
            if variable.aval.size * variable.aval.dtype.itemsize > LARGEST_BYTES
        }
        assert large == set()


@pytest.mark.parametrize("name", CODECS)
def test_products_of_float32_are_asked_for_in_full(name: str) -> None:
    """Elsewhere than on a CPU, less would be the default."""
    for equation in program(name, 3, (4096, 1024)):
        if equation.primitive.name == "dot_general":
            narrow = all(v.aval.dtype == jnp.bfloat16 for v in equation.invars)
            assert narrow or equation.params["precision"] == (lax.Precision.HIGHEST,) * 2
