"""Neighbouring Runs as one XLA program.

A dispatch costs some ten microseconds, whatever the step does. Between two steps stands a barrier:
without one XLA merges arithmetic across them and rounds less often than the steps themselves do.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax

from memsched.machine import DEVICE
from memsched.runtime.operations import FreeOp, Op, RunOp

Kernel = Callable[..., tuple[jax.Array, ...]]


def fused(ops: tuple[Op, ...]) -> tuple[Op, ...]:
    """Each row of Runs as one. Frees of what was made in the row disappear into it."""
    merged: list[Op] = []
    row: list[RunOp | FreeOp] = []
    for op in ops:
        if isinstance(op, RunOp) or (isinstance(op, FreeOp) and _is_inner(op, row)):
            row.append(op)
            continue
        merged += [*_closed(row), op]
        row = []
    return tuple(merged + _closed(row))


def _is_inner(op: FreeOp, row: list[RunOp | FreeOp]) -> bool:
    """Whether it frees what a Run of this row wrote."""
    if op.action.tier != DEVICE:
        return False
    made: set[str] = set()
    for earlier in row:
        if isinstance(earlier, RunOp):
            made |= set(earlier.results) - set(earlier.updates)
        else:
            made.discard(earlier.action.array)
    return op.action.array in made


def _closed(row: list[RunOp | FreeOp]) -> list[Op]:
    runs = [op for op in row if isinstance(op, RunOp)]
    return list(row) if len(runs) < 2 else [_merged(row, runs)]


def _merged(row: list[RunOp | FreeOp], runs: list[RunOp]) -> RunOp:
    inputs: dict[str, None] = {}
    made: dict[str, None] = {}
    updates: dict[str, None] = {}
    used = most = 0
    for op in row:
        if isinstance(op, FreeOp):
            used -= op.freed_bytes
            made.pop(op.action.array)
            continue
        inputs |= dict.fromkeys(name for name in op.inputs if name not in made)
        updates |= dict.fromkeys(name for name in op.updates if name not in made)
        made |= dict.fromkeys(name for name in op.results if name not in updates)
        used += op.made_bytes
        most = max(most, used + op.passing_bytes)
    return dataclasses.replace(
        runs[0],
        calls=tuple(call for op in runs for call in op.calls),
        inputs=tuple(inputs),
        results=(*made, *updates),
        updates=tuple(updates),
        made_bytes=used,
        passing_bytes=most - used,
        others=tuple(op.index for op in row[1:]),
    )


class Programs:
    """Compiled rows, one for each sequence of kernels and wiring."""

    def __init__(self) -> None:
        self._compiled: dict[_Wiring, Kernel] = {}

    def kernel(self, op: RunOp, kernels: Mapping[str, Kernel]) -> Kernel:
        """What computes all steps of `op` at once; for a single step its own kernel."""
        if len(op.calls) == 1:
            return kernels[op.calls[0].kernel]
        wiring = _wiring(op, kernels)
        if wiring not in self._compiled:
            self._compiled[wiring] = _together(wiring)
        return self._compiled[wiring]


@dataclasses.dataclass(frozen=True, slots=True)
class _Wiring:
    """Steps without names: arrays are numbers, in the order in which they appear."""

    inputs: int
    calls: tuple[tuple[Kernel, tuple[int, ...], tuple[int, ...]], ...]
    results: tuple[int, ...]
    donated: tuple[int, ...]


def _wiring(op: RunOp, kernels: Mapping[str, Kernel]) -> _Wiring:
    number = {name: place for place, name in enumerate(op.inputs)}
    calls = []
    for call in op.calls:
        for name in call.results:
            number.setdefault(name, len(number))
        taken = tuple(number[name] for name in call.inputs)
        made = tuple(number[name] for name in call.results)
        calls.append((kernels[call.kernel], taken, made))
    results = tuple(number[name] for name in op.results)
    donated = tuple(number[name] for name in op.updates)
    return _Wiring(len(op.inputs), tuple(calls), results, donated)


def _barrier(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    apart: Callable[..., tuple[jax.Array, ...]] = jax.lax.optimization_barrier
    return apart(arrays)


def _together(wiring: _Wiring) -> Kernel:
    def row(*inputs: jax.Array) -> tuple[jax.Array, ...]:
        held = dict(enumerate(inputs))
        for kernel, taken, made in wiring.calls:
            results = _barrier(tuple(kernel(*(held[i] for i in taken))))
            held |= dict(zip(made, results, strict=True))
        return tuple(held[i] for i in wiring.results)

    return jax.jit(row, donate_argnums=wiring.donated)
