"""Fitting, against machines that were made up: the laws are known, the noise too."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from programs import tiny_machine

from memsched.calibration.fit import fit
from memsched.calibration.fit_links import fit_links
from memsched.cost.coefficients import Coefficients
from memsched.cost.features import RunFeatures
from memsched.cost.learned import LearnedCost
from memsched.cost.observations import CopyObservation, Observation, RunObservation
from memsched.errors import ProgramError
from memsched.machine import Machine

NOISE = 0.05
MACHINE = tiny_machine(flops_per_s=1e11, nvme_bytes_per_s=1e9)
SLOWDOWN, COPY_SLOWDOWN = 1.6, 1.25
# Products of few rows run at another rate than those of many, and one kind is slower than it looks.
RATES = {"bfloat16": (2e10, 3e11), "float32": (1.5e10, 1.2e11)}
FACTORS = {"layer": 1.0, "block": 1.5, "norm": 1.0}


def law_s(one: RunFeatures, beside: float) -> float:
    """The made-up machine: what a step takes, a part of it `beside` copies.

    Copies slow down what reads weights or caches.
    """
    few, many = RATES[one.dtype]
    rate = 4 * few if one.rows <= 8 else many
    products = max(one.weight_flops / rate, one.weight_bytes / few)
    others = max(one.other_flops / 5e10, one.cache_bytes / 8e9)
    alone = FACTORS[one.kind] * (2e-5 + products + others + one.value_bytes / 1e10)
    slowdown = 1.0 if one.kind == "norm" else SLOWDOWN
    return alone / (1 - beside * (1 - 1 / slowdown))


def step(kind: str, width: int, rows: int, slots: int, dtype: str) -> RunFeatures:
    """A step of a model that is so wide, over a cache with so many slots."""
    size = 2 if dtype == "bfloat16" else 4
    weights = 0 if kind == "norm" else 12 * width * width
    others = 4 * rows * slots * width if kind == "layer" else 0
    caches = 2 * slots * width * size if kind == "layer" else 0
    values = 6 * rows * width * size
    return RunFeatures(
        kind, dtype, rows, 2 * rows * weights, others, weights * size, caches, values
    )


def steps(widths: tuple[int, ...]) -> list[RunFeatures]:
    cases = itertools.product(FACTORS, widths, (1, 4, 64, 512), (256, 2048), RATES)
    return list(dict.fromkeys(step(*case) for case in cases))


def measured(
    widths: tuple[int, ...],
    rng: np.random.Generator,
    noise: float = NOISE,
    parts: tuple[float, ...] = (0.0, 0.5, 1.0),
) -> list[Observation]:
    """Every step eight times, alone and beside copies; copies alone and beside steps."""
    found: list[Observation] = []
    for one, beside in itertools.product(steps(widths), parts):
        seconds = law_s(one, beside) * np.exp(noise * rng.standard_normal(8))
        case = f"{one.value_bytes % 977}{one.dtype}"
        found.append(RunObservation(case, one, beside, tuple(sorted(map(float, seconds)))))
    for width, copies, beside in itertools.product(widths, (1, 11), (0.0, 1.0)):
        nbytes = copies * width * width
        blocks = copies * -(-width * width // (4 << 20))
        alone = 3e-5 * copies + 1e-4 * blocks + nbytes / 1.5e9
        for _ in range(8):
            seconds = alone / (1 - beside * (1 - 1 / COPY_SLOWDOWN))
            seconds *= math.exp(noise * rng.standard_normal())
            found.append(
                CopyObservation(str(width), "nvme->device", copies, blocks, nbytes, beside, seconds)
            )
    return found


@pytest.fixture(scope="module")
def machine() -> Machine:
    return MACHINE


@pytest.fixture(scope="module")
def fitted(machine: Machine) -> Coefficients:
    rng = np.random.default_rng(0)
    return fit(measured((256, 512, 1024, 2048, 4096), rng), machine, "0" * 16)


def errors(cost: LearnedCost, some: list[RunFeatures]) -> np.ndarray:
    return np.array([abs(cost.run_s(one) / law_s(one, 0.0) - 1) for one in some])


def test_steps_of_unseen_shapes_are_predicted_within_the_noise(fitted: Coefficients) -> None:
    found = errors(LearnedCost(fitted), steps((384, 768, 1536, 3072)))
    assert np.median(found) < NOISE
    assert found.max() < 0.35
    assert np.quantile(found, 0.9) < 3 * NOISE


def test_the_slowdown_of_steps_beside_copies_is_found(fitted: Coefficients) -> None:
    cost = LearnedCost(fitted)
    for rows in (1, 512):
        one = step("layer", 1024, rows, 256, "bfloat16")
        assert cost.run_slowdown(one) == pytest.approx(SLOWDOWN, rel=0.05)


def test_what_copies_never_overlap_from_end_to_end_says_how_they_slow_it_too(
    machine: Machine,
) -> None:
    some = measured((512, 1024, 2048), np.random.default_rng(3), parts=(0.0, 0.3, 0.6))
    cost = LearnedCost(fit(some, machine, "0" * 16))
    for rows in (1, 512):
        one = step("layer", 1024, rows, 256, "bfloat16")
        assert cost.run_slowdown(one) == pytest.approx(SLOWDOWN, rel=0.1)


def test_copies_take_nothing_from_steps_that_read_nothing(fitted: Coefficients) -> None:
    cost = LearnedCost(fitted)
    assert cost.run_slowdown(step("norm", 1024, 1, 256, "bfloat16")) == 1.0


def test_links_are_found(fitted: Coefficients) -> None:
    cost, link = LearnedCost(fitted), fitted.links["nvme->device"]
    assert link.bytes_per_s == pytest.approx(1.5e9, rel=0.05)
    assert link.slowdown == pytest.approx(COPY_SLOWDOWN, rel=0.05)
    seconds = cost.copies_s("nvme->device", 7, 21, 7 * 10_000_000)
    assert seconds == pytest.approx(7 * 3e-5 + 21 * 1e-4 + 0.07 / 1.5, rel=0.05)
    assert cost.copies_s("device->nvme", 1, 1, 1) is None


def test_the_90_percent_quantile_covers_as_many_unseen_measurements(fitted: Coefficients) -> None:
    rng = np.random.default_rng(1)
    high = LearnedCost(fitted).at(0.9)
    covered = [
        seconds <= high.run_s(one.features)
        for one in measured((384, 768, 1536, 3072), rng)
        if isinstance(one, RunObservation) and one.beside == 0.0
        for seconds in one.seconds
    ]
    assert 0.82 < np.mean(covered) < 0.97


def test_a_wider_spread_gives_wider_margins(machine: Machine, fitted: Coefficients) -> None:
    some = measured((512, 1024, 2048), np.random.default_rng(2), noise=0.3)
    noisy = np.mean(fit(some, machine, "0" * 16).margins["0.9"])
    # Of a lognormal with sigma 0.3, the 90 % quantile is 1.28 sigma up.
    assert noisy == pytest.approx(1.28 * 0.3, rel=0.25)
    assert np.mean(fitted.margins["0.9"]) < noisy / 2


def test_of_links_each_program_counts_the_same_for_the_margin(machine: Machine) -> None:
    def rows(case: str, nbytes: int, factors: Sequence[float]) -> list[CopyObservation]:
        name = "nvme->device"
        return [
            CopyObservation(case, name, 1, 1, nbytes, 0.0, factor * nbytes / 1e9)
            for factor in factors
        ]

    # Three quarters of the small ones take their time, a quarter twice that: an eighth of all.
    small = rows("small", 100_000, [0.5, 1.0, 1.0, 2.0] * 5)
    large = rows("large", 10_000_000, [1.0] * 40)
    (link,) = fit_links([*small, *large], machine, (0.9,)).values()
    assert link.margins["0.9"] == pytest.approx(2.0, rel=0.15)


def test_equal_observations_give_equal_models(machine: Machine, fitted: Coefficients) -> None:
    some = measured((256, 512, 1024, 2048, 4096), np.random.default_rng(0))
    first, second = fitted, fit(some, machine, "0" * 16)
    assert first.margins == second.margins
    assert first.links == second.links
    for name, values in first.run.items():
        np.testing.assert_array_equal(values, second.run[name])


def test_programs_of_too_few_shapes_are_refused(machine: Machine) -> None:
    some = measured((256,), np.random.default_rng(4))
    one_case = [one for one in some if one.case == some[0].case]
    with pytest.raises(ProgramError, match="measured programs: 1, wanted 2"):
        fit(one_case, machine, "0" * 16)
