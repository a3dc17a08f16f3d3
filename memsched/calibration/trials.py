"""Programs carried out to be measured: by the executor itself, with weights that mean nothing."""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from memsched.calibration.resident import peak_since, start_peak
from memsched.calibration.scratch import Scratch
from memsched.cost.contention import BesideCopies
from memsched.cost.observations import Observation, observe
from memsched.cost.roofline import CostModel, Roofline
from memsched.cost.span import Span
from memsched.errors import DoesNotFitError
from memsched.machine import DEVICE, NVME, Machine
from memsched.passes.bridge import bridge
from memsched.passes.compile import compile_plan
from memsched.plan import Plan, Residence
from memsched.program import ArraySpec, Program
from memsched.referee import verify
from memsched.runtime import Executor
from memsched.runtime.fuse import Kernel

# What a budget that has to hold everything is planned with.
PLENTY_BYTES = 1 << 44
# A budget that is too small is raised by this part of it.
MORE_PART = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """A program with its plan within a budget.

    `case` is the model whose shapes it has; `share` how much of its weights may stay. `values` are
    given arrays that are not noise or zeros.
    """

    name: str
    case: str
    share: float
    program: Program
    kernels: Mapping[str, Kernel]
    machine: Machine
    plan: Plan
    values: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """Passes of a trial: spans and seconds of each, and the most memory it took.

    `carried_s` is how long in each of them transfers of the pass before went on.
    `resident_bytes` is how far the process grew; None where the system does not say.
    """

    spans: tuple[tuple[Span, ...], ...]
    carried_s: tuple[float, ...]
    seconds: tuple[float, ...]
    ledger_bytes: Mapping[str, int]
    resident_bytes: int | None


def make_trial(
    name: str,
    case: str,
    program: Program,
    kernels: Mapping[str, Kernel],
    machine: Machine,
    *,
    share: float = 1.0,
    values: Mapping[str, Any] | None = None,
) -> Trial:
    """Plans a program so that about this share of its weights stays on the device.

    Raises:
        DoesNotFitError: the machine has no room for it.
    """
    cost = BesideCopies(Roofline())
    room = machine.tier(DEVICE).capacity_bytes
    # Nothing is moved out: there is nothing to learn from it that reading would not say.
    machine = machine.with_capacities({NVME: 0})
    plenty = machine.with_capacities({DEVICE: PLENTY_BYTES})
    weights = sum(program.arrays[one].nbytes for one in program.of_kind("weight"))
    whole = compile_plan(program, plenty, cost)
    budget = verify(whole, program, plenty)[DEVICE] - int((1.0 - share) * weights)
    fitting, plan = _fitting(program, machine, min(budget, room), room, cost)
    return Trial(name, case, share, program, kernels, fitting, plan, dict(values or {}))


def _fitting(
    program: Program, machine: Machine, budget: int, room: int, cost: CostModel
) -> tuple[Machine, Plan]:
    """A plan within a budget, or within the first larger one that is enough."""
    while True:
        fitting = machine.with_capacities({DEVICE: budget})
        try:
            return fitting, compile_plan(program, fitting, cost)
        except DoesNotFitError:
            if budget >= room:
                raise
            budget = min(room, budget + budget // MORE_PART)


def measure(trial: Trial, scratch: Scratch, *, passes: int, seconds: float = 10.0) -> Measured:
    """Carries a trial out, once to settle and then up to `passes` times or for some seconds.

    Raises:
        StoreError: the disk has no room for its weights.
    """
    program, arrays = trial.program, _weights(trial.program)
    sources = scratch.sources(arrays)
    with Executor(
        trial.machine, sources, nvme_dir=scratch.directory, nvme_space_bytes=None
    ) as executor:
        executor.prepare(trial.plan, program, trial.kernels)
        before = start_peak()
        _bring(executor, trial, arrays)
        given = _given(trial)
        found: list[tuple[tuple[Span, ...], float, float]] = []
        end = time.perf_counter() + seconds
        for _ in range(1 + passes):
            start = time.perf_counter()
            outcome = executor.run(trial.plan, program, trial.kernels, given)
            found.append((outcome.spans, outcome.carried_s, time.perf_counter() - start))
            given |= {name: value for name, value in outcome.outputs.items() if name in given}
            given |= _consumed(trial, given)
            if len(found) == 1:
                start_peak()  # what settling took, and what was given to it, is no part of a pass
            if len(found) > 1 and time.perf_counter() > end:
                break
        peak = peak_since(before)
        spans, carried_s, times = zip(*found[1:], strict=True)
        return Measured(spans, carried_s, times, executor.ledger_peak_bytes, peak)


def observations(trial: Trial, measured: Measured) -> Iterator[Observation]:
    """What passes of a trial say, one after the other."""
    for spans, carried_s in zip(measured.spans, measured.carried_s, strict=True):
        yield from observe(
            trial.plan,
            trial.program,
            trial.machine,
            spans,
            carried_s=carried_s,
            case=trial.case,
        )


def _weights(program: Program) -> dict[str, ArraySpec]:
    return {name: program.arrays[name] for name in program.of_kind("weight")}


def _bring(executor: Executor, trial: Trial, arrays: Mapping[str, ArraySpec]) -> None:
    """Loads what the plan expects to be there."""
    home = [Residence(name, NVME) for name in arrays]
    entry = [rest for rest in trial.plan.entry if rest.array in arrays and rest.tier != NVME]
    order = list(dict.fromkeys(name for step in trial.program.steps for name in step.reads))
    program, plan = bridge(home, [*home, *entry], arrays, trial.machine, order)
    executor.run(plan, program, {}, {})


def _given(trial: Trial) -> dict[str, Any]:
    """What a trial takes from its caller, for the first time."""
    names = [name for name in trial.program.given if name not in _weights(trial.program)]
    return {name: _value(trial, name) for name in names}


def _consumed(trial: Trial, given: Mapping[str, Any]) -> dict[str, Any]:
    """New values for what a pass used up and did not give back."""
    return {
        name: _value(trial, name)
        for name, value in given.items()
        if isinstance(value, jax.Array) and value.is_deleted()
    }


def _value(trial: Trial, name: str) -> Any:
    """Noise for floats, zeros for whole numbers, true for conditions, unless the trial says."""
    spec = trial.program.arrays[name]
    dtype = np.dtype(spec.dtype)
    if name in trial.values:
        return np.asarray(trial.values[name], dtype)
    if dtype.kind in "fV":
        noise = np.random.default_rng(0).standard_normal(spec.shape, np.float32)
        return noise.astype(dtype)
    return np.full(spec.shape, dtype.kind == "b", dtype)
