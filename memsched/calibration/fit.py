"""From observations to a learned cost model: medians first, then margins on what they leave over.

Medians minimise the log ratio of measured over predicted, over all cases alike, held back by the
machine's own rates where nothing was measured.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memsched.calibration.descent import descend, pinball
from memsched.calibration.fit_links import fit_links
from memsched.cost.coefficients import (
    DURATIONS_S,
    Coefficients,
    duration_class,
    has_many_rows,
    kind_of,
    run_log_seconds,
    run_slowdown,
    shapes,
    stretched,
    table,
)
from memsched.cost.contention import physical_slowdown
from memsched.cost.features import RunFeatures
from memsched.cost.observations import CopyObservation, Observation, RunObservation
from memsched.cost.rates import rates_digest
from memsched.errors import ProgramError
from memsched.machine import Machine

QUANTILES = (0.9,)
FEWEST_CASES = 2
# How strongly parameters are held: to the machine's rates, to their neighbours, to nothing.
TO_RATES, TO_NEIGHBOURS, TO_NONE = 2e-4, 4e-3, 2e-3
PARTLY = (0.1, 0.9)
# Steps alone and beside copies are compared from so many of each, of so many seconds.
FEWEST_SECONDS, SHORTEST_S = 8, 5e-4
MOST_LOST = 0.75
LEAST_EXCESS = 0.01
MARGIN_TO_NEIGHBOURS = 1e-2


def fit(observations: Sequence[Observation], machine: Machine, identity: str) -> Coefficients:
    """A cost model for a machine.

    Args:
        identity: says which hardware was measured.

    Raises:
        ProgramError: programs of less than `FEWEST_CASES` shapes were measured.
    """
    runs = [one for one in observations if isinstance(one, RunObservation)]
    copies = [one for one in observations if isinstance(one, CopyObservation)]
    cases = list(dict.fromkeys(one.case for one in runs))
    if len(cases) < FEWEST_CASES:
        raise ProgramError(
            f"different shapes of measured programs: {len(cases)}, wanted {FEWEST_CASES} to learn"
            " from; calibrate without --from-runs, and where more memory is free"
        )
    dtypes = tuple(sorted({one.features.dtype for one in runs}))
    kinds = tuple(sorted({kind_of(one.features) for one in runs}))
    data = _data(runs, dtypes, kinds)
    found, log_s = _medians(data, runs, machine)
    return Coefficients(
        machine=rates_digest(machine),
        identity=identity,
        cases=len(cases),
        profile_flops_per_s=machine.compute.flops_per_s,
        profile_bytes_per_s=machine.compute.bytes_per_s,
        dtypes=dtypes,
        kinds=kinds,
        run=found,
        margins={str(q): _margins(runs, log_s, q) for q in QUANTILES},
        links=fit_links(copies, machine, QUANTILES),
    )


def _data(
    runs: Sequence[RunObservation], dtypes: Sequence[str], kinds: Sequence[str]
) -> dict[str, Any]:
    """Columns of features, the log of each observation's median, and equal weight for each case."""
    columns: dict[str, Any] = table([one.features for one in runs], dtypes, kinds)
    columns["beside"] = np.array([one.beside for one in runs])
    columns["log_s"] = np.log([np.median(one.seconds) for one in runs])
    keys = [(one.case, one.features) for one in runs]
    counts: dict[tuple[str, RunFeatures], int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    # A step that copies overlap in part says little of how they slow it: the longer it takes for
    # any other reason, the smaller is that part.
    clear = [not PARTLY[0] < one.beside < PARTLY[1] for one in runs]
    columns["weight"] = np.array([1.0 / counts[key] for key in keys]) * clear
    return {
        name: values if values.dtype == np.int32 else values.astype(np.float32)
        for name, values in columns.items()
    }


def _medians(
    data: dict[str, Any], runs: Sequence[RunObservation], machine: Machine
) -> tuple[dict[str, Any], np.ndarray]:
    """Parameters, and the log of what they say of each observation."""
    start = _start(machine, data) | {"excess": _excess(runs, machine)}
    weights = jnp.asarray(data["weight"], jnp.float32)
    found: dict[str, jax.Array] = jax.jit(
        lambda: descend(lambda p: _loss(p, start, data, weights), start)
    )()
    said = np.asarray(_log_seconds(found, data))
    return {name: np.asarray(value, np.float64) for name, value in found.items()}, said


def _start(machine: Machine, data: dict[str, Any]) -> dict[str, Any]:
    """The machine's own rates."""
    compute = machine.compute
    dtypes, kinds = int(data["dtype"].max()) + 1, int(data["kind"].max()) + 1
    values = {
        "overhead_s": math.log(max(compute.latency_s, 1e-6)),
        "flops_per_s": math.log(compute.flops_per_s),
        "bytes_per_s": math.log(compute.bytes_per_s),
        "other_flops_per_s": math.log(compute.flops_per_s / 4),
        "cache_bytes_per_s": math.log(compute.bytes_per_s / 2),
        "value_bytes_per_s": math.log(compute.bytes_per_s / 2),
        "sharpness": math.log(2.0),
        "kind": 0.0,
        "slope": 0.0,
        "excess": 0.0,
    }
    return {
        name: jnp.full(shape, values[name], jnp.float32)
        for name, shape in shapes(dtypes, kinds).items()
    }


def _excess(runs: Sequence[RunObservation], machine: Machine) -> jax.Array:
    """Log of how much longer steps of few and of many rows take beside copies than alone.

    Equal steps of one model are compared: what else differs between programs plays no part. Those
    that copies overlap from end to end decide; where there are none, those that they overlap in
    part, too.
    """
    alone: dict[tuple[str, RunFeatures], list[float]] = {}
    for one in runs:
        if one.beside < PARTLY[0]:
            alone.setdefault((one.case, one.features), []).extend(one.seconds)
    usual_s = {
        key: float(np.median(some))
        for key, some in alone.items()
        if len(some) >= FEWEST_SECONDS and np.median(some) >= SHORTEST_S
    }
    found = []
    for many in (False, True):
        known = [
            one
            for one in runs
            if (one.case, one.features) in usual_s and has_many_rows(one.features) is many
        ]
        shares = (_lost(known, usual_s, least) for least in reversed(PARTLY))
        lost = next((share for share in shares if share is not None), None)
        slowdown = physical_slowdown(machine) if lost is None else 1.0 / (1.0 - lost)
        found.append(math.log(max(LEAST_EXCESS, slowdown - 1.0)))
    return jnp.asarray(found, jnp.float32)


def _lost(
    runs: Sequence[RunObservation], usual_s: Mapping[tuple[str, RunFeatures], float], least: float
) -> float | None:
    """The part of the time beside copies that steps lose to them, None where nothing says it.

    Args:
        least: the part of a step that copies overlap at least.
    """
    parts: dict[tuple[str, RunFeatures], list[float]] = {}
    for one in runs:
        if one.beside >= least:
            key = one.case, one.features
            more = [(seconds - usual_s[key]) / (one.beside * seconds) for seconds in one.seconds]
            parts.setdefault(key, []).extend(more)
    if sum(map(len, parts.values())) < FEWEST_SECONDS:
        return None
    # Each of them counts the same: they differ from one another by more than one does from itself.
    lost = float(np.median([np.median(some) for some in parts.values()]))
    return min(max(lost, 0.0), MOST_LOST)


def _log_seconds(parameters: Any, data: dict[str, Any]) -> jax.Array:
    slowdown = run_slowdown(parameters, data["many"], data["moves"], jnp)
    factor = jnp.log(stretched(data["beside"], slowdown))
    found: jax.Array = run_log_seconds(parameters, data, jnp) + factor
    return found


def _loss(parameters: Any, start: Any, data: dict[str, Any], weights: jax.Array) -> jax.Array:
    error = data["log_s"] - _log_seconds(parameters, data)
    misfit = jnp.sum(weights * 2.0 * pinball(error, 0.5)) / jnp.sum(weights)
    held = sum(TO_RATES * jnp.sum((value - start[name]) ** 2) for name, value in parameters.items())
    for name in ("flops_per_s", "bytes_per_s"):
        held += TO_NEIGHBOURS * jnp.sum(jnp.diff(parameters[name], axis=1) ** 2)
    held += jnp.sum((parameters["excess"] - start["excess"]) ** 2)
    held += TO_NONE * (jnp.sum(parameters["kind"] ** 2) + jnp.sum(parameters["slope"] ** 2))
    found: jax.Array = misfit + held
    return found


def _margins(
    runs: Sequence[RunObservation], log_s: np.ndarray, quantile: float
) -> tuple[float, ...]:
    """Log factors by class of durations, from every single duration; every case counts the same.

    They are what the fit leaves over. Folds without a case say more than that of a new one: theirs
    lies outside of all others, a new one between them.
    """
    counts: Counter[str] = Counter()
    for one in runs:
        counts[one.case] += len(one.seconds)
    errors = [
        (math.log(seconds) - predicted, duration_class(math.exp(predicted)), 1 / counts[one.case])
        for one, predicted in zip(runs, log_s, strict=True)
        for seconds in one.seconds
    ]
    columns = [jnp.asarray(np.array(column)) for column in zip(*errors, strict=True)]
    error, place, weight = columns[0].astype(jnp.float32), columns[1], columns[2]

    def loss(margins: jax.Array) -> jax.Array:
        missed = pinball(error - margins[place], quantile)
        near = MARGIN_TO_NEIGHBOURS * jnp.sum(jnp.diff(margins) ** 2)
        return jnp.sum(weight * missed) / jnp.sum(weight) + near

    start = jnp.full(len(DURATIONS_S) + 1, 0.1, jnp.float32)
    found = jax.jit(lambda: descend(loss, start))()
    return tuple(max(0.0, round(float(value), 5)) for value in found)
