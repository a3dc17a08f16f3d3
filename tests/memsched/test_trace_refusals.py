"""What `trace` refuses, by the name of the array and the line of the user's code."""

import inspect
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memsched.errors import ProgramError
from memsched.tracing.function import trace

S = jax.ShapeDtypeStruct
ROWS = S((2, 4), jnp.float32)


def line_with(marker: str) -> str:
    """This file and the number of its line that ends in a comment."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [n for n, line in enumerate(lines, 1) if line.endswith(f"# {marker}")]
    return rf"{re.escape(__file__)}:{number}\b"


def outside(x: jax.Array) -> jax.Array:
    x = scaled(x)
    x = x + 1.0  # outside
    return scaled(x)


def spreading(x: jax.Array) -> jax.Array:
    return scaled(jnp.broadcast_to(x[None], (3, 2, 4)))  # spreading


def checkpointed(x: jax.Array) -> jax.Array:
    return jax.checkpoint(scaled)(x)  # checkpointed


def branching(x: jax.Array) -> jax.Array:
    if scaled(x).sum() > 0:  # branching
        return x
    return scaled(x)


def counting(x: jax.Array) -> jax.Array:
    return scaled(x[: int(x[0, 0])])  # counting


def converting(x: jax.Array) -> jax.Array:
    return scaled(np.sin(x))  # converting


def late(x: jax.Array) -> jax.Array:
    y = consume(x)
    return join(y, x)  # late


def late_result(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return consume(x), x


def exchanged(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    return consume(y), consume(x)


def exchanged_inside(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    return exchange(x, y)


def reordered(cache: list[jax.Array]) -> list[jax.Array]:
    return [consume(cache[1]), consume(cache[0])]


def unchanged(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    return scaled(x), y


def repeated(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = scaled(x)
    return y, y


def constant(x: jax.Array) -> tuple[jax.Array, float]:
    return scaled(x), 1.0


def closing(x: jax.Array) -> jax.Array:
    return large(x)  # closing


def twice(x: jax.Array) -> jax.Array:
    return join(x, x)


def random_keys(x: jax.Array) -> jax.Array:
    return draw(make_key(), x)


scaled = jax.jit(lambda x: 2 * x)
consume = jax.jit(lambda x: 2 * x, donate_argnums=0)
join = jax.jit(lambda x, y: x + y, donate_argnums=0)
exchange = jax.jit(lambda x, y: (y + 1, x + 1), donate_argnums=(0, 1))
LARGE = np.ones((512, 512), np.float32)
large = jax.jit(lambda x: x + (LARGE * x.sum()).sum())
make_key = jax.jit(lambda: jax.random.key(0))
draw = jax.jit(lambda key, x: x + jax.random.normal(key, (1, 4), jnp.float32))


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (outside, rf"{line_with('outside')}: 'add' is computed outside a jitted call"),
        (spreading, rf"{line_with('spreading')}: 'broadcast_in_dim' is computed outside"),
        (checkpointed, rf"{line_with('checkpointed')}: '(remat2|checkpoint)' is computed"),
        (branching, rf"{line_with('branching')} needs the value of an array"),
        (counting, rf"{line_with('counting')} needs the value of an array"),
        (converting, rf"{line_with('converting')} needs the value of an array"),
        (
            late,
            rf"step '1.lambda' \({line_with('late')}\) needs array 'x' as it was before step '0",
        ),
        (late_result, r"result '1' needs array 'x' as it was before step '0.lambda' updated it"),
        (
            exchanged,
            r"result '0' is array 'y'.*result '1' is|result '1' is array 'x' and result '0'",
        ),
        (exchanged_inside, r"result '1' is array 'x' and result '0' is array 'y'.*in the order"),
        (unchanged, r"result '1' is array 'y' as it was given"),
        (repeated, r"result '1' is array '0.lambda.0', as is result '0'"),
        (constant, r"result '1' is a constant"),
        (
            closing,
            rf"\({line_with('closing')}\) closes over an array float32\[512, 512\] of 1,048,576",
        ),
        (twice, r"gets array 'x' twice and updates it"),
        (random_keys, r"array '0.lambda.0' has dtype key<fry>"),
    ],
    ids=lambda value: value.__name__ if inspect.isfunction(value) else "",
)
def test_what_cannot_be_planned_is_refused(fn: Any, says: str) -> None:
    arguments = [ROWS] * len(inspect.signature(fn).parameters)
    with pytest.raises(ProgramError, match=says):
        trace(fn, *arguments)


def test_caches_that_changed_places_are_refused() -> None:
    with pytest.raises(ProgramError, match=r"result '0' is array 'cache.1'.*must come back where"):
        trace(reordered, [ROWS, ROWS], kinds=("cache",))
    with pytest.raises(ProgramError, match=r"cache 'x' is updated by step '0.*return it"):
        trace(lambda x: scaled(consume(x)), ROWS, kinds=("cache",))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kinds": ("weight",)}, r"updates 'x', a weight, which is only read"),
        ({"kinds": ("wait",)}, r"array 'x': kind 'wait' is not one of weight, cache"),
        ({"kinds": ({"y": "input"},)}, r"array 'x': no prefix of it has a kind"),
        ({"kinds": ({"": "input", "y": "input"},)}, r"no array is named 'y' or below it"),
        ({"names": ()}, r"names: 0 given for 1 arguments"),
        ({"names": ("",)}, r"1 have the name ''"),
    ],
)
def test_names_and_kinds_that_do_not_fit_are_refused(options: Any, says: str) -> None:
    with pytest.raises(ProgramError, match=says):
        trace(consume, ROWS, **options)


def test_two_arrays_of_one_name_are_refused() -> None:
    with pytest.raises(ProgramError, match=r"2 have the name 'a.b'"):
        trace(
            lambda x, y: join(x["b"], y["a"]["b"]), {"b": ROWS}, {"a": {"b": ROWS}}, names=("a", "")
        )
