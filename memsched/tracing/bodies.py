"""What an equation computes: the body of a jitted call, or a primitive that autodiff put there."""

import dataclasses
import re
from collections.abc import Hashable, Iterator
from typing import Any

import jax
import jax.extend.core as jex

from memsched.errors import ProgramError
from memsched.tracing.dataflow import Same, origins, read_inputs, same_results
from memsched.tracing.graph import aval
from memsched.tracing.kernel import Evaluate
from memsched.tracing.source_lines import line_of
from memsched.tracing.workspace import flops, workspace_bytes

# Autodiff puts these between jitted calls; `broadcast_in_dim` only to fill an array with a number.
GLUE = frozenset({"add_any", "broadcast_in_dim", "convert_element_type", "copy"})
LARGEST_CONSTANT_BYTES = 1_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class Body:
    """What equations of one kernel have in common. `key` is equal for equal bodies.

    Of each operand: whether it is `read` at all and `donated`; of each result, `origins` are the
    operands whose next version it may be. Results that are the `same` as something are not made.
    """

    key: Hashable
    name: str
    evaluate: Evaluate
    read: tuple[bool, ...]
    donated: tuple[bool, ...]
    origins: tuple[frozenset[int], ...]
    same: Same = dataclasses.field(default_factory=lambda: Same({}, {}))
    flops: int = 0
    workspace_bytes: int = 0


def body_of_step(equation: jex.JaxprEqn, known: dict[Hashable, Body]) -> Body:
    """The body of an equation, looked up by what it computes among those `known`.

    Raises:
        ProgramError: it is no jitted call, or closes over too much.
    """
    if equation.primitive.name != "jit":
        return _glue(equation)
    closed, donated = equation.params["jaxpr"], tuple(equation.params["donated_invars"])
    key = (id(closed.jaxpr), tuple(map(id, closed.consts)), donated, equation.params["name"])
    if key not in known:
        name = re.sub(r"\W+", "_", equation.params["name"]).strip("_") or "step"
        for value in _closed_over(closed):
            check_constant(value, f"step {name!r} ({line_of(equation)})")
        same = same_results(closed.jaxpr)
        known[key] = Body(
            key,
            name,
            jex.jaxpr_as_fun(closed),
            read_inputs(closed.jaxpr, _made(closed.jaxpr, same)),
            donated,
            tuple(origins(closed.jaxpr)),
            same,
            flops(closed.jaxpr),
            workspace_bytes(closed.jaxpr),
        )
    return known[key]


def _made(jaxpr: jex.Jaxpr, same: Same) -> list[int]:
    """The results that are not just an input."""
    return [index for index in range(len(jaxpr.outvars)) if index not in same.given]


def _glue(equation: jex.JaxprEqn) -> Body:
    params = equation.params
    primitive: Any = equation.primitive
    operands = [aval(variable) for variable in equation.invars]
    fills = all(operand.size == 1 for operand in operands)
    if primitive.name not in GLUE or (primitive.name == "broadcast_in_dim" and not fills):
        raise ProgramError(
            f"{line_of(equation)}: {primitive.name!r} is computed outside a jitted call: move it "
            "into one, or into a function of its own with jax.jit around it"
        )

    def evaluate(*values: jax.Array) -> list[jax.Array]:
        return [primitive.bind(*values, **params)]

    shapes = tuple((operand.shape, str(operand.dtype)) for operand in operands)
    return Body(
        (primitive.name, shapes, str(sorted(params.items()))),
        primitive.name,
        evaluate,
        (True,) * len(operands),
        (False,) * len(operands),
        (frozenset(),),
    )


def _closed_over(closed: jex.ClosedJaxpr) -> Iterator[Any]:
    """Constants of a jaxpr and of all those inside it."""
    yield from closed.consts
    for equation in closed.jaxpr.eqns:
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(part, jex.ClosedJaxpr):
                    yield from _closed_over(part)


def check_constant(value: Any, user: str) -> None:
    """Raises:
    ProgramError: an array that is closed over is too large to be hidden in a kernel.
    """
    if value.nbytes > LARGEST_CONSTANT_BYTES:
        raise ProgramError(
            f"{user} closes over an array {value.dtype}{list(value.shape)} of {value.nbytes:,} B, "
            f"more than {LARGEST_CONSTANT_BYTES:,} B: pass it as an argument, so that it can be "
            "planned"
        )
