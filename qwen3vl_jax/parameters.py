"""Where the weights of a model in memory come from: a checkpoint, or chance."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.weights import Entry

DTYPES = ("float32", "bfloat16", "float16")


def named_dtype(name: str) -> np.dtype:
    """One of `DTYPES`.

    Raises:
        UsageError: it is another.
    """
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return np.dtype(jnp.dtype(name))


def read_all(
    path: str | Path, config: Config, entries: Sequence[Entry], dtype: np.dtype
) -> dict[str, Array]:
    """Every array of a checkpoint, on the default device."""
    from qwen3vl_jax.checkpoints.opening import open_checkpoint

    arrays = {}
    with open_checkpoint(path, config) as checkpoint:
        for entry in entries:
            # Zero-copy when the dtype stays: the array that was read is the one XLA reads.
            read = jax.device_put(checkpoint.read(entry))
            arrays[entry.path] = read if read.dtype == dtype else read.astype(dtype)
    return arrays


def draw_all(shapes: Mapping[str, Any], dtype: np.dtype, seed: int) -> dict[str, Array]:
    """Random weights of these shapes, in their order, as `draw` makes them."""
    generator = np.random.default_rng(seed)
    return {
        path: jnp.asarray(draw(generator, path, one.shape), dtype) for path, one in shapes.items()
    }


def draw(
    generator: np.random.Generator, path: str, shape: tuple[int, ...]
) -> Float[np.ndarray, "..."]:
    """Ones for norms, zeros for biases, otherwise uniform with variance 1 / inputs."""
    if path.endswith("bias"):
        return np.zeros(shape, np.float32)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    reach = np.float32((3.0 / np.prod(shape[1:])) ** 0.5)
    return (generator.random(shape, np.float32) * 2 - 1) * reach
