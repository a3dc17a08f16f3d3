"""Products with what rests as int8 or int4 codes, packed row by row, on x86-64.

A packed row of `inputs` numbers is its codes, then the scales of its groups (`encoded.h` has the
layout; `memsched.codecs` writes it). Few rows become words of 16 bits, with a power of two for each
64 numbers beside int8 codes, for each 32 beside int4: numbers of bfloat16 down to 1/128 of the
largest among them stay as they are, others are off by at most 2^-15 of it. Many rows: the kernel
turns a tile of the weight at a time into numbers in the cache, for XLA to contract. Without AVX-512
XLA multiplies float32 1.7 times as fast as bfloat16.

All of this only where `kernels.status()` is active. A group of 0 is a whole row.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, DTypeLike, Float, Int, UInt8

from qwen3vl_jax import kernels

TILE_BYTES = 1 << 22  # of a weight at a time, as numbers; smaller ones are multiplied more slowly


def few_rows_int8(
    rows: Float[Array, "rows in"],
    packed: UInt8[Array, "out bytes"],
    inputs: int,
    group: int,
    *,
    instruction_set: str | None = None,
) -> Float[Array, "rows out"]:
    """`rows @ decoded.T` in float32, each row computed as if it were alone.

    A unit of `rows` with an infinity or what is not a number gives NaN.

    Args:
        group: numbers that share a scale: 64, 128 ... or 0.
    """
    return _few_rows(rows, packed, inputs, _attributes(8, group), instruction_set)


def few_rows_int4(
    rows: Float[Array, "rows in"],
    packed: UInt8[Array, "out bytes"],
    inputs: int,
    group: int,
    zero: bool,
    *,
    instruction_set: str | None = None,
) -> Float[Array, "rows out"]:
    """The same for int4.

    Args:
        group: numbers that share a scale: 32, 64 ...
        zero: do they share a minimum too?
    """
    return _few_rows(rows, packed, inputs, _attributes(4, group, zero), instruction_set)


def many_rows_int8(
    rows: Float[Array, "rows in"], packed: UInt8[Array, "out bytes"], inputs: int, group: int
) -> Float[Array, "rows out"]:
    """`rows @ decoded.T` in float32. Where the processor multiplies bfloat16, rows of it meet
    numbers that are rounded to it.
    """
    return _by_tiles(
        rows,
        packed,
        lambda start, size, dtype: int8_tile(packed, start, size, inputs, group, dtype),
    )


def many_rows_int4(
    rows: Float[Array, "rows in"],
    packed: UInt8[Array, "out bytes"],
    inputs: int,
    group: int,
    zero: bool,
) -> Float[Array, "rows out"]:
    """The same for int4."""
    return _by_tiles(
        rows,
        packed,
        lambda start, size, dtype: int4_tile(packed, start, size, inputs, group, zero, dtype),
    )


def int8_tile(
    packed: UInt8[Array, "out bytes"],
    start: Int[Array, ""],
    size: int,
    inputs: int,
    group: int,
    dtype: DTypeLike,
    *,
    instruction_set: str | None = None,
) -> Float[Array, "size in"]:
    """Rows `start` to `start + size` as numbers in bfloat16 or float32."""
    return _tile(packed, start, (size, inputs), dtype, _attributes(8, group), instruction_set)


def int4_tile(
    packed: UInt8[Array, "out bytes"],
    start: Int[Array, ""],
    size: int,
    inputs: int,
    group: int,
    zero: bool,
    dtype: DTypeLike,
    *,
    instruction_set: str | None = None,
) -> Float[Array, "size in"]:
    """The same for int4."""
    return _tile(packed, start, (size, inputs), dtype, _attributes(4, group, zero), instruction_set)


def one_token_attention(
    queries: Float[Array, "BK G D"],
    keys: UInt8[Array, "BK S W"],
    values: UInt8[Array, "BK S W"],
    seen: Bool[Array, "B S"],
    *,
    instruction_set: str | None = None,
) -> Float[Array, "BK G D"]:
    """`kernels.one_token_attention` over packed int8 rows of D numbers that share a scale."""
    result = jax.ShapeDtypeStruct(queries.shape, jnp.float32)
    name = kernels.target("encoded_attention", instruction_set)
    return jax.ffi.ffi_call(name, result, vmap_method="sequential")(queries, keys, values, seen)


def _attributes(bits: int, group: int, zero: bool = False) -> dict[str, np.int64]:
    return {"bits": np.int64(bits), "group": np.int64(group), "zero": np.int64(zero)}


def _few_rows(
    rows: Float[Array, "rows in"],
    packed: UInt8[Array, "out bytes"],
    inputs: int,
    attributes: dict[str, np.int64],
    instruction_set: str | None,
) -> Float[Array, "rows out"]:
    if rows.shape[1] != inputs:
        raise ValueError(f"rows have {rows.shape[1]} numbers, and packed rows {inputs}")
    result = jax.ShapeDtypeStruct((rows.shape[0], packed.shape[0]), jnp.float32)
    name = kernels.target("encoded", instruction_set)
    return jax.ffi.ffi_call(name, result, vmap_method="sequential")(rows, packed, **attributes)


def _tile(
    packed: UInt8[Array, "out bytes"],
    start: Int[Array, ""],
    shape: tuple[int, int],
    dtype: DTypeLike,
    attributes: dict[str, np.int64],
    instruction_set: str | None,
) -> Float[Array, "size in"]:
    name = kernels.target("decoded", instruction_set)
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(shape, dtype), vmap_method="sequential")
    return call(packed, start.astype(jnp.int32), **attributes)


def _by_tiles(
    rows: Float[Array, "rows in"],
    packed: UInt8[Array, "out bytes"],
    tile: Callable[[jax.Array, int, np.dtype], jax.Array],
) -> Float[Array, "rows out"]:
    outputs, inputs = packed.shape[0], rows.shape[1]
    narrow = rows.dtype == jnp.bfloat16 and kernels.status().multiplies_bfloat16
    dtype = np.dtype(jnp.bfloat16 if narrow else jnp.float32)
    most = max(1, TILE_BYTES // (inputs * dtype.itemsize))
    size = min(outputs, 1 << (most.bit_length() - 1))  # XLA multiplies by odd sizes more slowly
    wide = rows.astype(dtype)

    def add_tile(index: jax.Array, product: jax.Array) -> jax.Array:
        start = jnp.minimum(index * size, outputs - size)  # the last tile may overlap
        numbers = tile(start, size, dtype)
        part = jnp.einsum("ri,oi->ro", wide, numbers, preferred_element_type=jnp.float32)
        return lax.dynamic_update_slice_in_dim(product, part, start, axis=1)

    empty = jnp.zeros((rows.shape[0], outputs), jnp.float32)
    return lax.fori_loop(0, -(-outputs // size), add_tile, empty)
