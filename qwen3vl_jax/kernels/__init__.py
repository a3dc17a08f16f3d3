"""Products and attention on x86-64: built at their first use, or reported as absent.

XLA:CPU has no formulation that reads a 16-bit weight at the speed of memory inside a whole layer
(DECISIONS.md has the figures), so kernels.cc does, called through jax.ffi. Where there is no
compiler, no AVX2 or another processor, XLA computes all: the same results within rounding.
`QWEN3VL_JAX_KERNELS=off` asks for that on purpose. Products with weights that rest as int8 or int4
codes, and attention over caches that do, are in `products`.
"""

import dataclasses
import functools
import itertools
import os
import platform

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from qwen3vl_jax.kernels.build import BuildError, load_cached

INSTRUCTION_SETS = ("avx512", "avx2")  # the best first
OPERATIONS = ("linear", "many_rows", "attention", "encoded", "encoded_attention", "decoded")
PUT_ROWS = "qwen3vl_put_rows"  # the same for all instruction sets


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """Which instruction sets the kernel can use here, the best first; with none, XLA computes.

    `multiplies_bfloat16` says whether the processor has instructions for that.
    """

    instruction_sets: tuple[str, ...]
    reason: str
    multiplies_bfloat16: bool = False

    @property
    def active(self) -> bool:
        """Is there a kernel to call?"""
        return bool(self.instruction_sets)


@functools.cache
def status() -> Status:
    """Build if needed, load and register the kernel, once per process; never raises."""
    if os.environ.get("QWEN3VL_JAX_KERNELS") == "off":
        return Status((), "switched off by QWEN3VL_JAX_KERNELS=off")
    if platform.machine() not in ("x86_64", "AMD64") or os.name != "posix":
        return Status((), f"there is no kernel for {platform.system()} on {platform.machine()}")
    try:
        library = load_cached()
    except (BuildError, OSError) as error:
        return Status((), str(error))
    usable = tuple(name for name in INSTRUCTION_SETS if library[f"qwen3vl_has_{name}"]())
    names = [target(*each) for each in itertools.product(OPERATIONS, usable)]
    for name in [*names, PUT_ROWS]:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(library[name]), platform="cpu")
    reason = usable[0] if usable else "this processor has neither AVX2 nor AVX-512"
    return Status(usable, reason, bool(library.qwen3vl_multiplies_bfloat16()))


def usable() -> bool:
    """Should what is traced now call the kernels? Not for an accelerator: nothing is built then."""
    return jax.default_backend() == "cpu" and status().active


def widen() -> bool:
    """Are products of 16-bit numbers faster in float32 for what is traced now?"""
    return usable() and not status().multiplies_bfloat16


def few_rows_product(
    rows: Float[Array, "rows in"],
    weight: Float[Array, "out in"],
    *,
    instruction_set: str | None = None,
) -> Float[Array, "rows out"]:
    """`rows @ weight.T` in float32 on a CPU, each row computed as if it were alone.

    Only where `status()` is active; `instruction_set` is one of those, by default the best.
    """
    return _product("linear", rows, weight, instruction_set)


def many_rows_product(
    rows: Float[Array, "rows in"],
    weight: Float[Array, "out in"],
    *,
    instruction_set: str | None = None,
) -> Float[Array, "rows out"]:
    """The same by tiles of rows: faster for dozens of them, slower for a few."""
    return _product("many_rows", rows, weight, instruction_set)


def _product(
    operation: str, rows: jax.Array, weight: jax.Array, instruction_set: str | None
) -> jax.Array:
    result = jax.ShapeDtypeStruct((rows.shape[0], weight.shape[0]), jnp.float32)
    name = target(operation, instruction_set)
    return jax.ffi.ffi_call(name, result, vmap_method="sequential")(rows, weight)


def one_token_attention(
    queries: Float[Array, "BK G D"],
    keys: Float[Array, "BK S D"],
    values: Float[Array, "BK S D"],
    seen: Bool[Array, "B S"],
    *,
    instruction_set: str | None = None,
) -> Float[Array, "BK G D"]:
    """Softmax attention in float32 of one token per row over the slots that are `seen`, on a CPU.

    Blocks of slots that are not seen are not read. A row that sees nothing gives zeros.
    Only where `status()` is active.
    """
    result = jax.ShapeDtypeStruct(queries.shape, jnp.float32)
    call = jax.ffi.ffi_call(target("attention", instruction_set), result, vmap_method="sequential")
    return call(queries, keys, values, seen)


def put_rows(
    array: Shaped[Array, "N S W"], rows: Shaped[Array, "N T W"], start: Int[Array, ""]
) -> Shaped[Array, "N S W"]:
    """`array` with `rows` in slots `start` and after, as lax.dynamic_update_slice puts them.

    For bfloat16, of which XLA:CPU writes all slots anew. In place where `array` is donated. Only
    where `status()` is active.
    """
    result = jax.ShapeDtypeStruct(array.shape, array.dtype)
    call = jax.ffi.ffi_call(PUT_ROWS, result, input_output_aliases={0: 0}, vmap_method="sequential")
    return call(array, rows, start)


def target(operation: str, instruction_set: str | None) -> str:
    """The name under which XLA knows the kernel; the best instruction set's unless one is named."""
    return f"qwen3vl_{operation}_{instruction_set or status().instruction_sets[0]}"
