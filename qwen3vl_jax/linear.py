"""The product with a weight in the checkpoint's own [out, in] layout, formulated in one place.

At equal mathematics the formulation decides the speed on XLA:CPU by a factor of 40; `formulation`
is the table, made by `scripts/bench_formulations.py`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float

from qwen3vl_jax import kernels
from qwen3vl_jax.encoded import Encoded

Product = Callable[[jax.Array, jax.Array], jax.Array]

KERNEL_ROWS = {"bfloat16": 32, "float16": 32, "float32": 16}  # at most, for the kernel to win
BFLOAT16_ROWS = 8  # the same where the processor multiplies bfloat16
NEED_KERNELS = ("kernel", "many_rows")  # of FORMULATIONS
BLOCK_OUTPUTS = 256  # rows of a float16 weight that are widened at a time: 2 MB of 2048 each


def linear(
    x: Float[Array, "*rows in"],
    weight: Float[Array, "out in"] | Encoded,
    bias: Float[Array, " out"] | None = None,
) -> Float[Array, "*rows out"]:
    """`x @ weight.T + bias`, summed in float32, in the dtype of `x`.

    Can be differentiated, once or more, forwards or backwards, whatever formulation is chosen,
    unless the weight is encoded.

    Raises:
        TypeError: if `x` and `weight` differ in dtype: one of them would be copied, in silence.
    """
    if not isinstance(weight, Encoded) and x.dtype != weight.dtype:
        raise TypeError(
            f"linear: x is {x.dtype} and weight {weight.shape} is {weight.dtype}; "
            "they must share a dtype: convert one of them where it is made"
        )
    rows = x.reshape(-1, x.shape[-1])
    product = _product(rows, weight)
    if bias is not None:
        product = product + bias.astype(jnp.float32)[None]
    return product.astype(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def formulation(rows: int, dtype: DTypeLike, *, kernel: bool, widen: bool) -> str:
    """The name of the fastest of `FORMULATIONS` on a CPU.

    Made by scripts/bench_formulations.py on two cores with AVX-512 and instructions for bfloat16,
    and on two with AVX2 (DECISIONS.md has the figures):

    | rows                       | 1 to 8 | 9 to 16  | 17 to 32 | more     |
    |----------------------------|--------|----------|----------|----------|
    | bfloat16                   | kernel | kernel   | kernel   | many     |
    | bfloat16, `widen` is false | kernel | contract | contract | contract |
    | float16                    | kernel | kernel   | kernel   | many     |
    | float32                    | kernel | kernel   | contract | contract |

    Without a kernel: bfloat16 two_rows for one row, float16 blocks, everything else contract.

    Args:
        kernel: is there one?
        widen: are products of bfloat16 faster in float32?
    """
    name = jnp.dtype(dtype).name
    if not kernel:
        if name == "bfloat16" and rows == 1:
            return "two_rows"
        return "blocks" if name == "float16" else "contract"
    native = name == "bfloat16" and not widen
    if rows <= (BFLOAT16_ROWS if native else KERNEL_ROWS.get(name, 0)):
        return "kernel"
    return "contract" if native or name == "float32" else "many_rows"


def contract(
    rows: Float[Array, "rows in"], weight: Float[Array, "out in"]
) -> Float[Array, "rows out"]:
    """One contraction: what accelerators want, and XLA:CPU for many rows."""
    return jnp.einsum("ri,oi->ro", rows, weight, preferred_element_type=jnp.float32)


def two_rows(
    rows: Float[Array, "rows in"], weight: Float[Array, "out in"]
) -> Float[Array, "rows out"]:
    """One row computed twice: for a single one XLA:CPU would copy the weight to float32."""
    return contract(jnp.concatenate([rows, rows]), weight)[: rows.shape[0]]


def blocks(
    rows: Float[Array, "rows in"], weight: Float[Array, "out in"]
) -> Float[Array, "rows out"]:
    """Widens the weight to float32 block by block, in the cache: XLA:CPU would widen all of it."""
    outputs = weight.shape[0]
    size = min(BLOCK_OUTPUTS, outputs)
    wide = rows.astype(jnp.float32)

    def add_block(index: jax.Array, product: jax.Array) -> jax.Array:
        start = jnp.minimum(index * size, outputs - size)  # the last block may overlap
        part = lax.dynamic_slice_in_dim(weight, start, size).astype(jnp.float32)
        return lax.dynamic_update_slice_in_dim(product, contract(wide, part), start, axis=1)

    empty = jnp.zeros((rows.shape[0], outputs), jnp.float32)
    return lax.fori_loop(0, -(-outputs // size), add_block, empty)


FORMULATIONS: dict[str, Product] = {
    "blocks": blocks,
    "contract": contract,
    "kernel": kernels.few_rows_product,
    "many_rows": kernels.many_rows_product,
    "two_rows": two_rows,
}


def _product(
    rows: Float[Array, "rows in"], weight: Float[Array, "out in"] | Encoded
) -> Float[Array, "rows out"]:
    if isinstance(weight, Encoded):
        return weight.product(rows)
    chosen = formulation(rows.shape[0], rows.dtype, kernel=kernels.usable(), widen=kernels.widen())
    return contract(rows, weight) if chosen == "contract" else _for_cpu(rows, weight, chosen)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _for_cpu(
    rows: Float[Array, "rows in"], weight: Float[Array, "out in"], name: str
) -> Float[Array, "rows out"]:
    """The named formulation if this is compiled for a CPU, `contract` for anything else."""
    return lax.platform_dependent(rows, weight, cpu=FORMULATIONS[name], default=contract)


@_for_cpu.defjvp
def _for_cpu_derivative(
    name: str, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (rows, weight), (d_rows, d_weight) = primals, tangents
    return _for_cpu(rows, weight, name), contract(d_rows, weight) + contract(rows, d_weight)
