"""A GPU in the words of XLA: the text form of its `GpuTargetConfig`.

Source: OpenXLA, xla/stream_executor/device_description.proto (fields of `GpuDeviceInfoProto`).
"""

from collections.abc import Mapping

from memsched.errors import ProgramError
from memsched.machine import DEVICE, Machine

# The same for every CUDA device since compute capability 3.0.
WARP_THREADS = 32
GRID_LIMITS = (2**31 - 1, 65535, 65535)
# What a block gets without asking for more.
SHARED_BYTES_UNASKED = 48 << 10
# A version that XLA knows; only its choice among cuDNN's convolutions depends on it.
CUDNN_VERSION = (9, 8)


def target_text(machine: Machine) -> str:
    """What `jax.experimental.topologies` takes as `target_config`.

    Raises:
        ProgramError: the machine has no GPU, or its file does not say enough about it.
    """
    target, compute = machine.target, machine.compute
    if machine.platform != "gpu":
        raise ProgramError(
            f"machine {machine.name!r} computes on a {machine.platform}, and XLA compiles ahead of "
            "time for CUDA GPUs; leave --aot out"
        )
    if target is None:
        raise ProgramError(
            f"machine {machine.name!r}: its file has no table [target], which says what GPU to "
            "compile for; add one like those in configs/machines, or leave --aot out"
        )
    major, _, minor = target.compute_capability.partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        raise ProgramError(
            f"machine {machine.name!r}: target.compute_capability must be like '6.1', found "
            f"{target.compute_capability!r}"
        )
    info = {
        "threads_per_block_limit": compute.threads_per_block,
        "threads_per_warp": WARP_THREADS,
        "shared_memory_per_block": min(compute.shared_bytes_per_block, SHARED_BYTES_UNASKED),
        "shared_memory_per_block_optin": compute.shared_bytes_per_block,
        "shared_memory_per_core": target.shared_bytes_per_core,
        "threads_per_core_limit": target.threads_per_core,
        "core_count": target.cores,
        "fpus_per_core": target.float32_units_per_core,
        "block_dim_limit_x": GRID_LIMITS[0],
        "block_dim_limit_y": GRID_LIMITS[1],
        "block_dim_limit_z": GRID_LIMITS[2],
        "memory_bandwidth": int(compute.bytes_per_s),
        "l2_cache_size": target.l2_cache_bytes,
        "clock_rate_ghz": target.clock_hz / 1e9,
        "device_memory_size": machine.tier(DEVICE).capacity_bytes,
        "registers_per_core_limit": target.registers_per_core,
        "registers_per_block_limit": target.registers_per_core,
    }
    if missing := [name for name, value in info.items() if not value]:
        raise ProgramError(
            f"machine {machine.name!r}: compiling for its GPU needs {', '.join(missing)}, which "
            "[compute] of its file does not say; add it, as files in configs/machines do"
        )
    return _text(machine.name, info, int(major), int(minor))


def _text(name: str, info: Mapping[str, int | float], major: int, minor: int) -> str:
    return "\n".join(
        [
            "gpu_device_info {",
            *(f"  {field}: {value}" for field, value in info.items()),
            f"  cuda_compute_capability {{ major: {major} minor: {minor} }}",
            "}",
            'platform_name: "CUDA"',
            f"dnn_version_info {{ major: {CUDNN_VERSION[0]} minor: {CUDNN_VERSION[1]} }}",
            f'device_description_str: "{name}"',
        ]
    )
