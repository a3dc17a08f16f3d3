"""Run alone: for each case, workspace as predicted from the jaxpr and as measured by the kernel.

Prints one JSON object: case -> [predicted bytes, measured bytes].
"""

import ctypes
import dataclasses
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memsched.tracing.workspace import workspace_bytes
from qwen3vl_jax import text, vision
from qwen3vl_jax.attention import attention
from qwen3vl_jax.config import load_config
from qwen3vl_jax.layers import RMSNorm
from qwen3vl_jax.linear import linear

CONFIG = load_config(Path(__file__).parents[2] / "configs/models/qwen3-vl-2b-instruct.json")
S = jax.ShapeDtypeStruct
LIBC, M_MMAP_THRESHOLD = ctypes.CDLL("libc.so.6"), -3


def cases() -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Name, jitted function and shapes of its arguments."""
    half = jnp.bfloat16
    for dtype, tokens in ((half, 4096), (jnp.float32, 2048)):
        keys = S((8, 256, 128), dtype)
        seen = (S((tokens,), jnp.int32), S((1, 256), jnp.bool_))
        queries = S((1, 16, tokens, 128), dtype)
        yield f"attention {dtype.__name__}", jax.jit(attention), (queries, keys, keys, *seen)
    queries = S((1, 16, 16, 32), jnp.float32)
    keys = S((8, 65536, 32), jnp.float32)
    seen = (S((16,), jnp.int32), S((1, 65536), jnp.bool_))
    yield "attention to a long cache", jax.jit(attention), (queries, keys, keys, *seen)
    thin = dataclasses.replace(CONFIG.text, hidden_size=256, intermediate_size=8192)
    for dtype in (half, jnp.float32):
        mlp = _abstract(text.DenseMLP, thin, dtype=dtype)
        rows = S((1, 1024, 256), dtype)
        yield f"mlp {dtype.__name__}", jax.jit(lambda mlp, x: mlp(x)), (mlp, rows)
    tower = dataclasses.replace(CONFIG.vision, hidden_size=256, num_heads=4, intermediate_size=4096)
    block = _abstract(vision.VisionBlock, tower, dtype=half)
    angles, valid = S((2048, 64), jnp.float32), S((2048,), jnp.bool_)
    patches = S((1, 2048, 256), half)
    yield "vision block", jax.jit(_vision_block), (block, patches, angles, angles, valid)
    norm = nnx.eval_shape(lambda: RMSNorm(512, eps=1e-6, dtype=half))
    rows = S((16384, 512), half)
    yield "head", jax.jit(_head), (norm, [rows, rows], S((1, 512, 512), half))
    weight, scale = S((16384, 4096), jnp.int8), S((16384,), jnp.float32)
    yield "int8, 64 rows", jax.jit(_int8_product), (S((64, 4096), half), weight, scale)
    yield "int8, 1 row", jax.jit(_int8_product), (S((1, 4096), half), weight, scale)


def _abstract(module: Any, config: Any, **options: Any) -> Any:
    return nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0), **options))


def _vision_block(block: Any, x: Any, cos: Any, sin: Any, valid: Any) -> Any:
    return vision.vision_block(block, x, cos, sin, valid)


def _head(norm: Any, blocks: list[Any], x: Any) -> Any:
    x = norm(x)
    scores = [linear(x, block).astype(jnp.float32) for block in blocks]
    return jnp.concatenate(scores, axis=-1)


def _int8_product(x: jax.Array, weight: jax.Array, scale: jax.Array) -> jax.Array:
    wide = weight.astype(x.dtype)
    product = jnp.einsum("ri,oi->ro", x, wide, preferred_element_type=jnp.float32)
    return (product * scale[None]).astype(x.dtype)


def measured_peak(function: Any, shapes: tuple[Any, ...]) -> int:
    """How far the resident memory rises above arguments and results while this runs."""
    arguments = jax.tree.map(lambda shape: jnp.ones(shape.shape, shape.dtype), shapes)
    compiled = function.lower(*arguments).compile()
    gc.collect()
    LIBC.malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    results = jax.block_until_ready(compiled(*arguments))
    return _status("VmHWM") - before - sum(array.nbytes for array in jax.tree.leaves(results))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def main() -> None:
    """Measures all cases."""
    # Freed blocks go back to the system at once: none is left for the next case to hide in.
    LIBC.mallopt(M_MMAP_THRESHOLD, 1 << 20)
    found = {}
    for name, function, shapes in cases():
        predicted = workspace_bytes(jax.make_jaxpr(function)(*shapes).jaxpr)
        found[name] = [predicted, measured_peak(function, shapes)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
