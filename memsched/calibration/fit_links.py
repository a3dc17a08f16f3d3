"""Coefficients of each link that was measured.

Margins are quantiles of what the coefficients leave over: four numbers fitted to hundreds of
transfers do not fit their noise. Each program counts the same; within one, rows of transfers weigh
as they do in the fit: small ones vary by a factor, and are most of what small models say.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from memsched.calibration.descent import descend, pinball
from memsched.calibration.weighted import weighted_quantile
from memsched.cost.coefficients import LinkCoefficients, stretched
from memsched.cost.observations import CopyObservation
from memsched.machine import Link, Machine

FEWEST = 3  # observations of a link; with less it keeps the machine's rates
TO_RATES = 2e-4
START_SLOWDOWN = 1.1

Columns = dict[str, jax.Array]


def fit_links(
    observations: Sequence[CopyObservation], machine: Machine, quantiles: Sequence[float]
) -> dict[str, LinkCoefficients]:
    """Coefficients by name of the link ("nvme->device"), in the machine's order."""
    found = {}
    for link in machine.links:
        name = f"{link.source}->{link.target}"
        some = [one for one in observations if one.link == name]
        if len(some) >= FEWEST:
            found[name] = _fit(some, link, quantiles)
    return found


def _fit(
    observations: Sequence[CopyObservation], link: Link, quantiles: Sequence[float]
) -> LinkCoefficients:
    data = {
        name: jnp.asarray([float(getattr(one, name)) for one in observations], jnp.float32)
        for name in ("copies", "blocks", "nbytes", "beside")
    }
    log_s = jnp.asarray([math.log(one.seconds) for one in observations], jnp.float32)
    start = jnp.log(
        jnp.asarray(
            [
                max(link.latency_s, 1e-6) / 4,
                max(link.latency_s, 1e-6) / 4,
                link.bytes_per_s,
                START_SLOWDOWN - 1.0,
            ],
            jnp.float32,
        )
    )
    # Long rows say more of the rate than short ones: each weighs by what it moved.
    size = jnp.sqrt(data["nbytes"] / jnp.mean(data["nbytes"])) + 0.1

    def loss(parameters: jax.Array) -> jax.Array:
        error = log_s - _log_seconds(parameters, data)
        misfit = jnp.sum(size * 2.0 * pinball(error, 0.5)) / jnp.sum(size)
        return misfit + TO_RATES * jnp.sum((parameters - start) ** 2)

    found: jax.Array = jax.jit(lambda: descend(loss, start))()
    left = np.asarray(log_s - _log_seconds(found, data))
    weights = _shares(observations, np.asarray(size))
    latency_s, block_s, rate, excess = (math.exp(float(one)) for one in found)
    margins = {
        str(quantile): max(1.0, math.exp(weighted_quantile(left, weights, quantile)))
        for quantile in quantiles
    }
    return LinkCoefficients(link.bytes_per_s, latency_s, block_s, rate, 1.0 + excess, margins)


def _shares(observations: Sequence[CopyObservation], sizes: np.ndarray) -> np.ndarray:
    """Weights by which each program counts the same, and in it each row by its size."""
    whole: dict[str, float] = {}
    for one, size in zip(observations, sizes, strict=True):
        whole[one.case] = whole.get(one.case, 0.0) + float(size)
    shares: np.ndarray = sizes / np.array([whole[one.case] for one in observations])
    return shares


def _log_seconds(parameters: jax.Array, data: Columns) -> jax.Array:
    latency_s, block_s, rate, excess = jnp.exp(parameters)
    alone = latency_s * data["copies"] + block_s * data["blocks"] + data["nbytes"] / rate
    return jnp.log(alone * stretched(data["beside"], 1.0 + excess))
