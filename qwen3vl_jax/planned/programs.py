"""A phase of the model as a program: what a planner plans and a runtime carries out."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from memsched.aot import Compiler, Workspace, with_workspaces
from memsched.program import ArraySpec, Program
from memsched.tracing.array_names import array_names
from memsched.tracing.function import Kernels, trace
from memsched.tracing.steps import Known
from qwen3vl_jax.checkpoints.encodings import Encodings, form_of
from qwen3vl_jax.network import Qwen3VLNetwork
from qwen3vl_jax.phases import Phase, part
from qwen3vl_jax.planned.sealed import Sealed
from qwen3vl_jax.weights import Entry


@dataclasses.dataclass(frozen=True, slots=True)
class Traced:
    """A phase for arrays of certain shapes.

    `given` names the leaves of its arrays in order, None where no step reads one; `results` the
    leaves of what it returns, which make up `tree`. `compiled` is what its kernels take on a device
    that they were compiled for.
    """

    name: str
    program: Program
    kernels: Kernels
    given: tuple[str | None, ...]
    results: tuple[str, ...]
    tree: Any
    compiled: tuple[Workspace, ...] = ()

    def compiled_by(self, compiler: Compiler) -> "Traced":
        """The same phase with the workspaces that XLA assigns, in the place of estimates."""
        found = compiler.workspaces(self.program, self.kernels)
        program = with_workspaces(self.program, found)
        return dataclasses.replace(self, program=program, compiled=found)

    def knowing(self, weights: Mapping[str, ArraySpec]) -> "Traced":
        """The same phase with weights that others read: they may lie there meanwhile."""
        arrays = {**weights, **self.program.arrays}
        program = dataclasses.replace(self.program, arrays=arrays)
        return dataclasses.replace(self, program=program)

    def calling(self, leaves: Sequence[Any]) -> "Traced":
        """The same phase for these arrays: those that are on disk under the names they have."""
        names = {
            name: leaf.name
            for name, leaf in zip(self.given, leaves, strict=True)
            if name is not None and isinstance(leaf, Sealed)
        }
        if not names:
            return self
        arrays = {
            names.get(name, name): dataclasses.replace(spec, name=names.get(name, name))
            for name, spec in self.program.arrays.items()
        }
        steps = tuple(
            dataclasses.replace(step, reads=tuple(names.get(name, name) for name in step.reads))
            for step in self.program.steps
        )
        program = dataclasses.replace(self.program, arrays=arrays, steps=steps)
        given = tuple(None if name is None else names.get(name, name) for name in self.given)
        return dataclasses.replace(self, program=program, given=given)

    def beside(self, nbytes: int) -> "Traced":
        """The same phase while others keep `nbytes` on the device."""
        steps = tuple(
            dataclasses.replace(step, workspace_bytes=step.workspace_bytes + nbytes)
            for step in self.program.steps
        )
        program = dataclasses.replace(self.program, steps=steps)
        return dataclasses.replace(self, program=program)


def weight_specs(
    entries: Iterable[Entry], encodings: Encodings, dtype: np.dtype
) -> dict[str, ArraySpec]:
    """All weights as a planner knows them; `dtype` is that of raw ones."""
    forms = {entry.path: form_of(entry, encodings, dtype) for entry in entries}
    return {path: ArraySpec(path, *form, "weight") for path, form in forms.items()}


def trace_phase(
    phase: Phase,
    network: Qwen3VLNetwork,
    arrays: tuple[Any, ...],
    known: Known | None = None,
) -> Traced:
    """Traces a phase. Neither `network` nor `arrays` need any memory: shapes are enough.

    Args:
        known: what was traced before, and now need not be compiled again.
    """
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
        kinds=("weight",) * len(parts) + _kinds(phase, arrays),
        known=known,
    )
    names = leaf_names(shapes, tuple(phase.arrays))
    given = tuple(name if name in program.arrays else None for name in names)
    return Traced(phase.name, program, kernels, given, program.outputs, trees[-1])


def _kinds(phase: Phase, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """The kind of every argument, or of each array of it: what is on disk is a weight."""
    found: list[Any] = []
    for (root, kind), argument in zip(phase.arrays.items(), arrays, strict=True):
        leaves = jax.tree.leaves(argument)
        of_leaves = ["weight" if isinstance(leaf, Sealed) else kind for leaf in leaves]
        names = leaf_names((argument,), (root,))
        alike = all(other == kind for other in of_leaves)
        found.append(kind if alike else dict(zip(names, of_leaves, strict=True)))
    return tuple(found)


def leaf_names(arrays: tuple[Any, ...], roots: tuple[str, ...]) -> tuple[str, ...]:
    """The planner's names of all leaves of a phase's arrays."""
    return tuple(array_names(arrays, roots).names)
