"""What a step computes and what it allocates beside its arguments and results, from its jaxpr.

XLA:CPU takes one block of memory for all temporaries of a program. What needs a place in it follows
from three rules, read off its output for the steps that matter and tested against measured peaks:

* A product, a loop, a reduction and a call of foreign code find their operands in memory and write
  their results there. Everything else is fused into what reads it.
* What several of these read is written too, if it is costly or one of them is a reduction.
* Memory is used again after its last reader.
"""

import math

import jax
import jax.extend.core as jex

from memsched.tracing.graph import Graph, Operation, aval, body_of, graph
from memsched.tracing.materialised import (
    MOVES,
    WIDE_BYTES,
    WRITES_INTO,
    Materialised,
    materialised,
    narrow,
    single_row,
)

# Beside the bytes of temporaries: gaps between them, and operands that products pack.
MARGIN_SHARE, MARGIN_BYTES = 8, 12 << 20


def flops(jaxpr: jex.Jaxpr) -> int:
    """Multiplications and additions of all products and convolutions.

    Of branches the largest counts; a loop of unknown length counts once.
    """
    return sum(_flops(equation) for equation in jaxpr.eqns)


def _flops(equation: jex.JaxprEqn) -> int:
    body = body_of(equation)
    if body is not None:
        return flops(body)
    params = equation.params
    match equation.primitive.name:
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = aval(equation.invars[0]).shape
            summed = math.prod(shape[axis] for axis in contracted)
            return int(2 * summed * aval(equation.outvars[0]).size)
        case "conv_general_dilated":
            kernel = aval(equation.invars[1]).shape
            outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
            return int(2 * aval(equation.outvars[0]).size * math.prod(kernel) // max(outputs, 1))
        case "scan":
            return int(params["length"]) * flops(params["jaxpr"].jaxpr)
        case "while":
            return flops(params["body_jaxpr"].jaxpr)
        case "cond":
            return max(flops(branch.jaxpr) for branch in params["branches"])
    return 0


def workspace_bytes(jaxpr: jex.Jaxpr, *, platform: str | None = None) -> int:
    """Bytes allocated while the program runs, beyond its arguments and results.

    An upper bound for XLA:CPU: the measured peak is at most 15 % + 16 MB lower.

    Args:
        platform: whose branch of `jax.lax.platform_dependent` counts; by default the one here.
    """
    peak = _peak(jaxpr, platform or jax.default_backend(), of_loop=False)
    return peak + min(peak // MARGIN_SHARE, MARGIN_BYTES)


def _peak(jaxpr: jex.Jaxpr, platform: str, *, of_loop: bool) -> int:
    """The most bytes of temporaries at one time.

    The body of a loop keeps its results here too, but for those written into what it was given.
    """
    found = graph(jaxpr)
    values = materialised(found)
    free = set(range(found.inputs)) | (set() if of_loop else set(found.outputs))
    births = _births(found, values)
    live: dict[int, int] = {}
    peak = 0
    for position, operation in enumerate(found.operations):
        if operation.name in WRITES_INTO:
            target = operation.operands[0]
            if of_loop and target in free:
                free.update(operation.results)
            if values.last[target] == position:
                live.pop(target, None)
        for value in births.get(position, ()):
            if value not in free:
                live[value] = values.written[value]
        now = sum(live.values()) + _inside(operation, found, values, platform)
        peak = max(peak, now)
        for value in [value for value in live if values.last[value] <= position]:
            del live[value]
    return peak + values.hidden_bytes


def _births(found: Graph, values: Materialised) -> dict[int, list[int]]:
    """The values that appear at each operation.

    What a loop fills is there as early as what it reads: XLA clears it while it is at it.
    """
    made: dict[int, int] = {}
    births: dict[int, list[int]] = {}
    for position, operation in enumerate(found.operations):
        for value in operation.results:
            if value in values.written:
                read = [made[operand] for operand in operation.operands if operand in made]
                early = operation.name == "scan" and bool(read)
                made[value] = position
                births.setdefault(max(read) if early else position, []).append(value)
    return births


def _inside(operation: Operation, found: Graph, values: Materialised, platform: str) -> int:
    """Bytes that an operation takes while it works."""
    params = operation.equation.params
    match operation.name:
        case "scan":
            return _peak(params["jaxpr"].jaxpr, platform, of_loop=True)
        case "while":
            return _peak(params["body_jaxpr"].jaxpr, platform, of_loop=True)
        case "cond":
            chosen = _branches(operation.equation, platform)
            return max(_peak(branch.jaxpr, platform, of_loop=False) for branch in chosen)
        case "dot_general":
            return _widened(operation, found, values)
        case name if name in MOVES:
            return _copied(operation, values)
    return 0


def _branches(equation: jex.JaxprEqn, platform: str) -> tuple[jex.ClosedJaxpr, ...]:
    """The branches that may be taken: one if the platform decides."""
    branches, platforms = equation.params["branches"], equation.params.get("branches_platforms")
    if platforms is None:
        return tuple(branches)
    for branch, names in zip(branches, platforms, strict=True):
        if names is None or platform in names:
            return (branch,)
    return tuple(branches)


def _widened(operation: Operation, found: Graph, values: Materialised) -> int:
    """The float32 copies of a 16-bit product's operands that XLA:CPU makes, if it does.

    It does for a single row, for float16, and for results of 16 bits.
    """
    equation = operation.equation
    result = aval(equation.outvars[0])
    copied = WIDE_BYTES * result.size if narrow(result.dtype) else 0
    for side, value in enumerate(operation.operands):
        given = found.avals[value]
        always = narrow(result.dtype) or given.dtype == "float16"
        if narrow(given.dtype) and (always or single_row(equation, 1 - side)):
            bytes_wide = WIDE_BYTES * given.size
            copied += 0 if values.written.get(value) == bytes_wide else bytes_wide
    return int(copied)


def _copied(operation: Operation, values: Materialised) -> int:
    """A moved value that a loop reads as float32 is made in one order and copied to another."""
    (value,) = operation.results
    made = aval(operation.equation.outvars[0])
    bytes_wide = WIDE_BYTES * int(made.size)
    return bytes_wide if narrow(made.dtype) and values.written.get(value) == bytes_wide else 0
