"""What XLA itself says that steps take on a GPU that is not there.

XLA compiles for a description of a device, and its buffer assignment is exact: what it calls
temporary is the workspace of a step. Nothing is run, and no driver is needed; the extra `aot`
installs the compiler.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from memsched.aot.target_text import target_text
from memsched.errors import ProgramError
from memsched.machine import Machine
from memsched.program import Program, Step
from memsched.tracing.kernel import Kernel

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Workspace:
    """Bytes of workspace of a kernel: what its equations let us expect, and what XLA assigns."""

    kernel: str
    estimated_bytes: int
    compiled_bytes: int


def absent_device(machine: Machine) -> jax.Device:
    """A device to compile for: the GPU of a machine, which need not be there.

    Where it is not there, JAX_PLATFORMS=cpu must be set before JAX looks for devices: else its
    plugin for CUDA asks for a driver.

    Raises:
        ProgramError: there is no compiler for it here, or its file says too little about it.
    """
    try:
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name=machine.name,
            topology="1x1x1",
            target_config=target_text(machine),
        )
    except (RuntimeError, NotImplementedError) as error:
        raise ProgramError(
            f"machine {machine.name!r}: there is no XLA compiler for CUDA here "
            f"({_first_line(error)}); install the extra 'aot': pip install '.[aot]'"
        ) from error
    device: jax.Device = found.devices[0]
    return device


class Compiler:
    """Compiles kernels for a device of `absent_device`, each once: what is known is kept."""

    def __init__(self, device: jax.Device, progress: Progress = lambda kernel: None) -> None:
        """`progress` is told the name of every kernel that is about to be compiled."""
        self._device = device
        self._progress = progress
        self._known: dict[str, int] = {}

    def workspaces(self, program: Program, kernels: Mapping[str, Kernel]) -> tuple[Workspace, ...]:
        """Compiles all kernels of a program.

        Raises:
            ProgramError: XLA cannot compile a step for this device.
        """
        steps = {step.kernel: step for step in program.steps}
        found = []
        for name, step in steps.items():
            nbytes = self._temporary_bytes(program, step, kernels[name])
            found.append(Workspace(name, step.workspace_bytes, nbytes))
        return tuple(found)

    def _temporary_bytes(self, program: Program, step: Step, kernel: Kernel) -> int:
        """Of a step's kernel, by XLA. Its text before XLA changes it says which ones are equal."""
        sharding = jax.sharding.SingleDeviceSharding(self._device)
        struct: Any = jax.ShapeDtypeStruct  # untyped
        shapes = [
            struct(spec.shape, spec.dtype, sharding=sharding)
            for spec in (program.arrays[name] for name in step.inputs)
        ]
        try:
            lowered = kernel.lower(*shapes)
            key = hashlib.sha256(lowered.as_text().encode()).hexdigest()
            if key not in self._known:
                self._progress(step.kernel)
                compiled = lowered.compile()
                self._known[key] = int(compiled.memory_analysis().temp_size_in_bytes)
        except (RuntimeError, NotImplementedError) as error:
            raise ProgramError(
                f"step {step.name!r} cannot be compiled for {self._device.device_kind}: "
                f"{_first_line(error)}"
            ) from error
        return self._known[key]


def with_workspaces(program: Program, found: Sequence[Workspace]) -> Program:
    """The program with XLA's figures in the place of the estimates."""
    nbytes = {workspace.kernel: workspace.compiled_bytes for workspace in found}
    steps = tuple(
        dataclasses.replace(step, workspace_bytes=nbytes[step.kernel]) for step in program.steps
    )
    return dataclasses.replace(program, steps=steps)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:200].replace("; ", ", ")
