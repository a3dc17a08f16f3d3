"""A kernel: the compiled form of a step, with its order of arguments and its donations."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

Evaluate = Callable[..., Sequence[jax.Array]]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """Takes the arrays of a step's `reads`, then `updates`; returns `writes`, then `updates`.

    Updated arrays are donated. `function` is jitted, takes the constants first and returns the
    updated arrays first: XLA gives donated memory to the first result that fits. A kernel equals
    only itself: constants cannot be hashed.
    """

    function: Any
    constants: tuple[Any, ...]
    update_count: int

    def __call__(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """Computes the step. Asynchronous, as everything in JAX."""
        results = self.function(*self.constants, *arrays)
        return (*results[self.update_count :], *results[: self.update_count])

    def lower(self, *arrays: Any) -> Any:
        """As `jax.jit(...).lower`, for arrays or shapes of the step's inputs."""
        return self.function.lower(*self.constants, *arrays)


@dataclasses.dataclass(frozen=True, slots=True)
class Wiring:
    """How the operands of a call are found among the arguments of a kernel.

    Attributes:
        sources: for every operand the index among constants, reads and updates, in this order;
            None for one that is never looked at.
        order: which results of the call are the updated arrays, then which are the others.
        donated: indices of the arguments that are given up.
    """

    sources: tuple[int | None, ...]
    order: tuple[int, ...]
    donated: tuple[int, ...]


def jitted_call(name: str, evaluate: Evaluate, operands: Sequence[Any], wiring: Wiring) -> Any:
    """`evaluate` as a jitted function that is wired as said. `operands` have shape and dtype."""

    def call(*arguments: jax.Array) -> tuple[jax.Array, ...]:
        values = [
            jax.numpy.zeros(operand.shape, operand.dtype) if source is None else arguments[source]
            for operand, source in zip(operands, wiring.sources, strict=True)
        ]
        results = evaluate(*values)
        return tuple(results[index] for index in wiring.order)

    call.__name__ = call.__qualname__ = name
    return jax.jit(call, donate_argnums=wiring.donated)
