"""Quantiles of measurements that do not all count the same."""

import numpy as np
from numpy.typing import ArrayLike


def weighted_quantile(values: ArrayLike, weights: ArrayLike, quantile: float) -> float:
    """The least value that at least this share of the weight does not exceed."""
    found = np.asarray(values, np.float64)
    order = np.argsort(found)
    reached = np.cumsum(np.asarray(weights, np.float64)[order])
    place = np.searchsorted(reached, quantile * reached[-1])
    return float(found[order[min(int(place), len(found) - 1)]])
