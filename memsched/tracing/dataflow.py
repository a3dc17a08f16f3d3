"""What flows where inside a jaxpr: which inputs are read, and which become which output."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.extend.core as jex

from memsched.tracing.graph import aval, body_of, words

# Their result is their operand of the same shape, changed here and there or everywhere.
IN_PLACE = words(
    "add add_any and convert_element_type copy div dynamic_update_slice exp integer_pow log "
    "logistic max min mul ne neg not optimization_barrier or pow rem rsqrt scatter scatter-add "
    "scatter_add scatter_mul scatter_sub scatter_min scatter_max select_n sign sqrt square sub "
    "tanh xor"
)


def read_inputs(jaxpr: jex.Jaxpr, results: Sequence[int] | None = None) -> tuple[bool, ...]:
    """For every input, whether a computation looks at it, or it is one of the chosen results."""
    chosen = range(len(jaxpr.outvars)) if results is None else results
    read = {id(jaxpr.outvars[index]) for index in chosen}
    for equation in jaxpr.eqns:
        body = body_of(equation)
        flags = [True] * len(equation.invars) if body is None else read_inputs(body)
        read |= {id(var) for var, flag in zip(equation.invars, flags, strict=True) if flag}
    return tuple(id(var) in read for var in jaxpr.invars)


@dataclasses.dataclass(frozen=True, slots=True)
class Same:
    """Results that are nothing new: an input (`given`) or an earlier result (`repeated`)."""

    given: Mapping[int, int]
    repeated: Mapping[int, int]


def same_results(jaxpr: jex.Jaxpr) -> Same:
    """Which results are an input, or another result, as they are."""
    inputs = {id(var): index for index, var in enumerate(jaxpr.invars)}
    origin = _origins_unchanged(jaxpr)
    given: dict[int, int] = {}
    repeated: dict[int, int] = {}
    first: dict[int, int] = {}
    for index, var in enumerate(jaxpr.outvars):
        if isinstance(var, jex.Literal):
            continue
        source = origin.get(id(var), id(var))
        if source in inputs:
            given[index] = inputs[source]
        elif first.setdefault(source, index) != index:
            repeated[index] = first[source]
    return Same(given, repeated)


def _origins_unchanged(jaxpr: jex.Jaxpr) -> dict[int, int]:
    """For every result of a call that is an operand or an earlier result of it: which one."""
    origin: dict[int, int] = {}
    for equation in jaxpr.eqns:
        body = body_of(equation)
        if body is None:
            continue
        same = same_results(body)
        for index, operand in same.given.items():
            var = equation.invars[operand]
            if not isinstance(var, jex.Literal):
                origin[id(equation.outvars[index])] = origin.get(id(var), id(var))
        for index, earlier in same.repeated.items():
            origin[id(equation.outvars[index])] = id(equation.outvars[earlier])
    return origin


def origins(jaxpr: jex.Jaxpr) -> list[frozenset[int]]:
    """For every output the inputs that it may be the next version of.

    These are reached through equations whose result has the shape of an operand and is made of it
    value by value, or by writing a part of it.
    """
    start = [frozenset({index}) for index in range(len(jaxpr.invars))]
    return _follow(jaxpr, start)


def _follow(jaxpr: jex.Jaxpr, inputs: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    nothing: frozenset[int] = frozenset()
    found = dict(zip(map(id, jaxpr.invars), inputs, strict=True))
    for equation in jaxpr.eqns:
        operands = [found.get(id(var), nothing) for var in equation.invars]
        if not any(operands):
            continue
        body = body_of(equation)
        if body is not None:
            results = _follow(body, operands)
            found.update(zip(map(id, equation.outvars), results, strict=True))
        elif equation.primitive.name in IN_PLACE:
            shape = aval(equation.outvars[0]).shape
            same = [
                origin
                for var, origin in zip(equation.invars, operands, strict=True)
                if aval(var).shape == shape
            ]
            found[id(equation.outvars[0])] = nothing.union(*same)
    return [found.get(id(var), nothing) for var in jaxpr.outvars]
