"""How fast a device multiplies, reads its own memory, and is reached from main memory."""

import dataclasses
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from memsched.machine import Compute

# Reading is a sum over more than any cache holds. A product of one row would be closer to a model,
# but XLA:CPU does that of an 8192 x 8192 matrix at a hundredth of the speed of a 6144 x 2048 one.
READ_BYTES = {"cpu": 128 << 20, "gpu": 1 << 30, "tpu": 1 << 30}
# Rows, in, out of a bfloat16 product with the matrix stored [out, in], as in a prefill.
PRODUCT_SHAPE = {"cpu": (512, 2048, 6144), "gpu": (4096, 8192, 8192), "tpu": (4096, 8192, 8192)}
TRANSFER_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class TransferRate:
    """Between main memory, pinned where the device knows that, and the device's own."""

    to_device_bytes_per_s: float
    to_host_bytes_per_s: float


def usable_threads() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0))


def measure_compute(device: jax.Device, *, seconds: float) -> Compute:
    """What the device reaches in bfloat16, the best of what fits in the time.

    Needs 0.13 GB of main memory on a CPU, up to 1 GiB of an accelerator's own.
    """
    rows, inputs, outputs = PRODUCT_SHAPE[device.platform]
    with jax.default_device(device):
        values = jnp.ones(READ_BYTES[device.platform] // 4, jnp.float32)
        x, weight = (jnp.ones((size, inputs), jnp.bfloat16) for size in (rows, outputs))
        little = jnp.ones(8, jnp.float32)
        return Compute(
            flops_per_s=2
            * rows
            * inputs
            * outputs
            / _run_s(lambda x, weight: x @ weight.T, (x, weight), seconds / 3),
            bytes_per_s=values.nbytes / _run_s(jnp.sum, (values,), seconds / 3),
            latency_s=_run_s(jnp.sin, (little,), seconds / 3),
            threads=usable_threads(),
        )


def measure_transfers(device: jax.Device, *, seconds: float) -> TransferRate:
    """Rates of one large array, in each direction."""
    kinds = {memory.kind for memory in device.addressable_memories()}
    near = SingleDeviceSharding(device)
    values = np.zeros(TRANSFER_BYTES, np.uint8)
    if "pinned_host" not in kinds:
        there = jax.device_put(values, near)
        up_s = _best_s(lambda: jax.device_put(values, near).block_until_ready(), seconds / 2)
        down_s = _best_s(lambda: np.array(there), seconds / 2)
    else:
        far = SingleDeviceSharding(device, memory_kind="pinned_host")
        here = jax.device_put(values, far)
        there = jax.device_put(here, near)
        up_s = _best_s(lambda: jax.device_put(here, near).block_until_ready(), seconds / 2)
        down_s = _best_s(lambda: jax.device_put(there, far).block_until_ready(), seconds / 2)
    return TransferRate(TRANSFER_BYTES / up_s, TRANSFER_BYTES / down_s)


def _run_s(
    function: Callable[..., jax.Array], values: tuple[jax.Array, ...], seconds: float
) -> float:
    """Seconds of one compiled call, best of many."""
    compiled = jax.jit(function).lower(*values).compile()
    return _best_s(lambda: compiled(*values).block_until_ready(), seconds)


def _best_s(run: Callable[[], object], seconds: float) -> float:
    """The shortest of the runs that fit in the time, at least two after the first."""
    run()
    end = time.perf_counter() + seconds
    best = float("inf")
    tries = 0
    while tries < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
        tries += 1
    return best
