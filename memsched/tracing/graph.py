"""A jaxpr as a flat list of operations. Calls are looked through; a view is the array itself."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


CALLS = {
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "jit": "jaxpr",
    "remat2": "jaxpr",
}
# The same bytes in the same order.
VIEWS = words("expand_dims optimization_barrier reshape squeeze stop_gradient")


CONSTANT = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """An equation between values, which are numbered; the number of a constant is CONSTANT."""

    name: str
    operands: tuple[int, ...]
    results: tuple[int, ...]
    equation: jex.JaxprEqn


@dataclasses.dataclass(frozen=True, slots=True)
class Graph:
    """All operations in order. `avals` has shape and dtype of every value.

    The first values are the inputs.
    """

    operations: tuple[Operation, ...]
    avals: tuple[Any, ...]
    inputs: int
    outputs: tuple[int, ...]


def graph(jaxpr: jex.Jaxpr) -> Graph:
    """The operations of a jaxpr."""
    avals: list[Any] = []
    found: list[Operation] = []
    given = [_new(avals, var) for var in (*jaxpr.constvars, *jaxpr.invars)]
    outputs = _walk(jaxpr, given, avals, found)
    return Graph(tuple(found), tuple(avals), len(given), tuple(outputs))


def body_of(equation: jex.JaxprEqn) -> jex.Jaxpr | None:
    """The jaxpr that an equation calls with its own operands, if it does nothing else."""
    if equation.primitive.name not in CALLS:
        return None
    body: Any = equation.params[CALLS[equation.primitive.name]]
    found: jex.Jaxpr = body.jaxpr if isinstance(body, jex.ClosedJaxpr) else body
    return found


def aval(variable: Any) -> Any:
    """Shape and dtype of a variable or literal."""
    return variable.aval


def _new(avals: list[Any], var: Any) -> int:
    avals.append(aval(var))
    return len(avals) - 1


def _walk(
    jaxpr: jex.Jaxpr, given: Sequence[int], avals: list[Any], found: list[Operation]
) -> list[int]:
    inner = (*jaxpr.constvars, *jaxpr.invars)
    # A closed jaxpr's own constants come first; they are no operands of the call.
    padded = (*(CONSTANT for _ in range(len(inner) - len(given))), *given)
    values = dict(zip(map(id, inner), padded, strict=True))
    for equation in jaxpr.eqns:
        operands = [values.get(id(var), CONSTANT) for var in equation.invars]
        body = body_of(equation)
        if body is not None:
            results = _walk(body, operands, avals, found)
        elif _is_view(equation):
            results = [operands[0]]
        else:
            results = [_new(avals, var) for var in equation.outvars]
            name = equation.primitive.name
            found.append(Operation(name, tuple(operands), tuple(results), equation))
        values.update(zip(map(id, equation.outvars), results, strict=True))
    return [values.get(id(var), CONSTANT) for var in jaxpr.outvars]


def _is_view(equation: jex.JaxprEqn) -> bool:
    name = equation.primitive.name
    if name in VIEWS:
        return len(equation.outvars) == 1
    if not equation.invars or not equation.outvars:
        return False
    operand, result = aval(equation.invars[0]), aval(equation.outvars[0])
    match name:
        case "broadcast_in_dim" | "slice":
            return bool(operand.size == result.size)
        case "convert_element_type" | "reduce_precision":
            return bool(operand.dtype == result.dtype)
        case "transpose":
            kept = [axis for axis in equation.params["permutation"] if operand.shape[axis] > 1]
            return kept == sorted(kept)
        case "pad":
            return bool(operand.shape == result.shape)
    return False
