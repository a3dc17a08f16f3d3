"""Weights that rest in fewer bytes: a pytree with one leaf, and how products are made with it."""

import dataclasses
import functools
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float

from memsched.codecs import Codec, Int4, Int8
from qwen3vl_jax import kernels
from qwen3vl_jax.kernels import products

FEW_ROWS = {"bfloat16": 16, "float16": 32, "float32": 32}  # at most, for codes as they lie to win


@runtime_checkable
class Format(Protocol):
    """What knows how to multiply with packed data; frozen, so that equal ones share programs."""

    def product(self, rows: jax.Array, packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """`rows @ weight.T` for rows [n, in], a weight of `shape` [out, in]: float32 [n, out]."""
        ...


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["packed"], meta_fields=["shape", "format"]
)
@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """A matrix of `shape` [out, in] that rests as `packed`. `linear` takes it as any weight."""

    packed: Any  # one array; a shape while a phase is planned
    shape: tuple[int, int]
    format: Format

    def product(self, rows: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
        """`rows @ weight.T`, float32."""
        return self.format.product(rows, self.packed, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that it rests in."""
        return math.prod(self.packed.shape) * self.packed.dtype.itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class PackedRows:
    """int8 or int4 codes, row by row: C++ on a CPU where it can be built, else as `plain` does it.

    `plain` reads the same bytes; results agree within the rounding of `rows` to 16 bits
    (kernels.products). Cannot be differentiated.
    """

    bits: int  # 8 or 4
    group: int  # numbers that share a scale; 0: a whole row
    zero: bool  # is there a minimum beside every scale? int4 only
    plain: Format

    def product(self, rows: jax.Array, packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """`rows @ weight.T`, float32."""
        plain = functools.partial(self.plain.product, shape=tuple(shape))
        chosen = formulation(rows.shape[0], rows.dtype, kernel=kernels.usable())
        if chosen == "plain":
            return plain(rows, packed)
        kernel = functools.partial(self._kernel, chosen=chosen, inputs=shape[1])
        return lax.platform_dependent(rows, packed, cpu=kernel, default=plain)

    def _kernel(self, rows: jax.Array, packed: jax.Array, *, chosen: str, inputs: int) -> jax.Array:
        if self.bits == 4:
            int4 = products.few_rows_int4 if chosen == "few_rows" else products.many_rows_int4
            return int4(rows, packed, inputs, self.group, self.zero)
        int8 = products.few_rows_int8 if chosen == "few_rows" else products.many_rows_int8
        return int8(rows, packed, inputs, self.group)


def format_of(codec: Codec) -> Format:
    """How to multiply with what a codec has packed."""
    match codec:
        case Int8():
            return PackedRows(8, codec.group or 0, False, codec)
        case Int4():
            return PackedRows(4, codec.group, codec.zero, codec)
        case _:
            return codec


def formulation(rows: int, dtype: DTypeLike, *, kernel: bool) -> str:
    """The fastest way on a CPU to multiply with codes; `kernel` says whether there is one.

    Made by scripts/bench_formulations.py on two cores with AVX2, bfloat16 on two with AVX-512 and
    instructions for it (DECISIONS.md has the figures):

    | rows              | 1 to 16  | 17 to 32  | more      |
    |-------------------|----------|-----------|-----------|
    | bfloat16          | few_rows | many_rows | many_rows |
    | float16, float32  | few_rows | few_rows  | many_rows |

    Without a kernel: plain.
    """
    if not kernel:
        return "plain"
    return "few_rows" if rows <= FEW_ROWS.get(jnp.dtype(dtype).name, 0) else "many_rows"
