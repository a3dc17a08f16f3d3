"""The import hook of the tests: every annotation of our packages is checked at every call.

jaxtyping's own hook has each function bind its arguments with `inspect`, to know how long axes are:
85 % of the time of a planner, whose functions take no arrays. So only what names arrays gets its
wrapper here; all else gets beartype's alone, which checks the same.
"""

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype

_jaxtyped = jaxtyping.jaxtyped


def install(*packages: str) -> None:
    """Before the first import of any of them."""
    # What its hook writes above each function and class.
    jaxtyping.jaxtyped = checked
    jaxtyping.install_import_hook(packages, "beartype.beartype")


def checked(*, typechecker: Any) -> Callable[[Any], Any]:
    """A decorator of functions, and of classes: of those the `__init__` of dataclasses."""

    def decorate(subject: Any) -> Any:
        if inspect.isclass(subject) and not dataclasses.is_dataclass(subject):
            return subject
        if _names_arrays(subject.__init__ if inspect.isclass(subject) else subject):
            return _jaxtyped(subject, typechecker=typechecker)
        if not inspect.isclass(subject):
            return beartype(subject)
        subject.__init__ = beartype(subject.__init__)
        return subject

    return decorate


def _names_arrays(function: Callable[..., Any]) -> bool:
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except NameError:  # of a class that is not made yet; jaxtyping takes those for Any
        return True
    return any(map(_is_array, hints.values()))


def _is_array(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray | jaxtyping.PyTree):
        return True
    return any(map(_is_array, typing.get_args(hint)))
