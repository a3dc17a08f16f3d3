"""Kernels and values for any tiny program: every byte of every input changes every result."""

import functools
import math
import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from memsched.program import ArraySpec, Program, Step

Kernel = Callable[..., tuple[jax.Array, ...]]


def kernels(program: Program) -> dict[str, Kernel]:
    """A jitted kernel for every kernel name; what a step updates is donated.

    Steps that share a kernel must agree in the shapes of what they return.
    """
    return {step.kernel: _kernel(step, program) for step in program.steps}


def _kernel(step: Step, program: Program) -> Kernel:
    specs = tuple(program.arrays[name] for name in step.results)
    seed = zlib.crc32(step.kernel.encode())
    donated = tuple(range(len(step.reads), len(step.inputs)))
    return jax.jit(functools.partial(_mix, seed, specs), donate_argnums=donated)


def _mix(seed: int, specs: tuple[ArraySpec, ...], *inputs: jax.Array) -> tuple[jax.Array, ...]:
    """Integers modulo 2**32 throughout: equal bits on every backend."""
    digest = jnp.uint32(seed)
    for values in inputs:
        bits = _bits(values.ravel())
        weights = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(2654435761)
        digest = digest * jnp.uint32(31) + jnp.sum((bits ^ weights) * (weights | jnp.uint32(1)))
    return tuple(_spread(digest + jnp.uint32(7919 * (i + 1)), spec) for i, spec in enumerate(specs))


def _bits(values: jax.Array) -> jax.Array:
    """The bits of each value as an integer of 32 bits."""
    unsigned = jnp.dtype(f"uint{8 * values.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(values, unsigned).astype(jnp.uint32)


def _spread(digest: jax.Array, spec: ArraySpec) -> jax.Array:
    """An array full of small whole numbers that depend on the digest and on their place."""
    place = jnp.arange(math.prod(spec.shape), dtype=jnp.uint32)
    mixed = (digest ^ (place * jnp.uint32(2246822519))) * jnp.uint32(3266489917)
    small = ((mixed ^ (mixed >> jnp.uint32(15))) >> jnp.uint32(8)) & jnp.uint32(255)
    return small.astype(spec.dtype).reshape(spec.shape)


def given_values(program: Program, seed: int = 0) -> dict[str, np.ndarray]:
    """Random contents of all arrays that exist before the first step."""
    rng = np.random.default_rng(seed)
    specs = [program.arrays[name] for name in program.given]
    return {
        spec.name: rng.integers(0, 256, spec.shape).astype(np.dtype(spec.dtype)) for spec in specs
    }


def run_directly(
    program: Program, kernels: Mapping[str, Kernel], given: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The outputs when all steps run in order and everything stays: what a plan must give."""
    held = {name: jnp.array(values) for name, values in given.items()}
    for step in program.steps:
        results = kernels[step.kernel](*(held[name] for name in step.inputs))
        held |= dict(zip(step.results, results, strict=True))
    return {name: np.asarray(held[name]) for name in program.outputs}
