"""Compiles two steps for the GPU of a machine's file, which is not here.

In a process of its own: JAX must know of no platform but the CPU before it looks for devices.
"""

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from memsched.aot import Compiler, absent_device
from memsched.profiles import load_machine
from memsched.tracing.function import trace


@jax.jit
def widen(weight: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sort((x @ weight).astype(jnp.float32), axis=-1).sum(axis=-1)


@functools.partial(jax.jit, donate_argnums=0)
def double(x: jax.Array) -> jax.Array:
    return x * 2


def both(weight: jax.Array, x: jax.Array, cache: jax.Array) -> list[jax.Array]:
    return [widen(weight, x), double(cache)]


shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((256, 512), (1024, 256), (1 << 20,))]
program, kernels = trace(both, *shapes)
asked: list[str] = []
compiler = Compiler(absent_device(load_machine(Path(sys.argv[1]))), asked.append)
found = {one.kernel: one.compiled_bytes for one in compiler.workspaces(program, kernels)}
compiler.workspaces(program, kernels)
print(json.dumps({"asked": asked, **found}))
