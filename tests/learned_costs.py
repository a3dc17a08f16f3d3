"""Coefficients of a learned cost model for tests that need no measurement."""

import math

import numpy as np

from memsched.cost.coefficients import DURATIONS_S, Coefficients, LinkCoefficients, shapes
from memsched.cost.rates import rates_digest
from memsched.machine import Machine

DTYPES, KINDS = ("bfloat16", "float32"), ("layer", "norm")
SLOWDOWN = 2.0


def coefficients(machine: Machine, seed: int = 0) -> Coefficients:
    """Some numbers of plausible size; nothing was fitted."""
    rng = np.random.default_rng(seed)
    middle = {"overhead_s": -11.0, "sharpness": 0.7, "kind": 0.0, "slope": 0.0, "excess": 0.0}
    run = {
        name: middle.get(name, 23.0) + 0.3 * rng.standard_normal(shape)
        for name, shape in shapes(len(DTYPES), len(KINDS)).items()
    }
    run["excess"] = np.full(2, math.log(SLOWDOWN - 1))
    link = LinkCoefficients(1e9, 1e-4, 1e-5, 1e9, 1.5, {"0.9": 1.3})
    margins = {"0.9": tuple(0.1 * (index + 1) for index in range(len(DURATIONS_S) + 1))}
    return Coefficients(
        machine=rates_digest(machine),
        identity="0" * 16,
        cases=7,
        profile_flops_per_s=machine.compute.flops_per_s,
        profile_bytes_per_s=machine.compute.bytes_per_s,
        dtypes=DTYPES,
        kinds=KINDS,
        run=run,
        margins=margins,
        links={"nvme->device": link},
    )
