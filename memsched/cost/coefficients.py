"""The numbers of a learned cost model, and the formula that they belong to.

A step takes a roofline's time: an overhead, products with weights (limited by arithmetic or by
reading the weights), other products (by arithmetic or by reading caches), and touching values.
Rates go by dtype and class of rows. That time is corrected twice: by a factor for the kind of
kernel, and by a curve over the time itself, which never falls: more work never takes less time.

The formula is written for `numpy` and `jax.numpy` alike: it is fitted with the one, used with the
other.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memsched.cost.features import ROW_CLASSES, RunFeatures, row_class

# Log seconds where the slope of the correction changes.
KNOTS = tuple(math.log(seconds) for seconds in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0))
CENTRE = 2  # the knot at which it is nothing
STEEPEST = 0.5
# Where the quantiles' margins may differ: short steps vary more.
DURATIONS_S = (1e-4, 1e-3, 1e-2, 1e-1)
FEW_ROWS = 16
TINY_S = 1e-9
CLASSES = len(ROW_CLASSES) + 1

Parameters = Mapping[str, Any]
"""Arrays by name; the names and shapes are those of `shapes`."""


@dataclasses.dataclass(frozen=True, slots=True)
class LinkCoefficients:
    """A transfer takes `latency_s`, `block_s` for each request, and its bytes over the rate.

    While a step computes it takes `slowdown` times as long. `margins` are factors on top of the
    median, by quantile. `profile_bytes_per_s` is what the machine's profile said of it.
    """

    profile_bytes_per_s: float
    latency_s: float
    block_s: float
    bytes_per_s: float
    slowdown: float
    margins: Mapping[str, float]


@dataclasses.dataclass(frozen=True, slots=True)
class Coefficients:
    """What was learned of one machine.

    `machine` is the digest of its rates, `identity` of the hardware that was measured, `cases` how
    many programs. `margins` are log factors on top of the median, by quantile, for each class of
    durations. `profile_flops_per_s` and `profile_bytes_per_s` are what the profile said of the
    compute: where another machine differs in them, as in a what-if, what was learned scales along.
    """

    machine: str
    identity: str
    cases: int
    profile_flops_per_s: float
    profile_bytes_per_s: float
    dtypes: tuple[str, ...]
    kinds: tuple[str, ...]
    run: Parameters
    margins: Mapping[str, tuple[float, ...]]
    links: Mapping[str, LinkCoefficients]


def shapes(dtypes: int, kinds: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a run's parameters. Rates and overhead are logarithms."""
    return {
        "overhead_s": (),
        "flops_per_s": (dtypes, CLASSES),
        "bytes_per_s": (dtypes, CLASSES),
        "other_flops_per_s": (dtypes, 2),
        "cache_bytes_per_s": (dtypes, 2),
        "value_bytes_per_s": (2,),
        "sharpness": (),
        "kind": (kinds,),
        "slope": (len(KNOTS) - 1,),
        "excess": (2,),
    }


def table(
    features: Sequence[RunFeatures], dtypes: Sequence[str], kinds: Sequence[str]
) -> dict[str, np.ndarray]:
    """Features as columns. An unknown kind has no factor; an unknown dtype is the next in size."""
    known = {name: index for index, name in enumerate(kinds)}
    numbers = ("weight_flops", "other_flops", "weight_bytes", "cache_bytes", "value_bytes")
    columns = {
        name: np.array([getattr(one, name) for one in features], np.float64) for name in numbers
    }
    columns["dtype"] = np.array([_nearest(one.dtype, dtypes) for one in features], np.int32)
    columns["class"] = np.array([row_class(one.rows) for one in features], np.int32)
    columns["many"] = np.array([has_many_rows(one) for one in features], np.int32)
    columns["several"] = np.array([one.rows > 1 for one in features], np.int32)
    columns["moves"] = np.array([moves(one) for one in features], np.float64)
    columns["kind"] = np.array([known.get(kind_of(one), -1) for one in features], np.int32)
    return columns


def has_many_rows(features: RunFeatures) -> bool:
    """Whether arithmetic bounds a step's products, not reading its weights."""
    return features.rows > FEW_ROWS


def kind_of(features: RunFeatures) -> str:
    """What shares a factor: a kernel with few rows, or with many: other things bound them."""
    return f"{features.kind}_many" if has_many_rows(features) else features.kind


def run_log_seconds(parameters: Parameters, columns: Mapping[str, Any], xp: Any) -> Any:
    """Log of the median seconds of each row of a `table`, nothing else being busy."""
    dtype, several = columns["dtype"], columns["several"]
    place = dtype, columns["class"]
    sharpness = 1.0 + xp.exp(parameters["sharpness"])

    def slower(first: Any, second: Any) -> Any:
        """About the larger of two times; their sum at worst."""
        logs = (xp.log(first + TINY_S), xp.log(second + TINY_S))
        return xp.exp(xp.logaddexp(sharpness * logs[0], sharpness * logs[1]) / sharpness)

    def seconds(amount: str, rate: str, at: Any) -> Any:
        return columns[amount] * xp.exp(-parameters[rate][at])

    alone = (
        xp.exp(parameters["overhead_s"])
        + slower(
            seconds("weight_flops", "flops_per_s", place),
            seconds("weight_bytes", "bytes_per_s", place),
        )
        + slower(
            seconds("other_flops", "other_flops_per_s", (dtype, several)),
            seconds("cache_bytes", "cache_bytes_per_s", (dtype, several)),
        )
        + seconds("value_bytes", "value_bytes_per_s", columns["many"])
    )
    log_s = xp.log(alone)
    factor = xp.concatenate([parameters["kind"], xp.zeros(1)])[columns["kind"]]
    return log_s + factor + _curve(parameters["slope"], log_s, xp)


def run_slowdown(parameters: Parameters, many: Any, moves: Any, xp: Any) -> Any:
    """How many times as long a step takes while something is copied.

    Args:
        many: 1 for many rows, 0 for few.
        moves: of `moves`.
    """
    return 1.0 + xp.exp(parameters["excess"])[many] * moves


def moves(features: RunFeatures) -> float:
    """1 for a step that reads weights or caches; 0 for one that is mostly its dispatch."""
    return float(features.weight_bytes + features.cache_bytes > 0)


def stretched(beside: Any, slowdown: Any) -> Any:
    """Factor on the time of an action that spends a part of it `beside` another one."""
    return 1.0 / (1.0 - beside * (1.0 - 1.0 / slowdown))


def duration_class(seconds: float) -> int:
    """The index of the margin that belongs to a duration."""
    return sum(seconds > most for most in DURATIONS_S)


def _curve(slope: Any, log_s: Any, xp: Any) -> Any:
    """A piecewise linear correction, 0 at the middle knot; its slope is above -1 everywhere."""
    slopes = STEEPEST * xp.tanh(slope)

    def at(value: Any) -> Any:
        parts = [
            slopes[index] * (xp.clip(value, low, high) - low)
            for index, (low, high) in enumerate(itertools.pairwise(KNOTS))
        ]
        return sum(parts[1:], start=parts[0])

    return at(log_s) - at(xp.asarray(KNOTS[CENTRE]))


def _nearest(dtype: str, dtypes: Sequence[str]) -> int:
    """The dtype itself, or the one nearest in size; the first of several."""
    if dtype in dtypes:
        return dtypes.index(dtype)
    size = np.dtype(dtype).itemsize
    return min(range(len(dtypes)), key=lambda i: (abs(np.dtype(dtypes[i]).itemsize - size), i))
