"""Products with packed matrices in JAX: a tile of rows is expanded, multiplied and forgotten.

The plain way, and the reference for faster ones. `TILE_NUMBERS` bounds what is expanded at a time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from memsched.codecs.block_sparse import SIDE
from memsched.codecs.int4 import CENTRE, RUN

TILE_NUMBERS = 1 << 18  # 1 MB as float32, and about as much again while it is made

EXACT = lax.Precision.HIGHEST  # by default some devices round float32 to ten bits first

Expand = Callable[[jax.Array], jax.Array]


def by_tiles(
    rows: jax.Array,
    packed: jax.Array,
    shape: tuple[int, ...],
    expand: Expand,
    cut: int = 1,
    columns: int | None = None,
) -> jax.Array:
    """`rows @ matrix.T` where `expand` makes float32 [n * cut, in] of n rows of `packed`.

    Of these rows it gets the first `columns` only, None: all.
    """
    outputs, width = shape
    count = packed.shape[0]
    wide = rows.astype(jnp.float32)
    size = _tile(count, width * cut, rows.shape[0] * cut)

    def add_tile(index: jax.Array, product: jax.Array) -> jax.Array:
        start = jnp.minimum(index * size, count - size)  # the last tile may overlap
        places = (start, jnp.zeros_like(start))
        tile = expand(lax.dynamic_slice(packed, places, (size, columns or packed.shape[1])))
        part = jnp.einsum("ri,oi->ro", wide, tile, precision=EXACT)
        return lax.dynamic_update_slice_in_dim(product, part, start * cut, axis=1)

    empty = jnp.zeros((rows.shape[0], count * cut), jnp.float32)
    return _looped(-(-count // size), add_tile, empty)[:, :outputs]


def plain(rows: jax.Array, packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The product with a matrix of numbers, of any floating-point dtype."""
    if packed.dtype == jnp.bfloat16:
        return _with_bfloat16(rows, packed)
    return by_tiles(rows, packed, shape, lambda part: part.astype(jnp.float32))


