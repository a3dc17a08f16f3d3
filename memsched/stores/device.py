"""Arrays as JAX holds them: over memory that is ours, or owned by XLA.

On the CPU backend an array may lie over memory of ours (64-byte alignment is enough): what is
written there later is what steps read. Such an array must never be donated: XLA would copy it.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memsched.errors import ProgramError
from memsched.program import ArraySpec
from memsched.stores.blocks import Bytes

Sharding = jax.sharding.SingleDeviceSharding


def is_cpu(sharding: Sharding) -> bool:
    """Whether arrays of this placement lie in main memory that we can write."""
    devices: set[Any] = sharding.device_set
    return all(device.platform == "cpu" for device in devices)


def over_memory(view: Bytes, spec: ArraySpec, sharding: Sharding) -> Any:
    """The array whose bytes are `view`, now and later.

    Returns:
        A `jax.Array` without memory of its own on the CPU backend, else a numpy array.

    Raises:
        ProgramError: JAX copied it, which it does when the alignment is below 64 bytes.
    """
    typed = view.view(np.dtype(spec.dtype)).reshape(spec.shape)
    if not is_cpu(sharding):
        return typed
    array = jax.device_put(typed, sharding)
    start = view.ctypes.data
    if view.size and array.unsafe_buffer_pointer() != start:
        raise ProgramError(
            f"array {spec.name!r} at address {start:#x} was copied, not used where it "
            "lies: slots need an alignment of 64 B"
        )
    return array


def owned(value: Any, sharding: Sharding) -> jax.Array:
    """A given array as XLA owns it: a JAX array is taken over, any other is copied."""
    if isinstance(value, jax.Array):
        if value.committed and value.sharding == sharding:
            return value
        return put(value, sharding)
    # On the CPU backend `device_put` alone would use the caller's memory.
    return settled(jax.device_put(value, sharding, may_alias=False))


def filled(spec: ArraySpec, sharding: Sharding, fill: Callable[[Bytes], None]) -> jax.Array:
    """A new array of XLA's, its bytes written by `fill`."""
    dtype = np.dtype(spec.dtype)
    if is_cpu(sharding) and sharding.memory_kind == _default_kind(sharding):
        # Written before anybody else sees it: no second buffer, and it can be donated later.
        array = jnp.empty(spec.shape, dtype, device=sharding)
        fill(memory_of(array))
        return array
    buffer = np.empty(spec.shape, dtype)
    fill(buffer.reshape(-1).view(np.uint8))
    return settled(put(buffer, sharding))


def put(value: Any, sharding: Sharding) -> jax.Array:
    """A copy in that place, perhaps still under way; `value` itself if it lies there."""
    array: jax.Array = jax.device_put(value, sharding)
    return array


def settled(array: jax.Array) -> jax.Array:
    """The array, once its bytes are there."""
    array.block_until_ready()
    return array


def memory_of(array: Any) -> Bytes:
    """The bytes of an array: its own memory where that can be reached, else a copy.

    It holds no reference. One that `np.asarray` takes would turn every later donation of the
    array into a copy.
    """
    if not array.nbytes or not isinstance(array, jax.Array) or not is_cpu(_placement(array)):
        content: Bytes = np.asarray(array).reshape(-1).view(np.uint8)
        return content
    start = settled(array).unsafe_buffer_pointer()
    return np.ctypeslib.as_array((ctypes.c_uint8 * array.nbytes).from_address(start))


def _placement(array: jax.Array) -> Sharding:
    if not isinstance(array.sharding, Sharding):
        raise ProgramError(f"an array lies on several devices ({array.sharding}); give one on one")
    return array.sharding


def _default_kind(sharding: Sharding) -> str:
    (device,) = sharding.device_set
    return default_kind(device)


def default_kind(device: Any) -> str:
    """The memory in which a `jax.Device` computes."""
    return str(device.default_memory().kind)
