"""Weighted quantiles, by counting."""

import numpy as np

from memsched.calibration.weighted import weighted_quantile


def test_a_weight_counts_as_so_many_equal_values() -> None:
    rng = np.random.default_rng(0)
    values, counts = rng.normal(size=40), rng.integers(1, 5, 40)
    repeated = np.sort(np.repeat(values, counts))
    for quantile in (0.0, 0.1, 0.5, 0.9, 1.0):
        place = max(0, int(np.ceil(quantile * len(repeated))) - 1)
        assert weighted_quantile(values, counts, quantile) == repeated[place]


def test_what_has_no_weight_does_not_count() -> None:
    assert weighted_quantile([1.0, 2.0, 9.0], [1.0, 1.0, 0.0], 0.9) == 2.0
