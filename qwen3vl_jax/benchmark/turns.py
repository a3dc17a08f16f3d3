"""Seconds of several functions that do the same work, measured in turn over many weights."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LEAST_BYTES, MOST_WEIGHTS = 96 << 20, 64  # of one kind of weight: no cache holds them

Case = tuple[Callable[..., Any], Sequence[Any]]  # a function of (x, weight), and its weights


def how_many(nbytes: int) -> int:
    """Weights of so many bytes that are needed."""
    return min(max(4, -(-LEAST_BYTES // nbytes)), MOST_WEIGHTS)


def seconds_in_turn(cases: Mapping[str, Case], x: Any, repeats: int) -> dict[str, float]:
    """Median seconds of each case, compiled, one run over all its weights after the other."""
    import jax

    steps = {name: jax.jit(f).lower(x, ws[0]).compile() for name, (f, ws) in cases.items()}
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _, (name, (_, weights)) in itertools.product(range(repeats), cases.items()):
        for weight in weights:
            start = time.perf_counter()
            steps[name](x, weight).block_until_ready()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}
