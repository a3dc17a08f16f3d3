"""What a step computes and what it allocates beside its arguments and results, from its jaxpr.

XLA:CPU takes one block of memory for all temporaries of a program. What needs a place in it follows
from three rules, read off its output for the steps that matter and tested against measured peaks:

* A product, a loop, a reduction and a call of foreign code find their operands in memory and write
  their results there. Everything else is fused into what reads it.
* What several of these read is written too, if it is costly or one of them is a reduction.
* Memory is used again after its last reader.
"""

import dataclasses
import math
import re

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
    rows,
)

REPEATS = re.compile(r"repeats=(\d+(?:\.\d+)?)")
# Beside the bytes of temporaries: gaps between them, and operands that products pack.
MARGIN_SHARE, MARGIN_BYTES = 8, 12 << 20


def flops(jaxpr: jex.Jaxpr) -> int:
    """Multiplications and additions of all products and convolutions.

    Of branches the largest counts. A loop of unknown length counts as often as its author expects
    it to run, who says so by `with jax.named_scope("repeats=2.5"):` around it, or else once.
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
            return round(_repeats(equation) * flops(params["body_jaxpr"].jaxpr))
        case "cond":
            return max(flops(branch.jaxpr) for branch in params["branches"])
    return 0


def _repeats(equation: jex.JaxprEqn) -> float:
    """What the innermost scope that is named so says of a loop."""
    found = REPEATS.findall(str(equation.source_info.name_stack))
    return float(found[-1]) if found else 1.0


def workspace_bytes(jaxpr: jex.Jaxpr, *, platform: str | None = None) -> int:
    """Bytes allocated while the program runs, beyond its arguments and results.

    An upper bound for XLA:CPU: the measured peak is at most 15 % + 16 MB lower.

    Args:
        platform: whose branch of `jax.lax.platform_dependent` counts; by default the one here.
    """
    found = _peak(jaxpr, platform or jax.default_backend(), of_loop=False)
    peak = found.block_bytes + found.hidden_bytes
    return peak + min(peak // MARGIN_SHARE, MARGIN_BYTES)


@dataclasses.dataclass(frozen=True, slots=True)
class _Peak:
    """The block of all temporaries, and what products take beside it.

    They add up whenever they occur: the block is given back at the end only.
    """

    block_bytes: int
    hidden_bytes: int = 0


def _peak(jaxpr: jex.Jaxpr, platform: str, *, of_loop: bool) -> _Peak:
    """The most bytes of temporaries at one time.

    The body of a loop keeps its results here too, but for those written into what it was given.
    """
    found = graph(jaxpr)
    values = materialised(found)
    free = set(range(found.inputs)) | (set() if of_loop else set(found.outputs))
    births = _births(found, values)
    live: dict[int, int] = {}
    block, hidden = 0, values.hidden_bytes(wide=of_loop)
    for position, operation in enumerate(found.operations):
        for target, result in _in_place(operation):
            if of_loop and target in free and operation.name in WRITES_INTO:
                free.add(result)
            if values.last.get(target) == position:
                live.pop(target, None)
        for value in births.get(position, ()):
            if value not in free:
                live[value] = values.written[value]
        inside = _inside(operation, found, values, platform)
        block = max(block, sum(live.values()) + inside.block_bytes)
        hidden = max(hidden, inside.hidden_bytes)
        for value in [value for value in live if values.last[value] <= position]:
            del live[value]
    return _Peak(block, hidden)


def _in_place(operation: Operation) -> list[tuple[int, int]]:
    """Operands, and the results that take over their memory if nobody else reads them."""
    params, operands = operation.equation.params, operation.operands
    first = 0
    match operation.name:
        case "scan":
            first, count = params["num_consts"], params["num_carry"]
        case "while":
            first, count = params["cond_nconsts"] + params["body_nconsts"], len(operation.results)
        case name:
            count = int(name in WRITES_INTO)
    return list(zip(operands[first : first + count], operation.results[:count], strict=True))


def _births(found: Graph, values: Materialised) -> dict[int, list[int]]:
    """The values that appear at each operation.

    What a loop fills is there as early as what it walks through: XLA clears both in one go.
    """
    made: dict[int, int] = {}
    births: dict[int, list[int]] = {}
    for position, operation in enumerate(found.operations):
        carried = len(_in_place(operation))
        read = [made[operand] for operand in operation.operands if operand in made]
        for number, value in enumerate(operation.results):
            if value in values.written:
                early = operation.name == "scan" and number >= carried and read
                made[value] = position
                births.setdefault(max(read) if early else position, []).append(value)
    return births


def _inside(operation: Operation, found: Graph, values: Materialised, platform: str) -> _Peak:
    """Bytes that an operation takes while it works."""
    params = operation.equation.params
    match operation.name:
        case "scan":
            return _peak(params["jaxpr"].jaxpr, platform, of_loop=True)
        case "while":
            return _peak(params["body_jaxpr"].jaxpr, platform, of_loop=True)
        case "cond":
            chosen = _branches(operation.equation, platform)
            peaks = [_peak(branch.jaxpr, platform, of_loop=False) for branch in chosen]
            return _Peak(
                max(peak.block_bytes for peak in peaks), max(peak.hidden_bytes for peak in peaks)
            )
        case "dot_general":
            return _Peak(_widened(operation, found, values))
        case name if name in MOVES:
            return _Peak(_copied(operation, values))
    return _Peak(0)


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
        if narrow(given.dtype) and (always or rows(equation, 1 - side) == 1):
            bytes_wide = WIDE_BYTES * given.size
            copied += 0 if values.written.get(value) == bytes_wide else bytes_wide
    return int(copied)


def _copied(operation: Operation, values: Materialised) -> int:
    """A moved value that a loop reads as float32 is made in one order and copied to another."""
    (value,) = operation.results
    made = aval(operation.equation.outvars[0])
    bytes_wide = WIDE_BYTES * int(made.size)
    return bytes_wide if narrow(made.dtype) and values.written.get(value) == bytes_wide else 0
