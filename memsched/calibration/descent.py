"""Fits parameters by gradient descent, the same way every time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

STEPS = 1500
RATE = 0.05
# Errors below this count by their square: nobody measures better.
SMOOTH = 0.01


def descend(loss: Callable[[Any], jax.Array], start: Any) -> Any:
    """The parameters that `loss` is least for, from a start, as numpy arrays."""
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

    def step(state: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        parameters, moments = state
        slopes = jax.grad(loss)(parameters)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to whole powers
            updates, moments = optimizer.update(slopes, moments, parameters)
        return (optax.apply_updates(parameters, updates), moments), None

    (found, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, length=STEPS)
    return found


def pinball(error: jax.Array, quantile: float) -> jax.Array:
    """What a quantile is least for; `error` is measured minus predicted. Rounded off at 0."""
    size = jnp.sqrt(error * error + SMOOTH * SMOOTH) - SMOOTH
    return 0.5 * size + (quantile - 0.5) * error
