"""Equations of a jaxpr become steps: names of results, what is updated in place, which kernel."""

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from memsched.errors import ProgramError
from memsched.program import ArraySpec, Kind, Step
from memsched.tracing.bodies import Body, body_of_step, check_constant
from memsched.tracing.graph import aval
from memsched.tracing.kernel import Kernel, Wiring, jitted_call
from memsched.tracing.source_lines import line_of


@dataclasses.dataclass(frozen=True, slots=True)
class Known:
    """What one function's trace leaves for the next: bodies of steps, and their compiled form."""

    bodies: dict[Hashable, Body] = dataclasses.field(default_factory=dict)
    functions: dict[Hashable, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class Tracing:
    """Steps found so far.

    Attributes:
        names: of every variable, by its id, the array that it is, and which version of it.
        versions: of every array, how often it was updated.
        constants: values closed over, by the id of their variable.
        updated_by: the step that updated an array last.
    """

    arrays: dict[str, ArraySpec]
    names: dict[int, tuple[str, int]]
    versions: dict[str, int]
    constants: dict[int, Any]
    known: Known
    steps: list[Step] = dataclasses.field(default_factory=list)
    kernels: dict[str, Kernel] = dataclasses.field(default_factory=dict)
    updated_by: dict[str, str] = dataclasses.field(default_factory=dict)
    kernel_names: dict[Hashable, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        closed: jex.ClosedJaxpr,
        names: Sequence[str],
        kinds: Mapping[str, Kind],
        known: Known,
    ) -> "Tracing":
        """Before the first step: the given arrays."""
        jaxpr = closed.jaxpr
        constants = dict(zip(map(id, jaxpr.constvars), closed.consts, strict=True))
        tracing = cls({}, {}, {}, constants, known)
        for name, variable in zip(names, jaxpr.invars, strict=True):
            tracing.add_array(name, variable, kinds[name])
        return tracing

    def add_array(self, name: str, variable: Any, kind: Kind) -> None:
        """A new array.

        Raises:
            ProgramError: its name is taken, or it has no plain numbers.
        """
        if name in self.arrays:
            raise ProgramError(f"array {name!r}: a given array has the name of a step's result")
        found = aval(variable)
        dtype = _dtype_name(found.dtype)
        if dtype is None:
            raise ProgramError(
                f"array {name!r} has dtype {found.dtype}, which has no bytes of its own: pass its "
                "data (jax.random.key_data) from step to step"
            )
        self.arrays[name] = ArraySpec(name, tuple(found.shape), dtype, kind)
        self.names[id(variable)] = (name, 0)
        self.versions[name] = 0

    def update(self, name: str, variable: Any, step: str) -> None:
        """The next version of an array."""
        self.versions[name] += 1
        self.names[id(variable)] = (name, self.versions[name])
        self.updated_by[name] = step

    def name(self, variable: Any, user: str) -> str:
        """The array that a variable is, now that `user` needs it.

        Raises:
            ProgramError: it is a constant, or was updated meanwhile.
        """
        found = self.names.get(id(variable))
        if found is None:
            raise ProgramError(f"{user} is a constant, which no step computes: leave it out")
        name, version = found
        if self.versions[name] != version:
            raise ProgramError(
                f"{user} needs array {name!r} as it was before step {self.updated_by[name]!r} "
                "updated it: do not donate it there, or use it before"
            )
        return name


@functools.cache
def _dtype_name(dtype: Any) -> str | None:
    plain = not jax.dtypes.issubdtype(dtype, jax.dtypes.extended) and dtype != jax.dtypes.float0
    return str(dtype) if plain else None


def add_step(tracing: Tracing, equation: jex.JaxprEqn) -> None:
    """Makes the next step of an equation.

    Raises:
        ProgramError: it is outside a jitted call, or breaks a rule of arrays.
    """
    body = body_of_step(equation, tracing.known.bodies)
    step_name = f"{len(tracing.steps)}.{body.name}"
    user = f"step {step_name!r} ({line_of(equation)})"
    constants, operands = _operands(tracing, equation, body, user)
    updated = _updates(tracing, equation, body, operands, user)
    updates = tuple(operands[operand] for operand in updated.values())
    reads = tuple(dict.fromkeys(name for name in operands.values() if name not in updates))
    made = _made(equation, body, updated)
    _pass_on(tracing, equation, body, made)
    for place, operand in updated.items():
        tracing.update(operands[operand], equation.outvars[place], step_name)
    written = [place for place in made if place not in updated]
    writes = tuple(f"{step_name}.{place}" for place in written)
    for place, name in zip(written, writes, strict=True):
        tracing.add_array(name, equation.outvars[place], "activation")
    for place, earlier in body.same.repeated.items():
        tracing.names[id(equation.outvars[place])] = tracing.names[id(equation.outvars[earlier])]
    if made:
        sources = _sources(len(equation.invars), constants, operands, (*reads, *updates))
        end = len(constants) + len(reads) + len(updates)
        wiring = Wiring(sources, (*updated, *written), tuple(range(end - len(updates), end)))
        kernel = _kernel(tracing, equation, body, wiring, tuple(constants.values()))
        work = (body.flops, body.workspace_bytes)
        tracing.steps.append(Step(step_name, kernel, reads, writes, updates, *work))


def _made(equation: jex.JaxprEqn, body: Body, updated: Mapping[int, int]) -> list[int]:
    """The results that the step makes: all but repeated ones, and operands that stay as they are.

    An operand that is updated by the same step does not stay.
    """
    passed = {
        place for place, operand in body.same.given.items() if operand not in updated.values()
    }
    results = range(len(equation.outvars))
    return [place for place in results if place not in passed and place not in body.same.repeated]


def _pass_on(tracing: Tracing, equation: jex.JaxprEqn, body: Body, made: Sequence[int]) -> None:
    """Results that are operands as they were are the same arrays or constants."""
    for place, operand in body.same.given.items():
        variable, result = equation.invars[operand], equation.outvars[place]
        if place in made:
            continue
        if isinstance(variable, jex.Literal):
            tracing.constants[id(result)] = np.asarray(variable.val, aval(variable).dtype)
        elif id(variable) in tracing.constants:
            tracing.constants[id(result)] = tracing.constants[id(variable)]
        else:
            tracing.names[id(result)] = tracing.names[id(variable)]


def _operands(
    tracing: Tracing, equation: jex.JaxprEqn, body: Body, user: str
) -> tuple[dict[int, Any], dict[int, str]]:
    """Constants and names of arrays, by their place among the operands that are read."""
    constants: dict[int, Any] = {}
    arrays: dict[int, str] = {}
    for place, variable in enumerate(equation.invars):
        if not body.read[place]:
            continue
        if isinstance(variable, jex.Literal):
            constants[place] = np.asarray(variable.val, aval(variable).dtype)
        elif id(variable) in tracing.constants:
            constants[place] = tracing.constants[id(variable)]
            check_constant(constants[place], user)
        else:
            arrays[place] = tracing.name(variable, user)
    return constants, arrays


def _updates(
    tracing: Tracing, equation: jex.JaxprEqn, body: Body, arrays: Mapping[int, str], user: str
) -> dict[int, int]:
    """Which result is the next version of which donated operand, by their places.

    A result that can only come from one operand chooses first; the rest goes by order, as in XLA.
    """
    free = [place for place in arrays if body.donated[place]]
    found: dict[int, int] = {}

    def take(result: int, wanted: Sequence[int]) -> None:
        made = aval(equation.outvars[result])
        for place in wanted:
            given = aval(equation.invars[place])
            if (given.shape, given.dtype) == (made.shape, made.dtype):
                found[result] = place
                free.remove(place)
                return

    nothing_new = {*body.same.given, *body.same.repeated}
    results = [place for place in range(len(equation.outvars)) if place not in nothing_new]
    for result in sorted(results, key=lambda result: len(body.origins[result])):
        take(result, [place for place in free if place in body.origins[result]])
    for result in results:
        if result not in found:
            take(result, list(free))
    for place in found.values():
        name, kind = arrays[place], tracing.arrays[arrays[place]].kind
        if kind in ("weight", "feature"):
            raise ProgramError(
                f"{user} updates {name!r}, a {kind}, which is only read: do not donate it, or give "
                "it another kind"
            )
        if list(arrays.values()).count(name) > 1:
            raise ProgramError(f"{user} gets array {name!r} twice and updates it: pass it once")
    return dict(sorted(found.items()))


def _sources(
    count: int,
    constants: Mapping[int, Any],
    operands: Mapping[int, str],
    arguments: Sequence[str],
) -> tuple[int | None, ...]:
    """For every operand its number among constants and arguments; None if it is not read."""
    found: list[int | None] = [None] * count
    for number, place in enumerate(constants):
        found[place] = number
    numbers = {name: number for number, name in enumerate(arguments, len(constants))}
    for place, name in operands.items():
        found[place] = numbers[name]
    return tuple(found)


def _kernel(
    tracing: Tracing,
    equation: jex.JaxprEqn,
    body: Body,
    wiring: Wiring,
    constants: tuple[Any, ...],
) -> str:
    """The name of the kernel; equal ones are made once, and those that differ in constants share
    one compiled function."""
    function_key = (body.key, wiring)
    functions = tracing.known.functions
    if function_key not in functions:
        operands = [aval(variable) for variable in equation.invars]
        functions[function_key] = jitted_call(body.name, body.evaluate, operands, wiring)
    values = tuple((str(value.dtype), np.asarray(value).tobytes()) for value in constants)
    key = (function_key, values)
    if key not in tracing.kernel_names:
        count = sum(name.partition("#")[0] == body.name for name in tracing.kernels)
        name = f"{body.name}#{count + 1}" if count else body.name
        tracing.kernel_names[key] = name
        tracing.kernels[name] = Kernel(functions[function_key], constants, len(wiring.donated))
    return tracing.kernel_names[key]
