"""What this machine can do right now: read memory, multiply matrices.

Both are measured next to every timed round: on a shared machine they change from minute to minute.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from qwen3vl_jax.linear import linear

READ_BYTES = 512 << 20  # well beyond any cache
PRODUCT_SHAPE = (512, 2048, 6144)  # rows, in, out: a prefill product of the 2B model
TRIES = 3


def reader(read_bytes: int = READ_BYTES) -> Callable[[], float]:
    """A function that measures bytes per second of reading memory once, on all cores."""
    array = jnp.ones(read_bytes // 4, jnp.float32)
    total = jax.jit(jnp.sum).lower(array).compile()
    return lambda: array.nbytes / _best_s(lambda: total(array))


def multiplier(
    dtype: DTypeLike, shape: tuple[int, int, int] = PRODUCT_SHAPE
) -> Callable[[], float]:
    """A function that measures the arithmetic per second of `linear` for many rows."""
    rows, inputs, outputs = shape
    x, weight = jnp.ones((rows, inputs), dtype), jnp.ones((outputs, inputs), dtype)
    product = jax.jit(linear).lower(x, weight).compile()
    return lambda: 2 * rows * inputs * outputs / _best_s(lambda: product(x, weight))


def _best_s(run: Callable[[], jax.Array]) -> float:
    seconds = []
    for _ in range(TRIES):
        start = time.perf_counter()
        run().block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