def _with_bfloat16(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    """XLA:CPU multiplies two or more bfloat16 rows with such a matrix as it is.

    In tiles it would widen the whole matrix before the loop; so the rows are taken some at a time.
    Each becomes three of bfloat16 whose sum it is, to the last bit.
    """
    wide = rows.astype(jnp.float32)
    outputs, count = matrix.shape[0], rows.shape[0]
    size = _tile(count, 3 * matrix.shape[1], 3 * outputs)

    def add_rows(index: jax.Array, product: jax.Array) -> jax.Array:
        start = jnp.minimum(index * size, count - size)  # the last rows may overlap
        rest, parts = lax.dynamic_slice_in_dim(wide, start, size), []
        for _ in range(3):
            parts.append(lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
            rest = rest - parts[-1]
        short = jnp.concatenate(parts).astype(jnp.bfloat16)
        several = jnp.einsum("ri,oi->ro", short, matrix, preferred_element_type=jnp.float32)
        part = several.reshape(3, size, outputs).sum(axis=0)
        return lax.dynamic_update_slice_in_dim(product, part, start, axis=0)

    empty = jnp.zeros((count, outputs), jnp.float32)
    return _looped(-(-count // size), add_rows, empty)


def _looped(
    count: int, add: Callable[[jax.Array, jax.Array], jax.Array], to: jax.Array
) -> jax.Array:
    if not to.size:  # no tile fits into nothing
        return to
    done: jax.Array = lax.fori_loop(0, count, add, to)
    return done


def int8(
    rows: jax.Array, packed: jax.Array, shape: tuple[int, ...], group: int | None
) -> jax.Array:
    """The product with what `Int8(group)` packed."""
    width = shape[1]

    def expand(part: jax.Array) -> jax.Array:
        codes = lax.bitcast_convert_type(part[:, :width], jnp.int8).astype(jnp.float32)
        scales = part[:, width:].reshape(part.shape[0], -1, 4)
        return codes * _spread(lax.bitcast_convert_type(scales, jnp.float32), group, width)

    return by_tiles(rows, packed, shape, expand)


def int4(
    rows: jax.Array, packed: jax.Array, shape: tuple[int, ...], group: int, *, zero: bool
) -> jax.Array:
    """The product with what `Int4(group, zero)` packed."""
    width = shape[1]
    half = -(-width // 2)

    def expand(part: jax.Array) -> jax.Array:
        pairs = part[:, half:].reshape(part.shape[0], -1, 2)
        terms = lax.bitcast_convert_type(pairs, jnp.float16).astype(jnp.float32)
        codes = _unpack(part[:, :half], width).astype(jnp.float32)
        if zero:
            minima = _spread(terms[:, 1::2], group, width)
            return codes * _spread(terms[:, ::2], group, width) + minima
        return (codes - CENTRE) * _spread(terms, group, width)

    return by_tiles(rows, packed, shape, expand)


def svd(rows: jax.Array, packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`rows @ right.T`, then `@ left`: the matrix is never made."""
    outputs, width = shape
    rank = packed.shape[0]
    inner = by_tiles(rows, packed, (rank, width), _from_bytes, columns=2 * width)
    size = _tile(outputs, rank, rows.shape[0])

    def add_tile(index: jax.Array, product: jax.Array) -> jax.Array:
        start = jnp.minimum(index * size, outputs - size)  # the last tile may overlap
        left = lax.dynamic_slice_in_dim(packed, 2 * (width + start), 2 * size, axis=1)
        part = jnp.einsum("rk,ko->ro", inner, _from_bytes(left), precision=EXACT)
        return lax.dynamic_update_slice_in_dim(product, part, start, axis=1)

    empty = jnp.zeros((rows.shape[0], outputs), jnp.float32)
    return _looped(-(-outputs // size), add_tile, empty)


def two_of_four(rows: jax.Array, packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The product with what `TwoOfFour` packed."""
    width = shape[1]
    fours = -(-width // 4)

    def expand(part: jax.Array) -> jax.Array:
        lines = part.shape[0]
        pairs = part[:, 4 * fours :]
        codes = jnp.stack([pairs & 15, pairs >> 4], axis=2).reshape(lines, -1, 1)[:, :fours]
        kept = _from_bytes(part[:, : 4 * fours]).reshape(lines, fours, 2)
        places = jnp.arange(4, dtype=jnp.uint8)[None, None]
        first = jnp.where(codes & 3 == places, kept[:, :, :1], 0)
        both = jnp.where(codes >> 2 == places, kept[:, :, 1:], first)
        return both.reshape(lines, -1)[:, :width]

    return by_tiles(rows, packed, shape, expand)


def block_sparse(rows: jax.Array, packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The product with what `BlockSparse` packed."""
    width = shape[1]
    bitmap, across = -(-width // (8 * SIDE)), -(-width // SIDE)

    def expand(part: jax.Array) -> jax.Array:
        lines = part.shape[0]
        places = jnp.arange(8, dtype=jnp.uint8)[None, None]
        bits = (part[:, :bitmap, None] >> places & 1).reshape(lines, -1)[:, :across] == 1
        order = jnp.maximum(jnp.cumsum(bits, axis=1) - 1, 0)
        pairs = part[:, bitmap:].reshape(lines, -1, SIDE, SIDE, 2)
        kept = lax.bitcast_convert_type(pairs, jnp.bfloat16)
        tiles = jnp.take_along_axis(kept, order[:, :, None, None], axis=1).astype(jnp.float32)
        tiles = jnp.where(bits[:, :, None, None], tiles, 0)
        return tiles.swapaxes(1, 2).reshape(lines * SIDE, -1)[:, :width]

    return by_tiles(rows, packed, shape, expand, SIDE)


def _tile(count: int, numbers: int, products: int) -> int:
    """How many lines to take at a time, if one has so many numbers and makes so many products."""
    return max(1, min(count, TILE_NUMBERS // max(numbers, products)))


def _from_bytes(part: jax.Array) -> jax.Array:
    """Rows of the bytes of bfloat16 numbers to float32."""
    pairs = part.reshape(part.shape[0], -1, 2)
    return lax.bitcast_convert_type(pairs, jnp.bfloat16).astype(jnp.float32)


def _unpack(packed: jax.Array, width: int) -> jax.Array:
    """Bytes to codes, in the order of memsched.codecs.int4."""
    whole, half = width // RUN * RUN, -(-(width % RUN) // 2)
    runs = packed[:, : whole // 2].reshape(packed.shape[0], -1, RUN // 2)
    codes = jnp.stack([runs & 15, runs >> 4], axis=2).reshape(packed.shape[0], whole)
    if whole == width:
        return codes
    tail = packed[:, whole // 2 :]
    return jnp.concatenate([codes, tail & 15, (tail >> 4)[:, : width - whole - half]], axis=1)


def _spread(terms: jax.Array, group: int | None, width: int) -> jax.Array:
    """[rows, groups] to [rows, in]: each number's own term."""
    if group is None:
        return terms
    lines, count = terms.shape
    return jnp.broadcast_to(terms[:, :, None], (lines, count, group)).reshape(lines, -1)[:, :width]
