"""Programs whose values leave the device and come back: arrays that steps made, on all links.

Stages there make a value each; stages back take them, last one first. Between the two every value
rests in the last tier. With a `lag` of 0 the next stage waits for each of them; otherwise they move
while stages compute.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from memsched.calibration.trials import Trial
from memsched.cost.observations import CopyObservation, Observation
from memsched.machine import DEVICE, Machine
from memsched.plan import Action, Copy, Free, Plan, Residence, Run
from memsched.program import Program
from memsched.referee import verify
from memsched.tracing.function import trace

WIDTH = 256
# Rows of float32 values: 128 KiB, 1 MiB and 8 MiB each; to test with, 2 MiB.
ROWS, TESTED_ROWS = (128, 1024, 8192), (2048,)
LAGS = (0, 2)
STAGES = 6
# So many values of one size are there at once, at most, in every tier.
ROOM = 3 * STAGES


def spill_trials(machine: Machine, rows_of: Sequence[int] = ROWS) -> Iterator[Trial]:
    """Small values and large ones, waited for and not; those that the machine has room for."""
    for rows in rows_of:
        if min(tier.capacity_bytes for tier in machine.tiers) < ROOM * rows * WIDTH * 4:
            continue
        program, kernels = trace(
            _there_and_back,
            np.zeros((rows, WIDTH), np.float32),
            np.zeros((WIDTH, WIDTH), np.float32),
            names=("x", "matrix"),
        )
        for lag in LAGS:
            plan = spilling(program, machine, lag)
            verify(plan, program, machine)
            name = f"values of {rows * WIDTH * 4 >> 10} KiB moved out, {lag} stages ahead"
            yield Trial(name, f"spills {rows}", 0.0, program, kernels, machine, plan, {})


def leads_out(found: Observation, machine: Machine) -> bool:
    """Whether it is of a link that leads away from the device.

    What comes back is not read as weights are, which are nearly all that comes that way.
    """
    links = {"->".join(ends) for ends in itertools.pairwise(_path(machine))}
    return isinstance(found, CopyObservation) and found.link in links


def spilling(program: Program, machine: Machine, lag: int) -> Plan:
    """A plan that moves every value out after its stage, and back before it is read."""
    path = _path(machine)
    there, back = program.steps[:STAGES], program.steps[STAGES:]
    kept = [step.writes[-1] for step in there]
    actions: list[Action] = []
    for index, step in enumerate(there):
        actions.append(Run(step.name))
        actions += _hops(kept[index], path)
        if index >= lag:
            actions += [Free(kept[index - lag], tier) for tier in path[:-1]]
    actions += [Free(name, tier) for name in kept[STAGES - lag :] for tier in path[:-1]]
    returning = kept[::-1]
    for name in returning[:lag]:
        actions += _hops(name, path[::-1])
    for index, step in enumerate(back):
        if index + lag < STAGES:
            actions += _hops(returning[index + lag], path[::-1])
        actions.append(Run(step.name))
        actions += [Free(returning[index], tier) for tier in path]
    return _between(program, machine, actions)


def _path(machine: Machine) -> tuple[str, ...]:
    """The tiers from the device outwards."""
    return tuple(tier.name for tier in machine.tiers)


def _hops(name: str, path: Sequence[str]) -> list[Action]:
    """An array over all links of a path."""
    return [Copy(name, *ends) for ends in itertools.pairwise(path)]


def _between(program: Program, machine: Machine, actions: list[Action]) -> Plan:
    """A plan that frees every other array right after the last step that touches it."""
    last: dict[str, str] = {}
    moved = {action.array for action in actions if isinstance(action, Copy)}
    for step in program.steps:
        last |= dict.fromkeys((*step.inputs, *step.writes), step.name)
    stay = {*program.outputs, *moved}
    freed: list[Action] = []
    for action in actions:
        freed.append(action)
        if isinstance(action, Run):
            freed += [
                Free(name, DEVICE)
                for name, step in last.items()
                if step == action.step and name not in stay
            ]
    entry = tuple(Residence(name, DEVICE) for name in program.given)
    leave = tuple(Residence(name, DEVICE) for name in program.outputs)
    return Plan(program.digest, machine.digest, entry, tuple(freed), leave)


def _there_and_back(x: jax.Array, matrix: jax.Array) -> jax.Array:
    kept = []
    for _ in range(STAGES):
        x, value = _there(x, matrix)
        kept.append(value)
    return functools.reduce(lambda x, value: _back(x, value, matrix), reversed(kept), x)


@jax.jit
def _there(x: jax.Array, matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = jnp.tanh(x @ matrix)
    return x, x + 1.0


@jax.jit
def _back(x: jax.Array, value: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.tanh(x @ matrix) * value
