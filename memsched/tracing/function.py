"""From a JAX function to a `Program`: every jitted call inside it is one step.

The seam between a model and the planner is JAX itself: a model marks its steps with `jax.jit` and
its in-place arrays with `donate_argnums`. Nothing is run, and no memory is taken for arrays.

Autodiff of a function made of steps puts small equations between them: sums of cotangents, fills
and conversions. These (`GLUE`) become steps of their own; everything else must be in a step.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex

from memsched.errors import ProgramError
from memsched.program import Program
from memsched.tracing.array_names import array_names, kinds_of, path_name
from memsched.tracing.kernel import Kernel
from memsched.tracing.source_lines import line_of_error
from memsched.tracing.steps import Known, Tracing, add_step

NEEDS_A_VALUE = (
    jax.errors.ConcretizationTypeError,  # of `if`, `while`, `bool()`, `int()`
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)

Kernels = Mapping[str, Kernel]


def trace(
    fn: Callable[..., Any],
    *shapes: Any,
    names: Sequence[str] | None = None,
    kinds: Sequence[str | Mapping[str, str]] | None = None,
    known: Known | None = None,
) -> tuple[Program, Kernels]:
    """The steps of `fn`, and the kernels that compute them.

    Outputs are in the order of the results of `fn`. Given arrays that no step reads are left out.

    Args:
        fn: a function whose every computation is inside a `jax.jit` call. `jax.value_and_grad` of
            such a function is one too.
        shapes: its arguments: pytrees of arrays or `jax.ShapeDtypeStruct`.
        names: for every argument the root of its arrays' names, "" for none; by default its name
            in the signature. The rest of a name is the path in the pytree: "params.layers.0.bias".
        kinds: for every argument the kind of its arrays, or a kind for each prefix of their names,
            of which the longest counts. "input" by default.
        known: what earlier calls with it have found; steps that they had need not be compiled anew.

    Raises:
        ProgramError: something is computed outside a jitted call, needs the value of an array, or
            is closed over; an array is used after it was donated, or comes back at another place
            than it was given. The message names the array and the line.
    """
    roots = _parameter_names(fn, len(shapes)) if names is None else tuple(names)
    given = array_names(shapes, roots)
    chosen = ("input",) * len(shapes) if kinds is None else tuple(kinds)
    kind_of = kinds_of(given.names, given.owners, chosen)
    closed, results = _jaxpr(fn, given.leaves, given.tree)
    tracing = Tracing.begin(closed, given.names, kind_of, known or Known())
    for equation in closed.jaxpr.eqns:
        add_step(tracing, equation)
    places = dict(zip(given.names, given.places, strict=True))
    outputs = _outputs(tracing, closed.jaxpr.outvars, results, places)
    used = {name for step in tracing.steps for name in (*step.inputs, *step.writes)}
    arrays = {name: array for name, array in tracing.arrays.items() if name in used}
    return Program(arrays, tuple(tracing.steps), outputs), tracing.kernels


def _parameter_names(fn: Callable[..., Any], count: int) -> tuple[str, ...]:
    """One name per argument, from the signature where it says."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # some callables of other libraries have none
        parameters = []
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = [parameter.name for parameter in parameters if parameter.kind in named]
    return tuple((known + [f"argument{index}" for index in range(len(known), count)])[:count])


def _jaxpr(
    fn: Callable[..., Any], leaves: Sequence[Any], tree: Any
) -> tuple[jex.ClosedJaxpr, list[tuple[Any, ...]]]:
    """The jaxpr of `fn`, and the path of each of its results."""

    paths: list[tuple[Any, ...]] = []

    def flat(*values: Any) -> list[Any]:
        # Results are taken apart here: dataclasses that check their fields hold tracers only.
        found, _ = jax.tree_util.tree_flatten_with_path(fn(*jax.tree.unflatten(tree, values)))
        paths[:] = [path for path, _ in found]
        return [value for _, value in found]

    try:
        closed = jax.make_jaxpr(flat)(*leaves)
    except NEEDS_A_VALUE as error:
        raise ProgramError(
            f"{line_of_error(error)} needs the value of an array ({type(error).__name__}), which "
            "does not exist before a run: compute it inside a jitted call, or pass it as a plain "
            "Python value"
        ) from error
    return closed, paths


def _outputs(
    tracing: Tracing,
    variables: Sequence[Any],
    paths: Sequence[tuple[Any, ...]],
    places: Mapping[str, str],
) -> tuple[str, ...]:
    """Names of the results. `places` says where in its argument every given array is.

    Raises:
        ProgramError: a result that no step made, or made for another place.
    """
    found: dict[str, str] = {}
    for variable, path in zip(variables, paths, strict=True):
        place = path_name(path)
        result = f"result {place!r}" if place else "the result"
        name = tracing.name(variable, result)
        if name in found:
            raise ProgramError(
                f"{result} is array {name!r}, as is result {found[name]!r}: return it once"
            )
        if name in places and name not in tracing.updated_by:
            raise ProgramError(f"{result} is array {name!r} as it was given: do not return it")
        if name in places and not f".{place}".endswith(f".{places[name]}" if places[name] else ""):
            raise ProgramError(
                f"{result} is array {name!r}, updated in place: it must come back where it was "
                f"given, as '....{places[name]}', or its next user takes it for another"
            )
        found[name] = place
    _check_carried(tracing, found, places)
    return tuple(found)


def _check_carried(tracing: Tracing, found: Mapping[str, str], places: Mapping[str, str]) -> None:
    """Carried arrays that look alike come back in the order in which they were given.

    Raises:
        ProgramError: two have changed places, or an updated cache is not returned.
    """
    last: dict[tuple[Any, ...], str] = {}
    index = {name: number for number, name in enumerate(places)}
    for name in found:
        if name not in places:
            continue
        array = tracing.arrays[name]
        alike = (array.shape, array.dtype, places[name])
        before = last.setdefault(alike, name)
        if index[before] > index[name]:
            raise ProgramError(
                f"result {found[name]!r} is array {name!r} and result {found[before]!r} is array "
                f"{before!r}, both updated in place: they must come back in the order in which "
                "they were given, or their next user takes one for the other"
            )
        last[alike] = name
    for name, step in tracing.updated_by.items():
        if tracing.arrays[name].kind == "cache" and name not in found:
            raise ProgramError(
                f"cache {name!r} is updated by step {step!r} but not returned: return it"
            )
