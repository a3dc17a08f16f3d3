"""A phase of the model as a program: what a planner plans and a runtime carries out."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from memsched.program import ArraySpec, Program
from memsched.tracing.array_names import array_names
from memsched.tracing.function import Kernels, trace
from qwen3vl_jax.network import Qwen3VLNetwork
from qwen3vl_jax.phases import Phase, part


@dataclasses.dataclass(frozen=True, slots=True)
class Traced:
    """A phase for arrays of certain shapes.

    `given` names the leaves of its arrays in order, None where no step reads one; `results` the
    leaves of what it returns, which make up `tree`.
    """

    name: str
    program: Program
    kernels: Kernels
    given: tuple[str | None, ...]
    results: tuple[str, ...]
    tree: Any

    def knowing(self, weights: Mapping[str, ArraySpec]) -> "Traced":
        """The same phase with weights that others read: they may lie there meanwhile."""
        arrays = {**weights, **self.program.arrays}
        program = dataclasses.replace(self.program, arrays=arrays)
        return dataclasses.replace(self, program=program)

    def beside(self, nbytes: int) -> "Traced":
        """The same phase while others keep `nbytes` on the device."""
        steps = tuple(
            dataclasses.replace(step, workspace_bytes=step.workspace_bytes + nbytes)
            for step in self.program.steps
        )
        program = dataclasses.replace(self.program, steps=steps)
        return dataclasses.replace(self, program=program)


def trace_phase(phase: Phase, network: Qwen3VLNetwork, arrays: tuple[Any, ...]) -> Traced:
    """Traces a phase. Neither `network` nor `arrays` need any memory: shapes are enough."""
    parts = tuple(part(network, path) for path in phase.weights)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arrays)
    trees = []

    def function(*values: Any) -> Any:
        result = phase.function(*values)
        trees.append(jax.tree.structure(result))
        return result

    program, kernels = trace(
        function,
        *parts,
        *shapes,
        names=(*phase.weights, *phase.arrays),
        kinds=("weight",) * len(parts) + tuple(phase.arrays.values()),
    )
    names = leaf_names(shapes, tuple(phase.arrays))
    known = tuple(name if name in program.arrays else None for name in names)
    return Traced(phase.name, program, kernels, known, program.outputs, trees[-1])


def leaf_names(arrays: tuple[Any, ...], roots: tuple[str, ...]) -> tuple[str, ...]:
    """The planner's names of all leaves of a phase's arrays."""
    return tuple(array_names(arrays, roots).names)
