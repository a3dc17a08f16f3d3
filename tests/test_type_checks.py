"""Annotations are checked at every call, whichever of the two checkers a function has."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax.numpy as jnp
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

import memsched
import qwen3vl_jax
from memsched.machine import Tier
from memsched.sizes import format_size
from qwen3vl_jax.rope import rotate

PACKAGES = (memsched, qwen3vl_jax)
# Nothing may be imported from these, but by the process that they are for.
PROCESSES = ("memsched.__main__", "qwen3vl_jax.processing.template_child")


def functions() -> Iterator[Callable[..., Any]]:
    """All functions at the top of modules of our packages that do not take and return anything."""
    for package in PACKAGES:
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if found.name not in PROCESSES:
                module = importlib.import_module(found.name)
                for _, function in inspect.getmembers(module, inspect.isfunction):
                    told = any(map(_tells, function.__annotations__.values()))
                    if function.__module__ == found.name and told:
                        yield function


def _tells(annotation: Any) -> bool:
    return annotation not in (Any, object) and not isinstance(annotation, TypeVar)


def test_every_function_has_a_checker() -> None:
    plain = [function for function in functions() if "__wrapped__" not in vars(function)]
    assert [f"{function.__module__}.{function.__qualname__}" for function in plain] == []


def test_a_function_without_arrays_is_checked() -> None:
    with pytest.raises(BeartypeCallHintViolation, match="nbytes"):
        format_size("1")  # type: ignore[arg-type]


def test_a_dataclass_without_arrays_is_checked() -> None:
    with pytest.raises(BeartypeCallHintViolation, match="capacity_bytes"):
        Tier("device", "1", 1, 1)  # type: ignore[arg-type]


def test_sizes_of_axes_must_agree() -> None:
    with pytest.raises(TypeCheckError, match="head_dim=8"):
        rotate(jnp.zeros((4, 8)), jnp.zeros((4, 8)), jnp.zeros((4, 6)))
