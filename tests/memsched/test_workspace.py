"""Operations and workspace of a step: counted by hand, and measured in a process of its own."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from memsched.tracing.workspace import MARGIN_SHARE, flops, workspace_bytes

S = jax.ShapeDtypeStruct
ROOT = Path(__file__).parents[2]
MOST_SHARE, MOST_BYTES = 1.15, 16_000_000


def jaxpr(function: Callable[..., Any], *shapes: Any) -> Any:
    return jax.make_jaxpr(function)(*shapes).jaxpr


@functools.cache
def peaks() -> dict[str, tuple[int, int]]:
    """Case -> predicted and measured bytes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    child = Path(__file__).with_name("measured_peaks.py")
    done = subprocess.run(
        [sys.executable, str(child)], capture_output=True, text=True, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return {name: tuple(pair) for name, pair in json.loads(done.stdout).items()}


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists() or jax.default_backend() != "cpu",
    reason="measured with Linux' high-water mark, for XLA:CPU",
)
@pytest.mark.parametrize(
    "case",
    [
        "attention bfloat16",
        "attention float32",
        "attention to a long cache",
        "mlp bfloat16",
        "mlp float32",
        "vision block",
        "head",
        "int8, 64 rows",
        "int8, 1 row",
    ],
)
def test_the_workspace_is_never_below_the_measured_peak_and_little_above(case: str) -> None:
    predicted, measured = peaks()[case]
    assert measured > 40_000_000, "too small to tell"
    assert measured <= predicted <= MOST_SHARE * measured + MOST_BYTES, peaks()


MATRIX, ROWS = S((64, 32), jnp.float32), S((8, 32), jnp.float32)


def looped(weights: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]


def chosen(index: jax.Array, w: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.switch(index, [lambda: x.sum(), lambda: (x @ w.T).sum()])


def convolved(image: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(image, kernel, (2, 2), "VALID")


@pytest.mark.parametrize(
    ("function", "shapes", "count"),
    [
        (lambda w, x: x @ w.T, (MATRIX, ROWS), 2 * 8 * 32 * 64),
        (jax.jit(lambda w, x: jnp.tanh(x @ w.T)), (MATRIX, ROWS), 2 * 8 * 32 * 64),
        (looped, (S((5, 32, 32), jnp.float32), ROWS), 5 * 2 * 8 * 32 * 32),
        (chosen, (S((), jnp.int32), MATRIX, ROWS), 2 * 8 * 32 * 64),
        (lambda q, k: jnp.einsum("bqd,bkd->bqk", q, k), (S((3, 4, 5), jnp.float32),) * 2, 480),
        # 3 x 3 places x 7 outputs, each of 2 x 2 values of 3 channels.
        (convolved, (S((1, 3, 6, 6), jnp.float32), S((7, 3, 2, 2), jnp.float32)), 9 * 7 * 12 * 2),
        (lambda x: x + 1, (ROWS,), 0),
    ],
    ids=["product", "jitted", "scan", "branches", "batched", "convolution", "no product"],
)
def test_flops_are_those_of_products(function: Any, shapes: Any, count: int) -> None:
    assert flops(jaxpr(function, *shapes)) == count


def with_margin(nbytes: int) -> int:
    return nbytes + nbytes // MARGIN_SHARE


def two_products(first: jax.Array, second: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ first.T) @ second


def four_products(square: jax.Array, x: jax.Array) -> jax.Array:
    return x @ square @ square @ square @ square


def chain(x: jax.Array) -> jax.Array:
    return jnp.exp(jnp.sin(x) * 2 + 1) - x


def softmax(x: jax.Array) -> jax.Array:
    return jax.nn.softmax(x, axis=-1)


def written(cache: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(cache, x, (jnp.int32(0), jnp.int32(0)))


def widened(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x @ weight.astype(jnp.float32).T


def halves(x: jax.Array, weight: jax.Array) -> jax.Array:
    """A loop whose body multiplies and adds: the product needs a place, the sum is carried."""
    start = jnp.zeros((8, 64), jnp.float32)
    return jax.lax.fori_loop(0, 4, lambda _, total: total + x @ weight.T, start).sum()


@pytest.mark.parametrize(
    ("function", "shapes", "nbytes"),
    [
        (chain, (ROWS,), 0),
        (written, (S((64, 32), jnp.float32), ROWS), 0),
        # The first product, and what the second reads.
        (two_products, (MATRIX, MATRIX, ROWS), 2 * 8 * 64 * 4),
        # Never more than what is read and what is written; the last is the result.
        (four_products, (S((32, 32), jnp.float32), ROWS), 2 * 8 * 32 * 4),
        (widened, (ROWS, S((64, 32), jnp.int8)), 64 * 32 * 4),
        # The largest value of each row, the exponentials, and their sum.
        (softmax, (ROWS,), 8 * 32 * 4 + 2 * 8 * 4),
        # The carried sum, the next one, and the product that is added.
        (halves, (ROWS, MATRIX), 3 * 8 * 64 * 4),
    ],
    ids=["fused", "in place", "two products", "four products", "widened weight", "softmax", "loop"],
)
def test_workspace_by_hand(function: Any, shapes: Any, nbytes: int) -> None:
    found = workspace_bytes(jaxpr(function, *shapes))
    assert nbytes <= found <= with_margin(nbytes) + 4 * 8 * 4


def test_the_platform_decides_which_branch_counts() -> None:
    def on_cpu(x: jax.Array, weight: jax.Array) -> jax.Array:
        return widened(x, weight)

    def elsewhere(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.zeros((8, 64), jnp.float32) + x[0, 0]

    def either(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(x, weight, cpu=on_cpu, default=elsewhere)

    traced = jaxpr(either, ROWS, S((64, 32), jnp.int8))
    wide, number = 64 * 32 * 4, 8
    assert wide <= workspace_bytes(traced, platform="cpu") <= with_margin(wide) + number
    assert workspace_bytes(traced, platform="cuda") <= number


def test_more_tokens_never_need_less() -> None:
    sizes = [
        workspace_bytes(jaxpr(two_products, MATRIX, MATRIX, S((rows, 32), jnp.float32)))
        for rows in (1, 2, 8, 64)
    ]
    assert sizes == sorted(sizes)
