"""Learned cost models: what they say of programs, and what is believed of their files."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import learned_costs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from learned_costs import DTYPES, KINDS, SLOWDOWN
from programs import array, program, tiny_machine

from memsched.cost import Roofline, Span, plan_seconds, simulate
from memsched.cost.coefficients import run_log_seconds, table
from memsched.cost.coefficients_file import cost_beside, cost_file, from_json, to_json, write_cost
from memsched.cost.contention import BesideCopies, physical_slowdown
from memsched.cost.drift import Drift, drifts
from memsched.cost.features import RunFeatures, row_class, run_features
from memsched.cost.learned import LearnedCost, at_quantile, describe
from memsched.errors import DamagedError, ProgramError
from memsched.plan import Copy, Free, Plan, Residence, Run
from memsched.program import Step

MACHINE = tiny_machine(flops_per_s=1e11, nvme_bytes_per_s=1e9)
coefficients = functools.partial(learned_costs.coefficients, MACHINE)

TWO = program(
    [
        array("x", "input", 64),
        array("a", "weight", 1 << 20),
        array("b", "weight", 1 << 20),
        array("h", "activation", 64),
        array("y", "activation", 64),
    ],
    [
        Step("first", "layer", ("x", "a"), ("h",), flops=2 << 20),
        Step("second", "layer", ("h", "b"), ("y",), flops=2 << 20),
    ],
    ["y"],
)
HOME = (Residence("a", "nvme"), Residence("b", "nvme"), Residence("x", "device"))
PLAN = Plan(
    TWO.digest,
    MACHINE.digest,
    HOME,
    (Copy("a", "nvme", "device"), Run("first"), Copy("b", "nvme", "device"), Run("second")),
    HOME,
)

amounts = st.integers(0, 1 << 40)
features = st.builds(
    RunFeatures,
    st.sampled_from(["layer", "norm", "unseen"]),
    st.sampled_from(["bfloat16", "float32", "float16"]),
    st.integers(1, 4096),
    *[amounts] * 5,
)


@given(features, st.sampled_from(["weight_flops", "other_flops", "weight_bytes", "cache_bytes"]))
def test_more_work_never_takes_less_time(one: RunFeatures, name: str) -> None:
    for seed in range(3):
        cost = LearnedCost(coefficients(seed=seed))
        more = dataclasses.replace(one, **{name: 2 * getattr(one, name) + 1000})
        assert cost.run_s(more) >= (1 - 1e-9) * cost.run_s(one)


@given(features)
def test_the_formula_is_the_same_in_numpy_and_jax(one: RunFeatures) -> None:
    found = coefficients()
    columns = table([one], DTYPES, KINDS)
    narrow = {
        name: jnp.asarray(values if values.dtype == np.int32 else values.astype(np.float32))
        for name, values in columns.items()
    }
    run = {name: jnp.asarray(values, jnp.float32) for name, values in found.run.items()}
    wide = run_log_seconds(found.run, columns, np)
    np.testing.assert_allclose(run_log_seconds(run, narrow, jnp), wide, rtol=1e-4, atol=1e-4)


def test_quantiles_are_the_median_and_what_was_fitted() -> None:
    cost = LearnedCost(coefficients())
    high = cost.at(0.9)
    copy = Copy("a", "nvme", "device")
    assert high.seconds(copy, TWO, MACHINE) == pytest.approx(1.3 * cost.seconds(copy, TWO, MACHINE))
    assert high.seconds(Run("first"), TWO, MACHINE) > cost.seconds(Run("first"), TWO, MACHINE)
    assert cost.seconds(Free("a", "device"), TWO, MACHINE) == 0.0
    assert cost.at(0.5).seconds(copy, TWO, MACHINE) == cost.seconds(copy, TWO, MACHINE)
    with pytest.raises(ProgramError, match=r"quantile 0.75 was not fitted; there are 0.5, 0.9"):
        cost.at(0.75)
    assert at_quantile(Roofline(), 0.9) is None
    assert at_quantile(cost, 0.75) is None
    assert isinstance(at_quantile(cost, 0.9), LearnedCost)


def test_predictions_say_what_they_rest_on() -> None:
    assert describe(LearnedCost(coefficients())).startswith(
        "learned from programs of 7 different shapes"
    )
    assert "90% quantile" in describe(LearnedCost(coefficients(), 0.9))
    assert "nothing was measured" in describe(Roofline())


def test_a_copy_takes_latency_blocks_and_bytes_and_an_unmeasured_link_its_rate() -> None:
    cost = LearnedCost(coefficients())
    nbytes = TWO.arrays["a"].nbytes
    blocks = nbytes // 4096
    wanted = 1e-4 + 1e-5 * blocks + nbytes / 1e9
    assert cost.seconds(Copy("a", "nvme", "device"), TWO, MACHINE) == pytest.approx(wanted)
    back = Copy("a", "device", "nvme")
    assert cost.seconds(back, TWO, MACHINE) == Roofline().seconds(back, TWO, MACHINE)


def test_on_a_faster_machine_what_was_learned_scales_along() -> None:
    cost = LearnedCost(coefficients())
    disk = tiny_machine(flops_per_s=1e11, nvme_bytes_per_s=2e9)
    copy, run = Copy("a", "nvme", "device"), Run("first")
    nbytes = TWO.arrays["a"].nbytes
    saved = cost.seconds(copy, TWO, MACHINE) - cost.seconds(copy, TWO, disk)
    assert saved == pytest.approx(nbytes / 1e9 / 2)
    assert cost.seconds(run, TWO, disk) == cost.seconds(run, TWO, MACHINE)
    faster = dataclasses.replace(
        MACHINE, compute=dataclasses.replace(MACHINE.compute, flops_per_s=1e12, bytes_per_s=1e10)
    )
    assert cost.seconds(run, TWO, faster) < 0.6 * cost.seconds(run, TWO, MACHINE)


def test_steps_whose_weights_stay_go_at_their_own_speed_unless_something_is_copied() -> None:
    cost = LearnedCost(coefficients())
    step_s = cost.seconds(Run("first"), TWO, MACHINE)
    rest = (Residence("a", "device"), Residence("b", "device"), Residence("x", "device"))
    runs = (Run("first"), Run("second"))
    alone = simulate(Plan(TWO.digest, MACHINE.digest, rest, runs, rest), TWO, MACHINE, cost)
    assert alone[-1].end_s == pytest.approx(2 * step_s)
    rest = (Residence("a", "device"), *HOME[1:])
    actions = (Copy("b", "nvme", "device"), Run("first"))
    beside = simulate(Plan(TWO.digest, MACHINE.digest, rest, actions, rest), TWO, MACHINE, cost)
    assert beside[-1].end_s == pytest.approx(SLOWDOWN * step_s)


def test_a_step_beside_a_copy_takes_longer_and_so_does_the_copy() -> None:
    cost = LearnedCost(coefficients())
    step_s = cost.seconds(Run("first"), TWO, MACHINE)
    copy_s = cost.seconds(Copy("a", "nvme", "device"), TWO, MACHINE)
    spans = simulate(PLAN, TWO, MACHINE, cost)
    # The second copy follows the first at once; the first step runs beside it, at half its speed.
    assert (spans[0].start_s, spans[0].end_s) == pytest.approx((0.0, copy_s))
    assert spans[1].start_s == spans[0].end_s
    assert spans[1].end_s - spans[1].start_s == pytest.approx(SLOWDOWN * step_s)
    # While the step ran the copy went at 1/1.5 of its speed: it lost a third of that time.
    late_s = SLOWDOWN * step_s / 3
    assert spans[2].end_s == pytest.approx(2 * copy_s + late_s)
    # The second step begins when nothing is copied any more, but what it takes came from disk.
    assert spans[3].end_s == pytest.approx(2 * copy_s + late_s + SLOWDOWN * step_s)
    # When the plan follows itself, the second step runs beside the first copy of the next round.
    assert plan_seconds(PLAN, TWO, MACHINE, cost) == pytest.approx(2 * copy_s + 2 * late_s)


def test_planning_sees_all_steps_beside_copies() -> None:
    cost = LearnedCost(coefficients())
    for alone, factor in ((cost, SLOWDOWN), (Roofline(), physical_slowdown(MACHINE))):
        beside = BesideCopies(alone)
        assert beside.seconds(Run("first"), TWO, MACHINE) == pytest.approx(
            factor * alone.seconds(Run("first"), TWO, MACHINE)
        )
        copy = Copy("a", "nvme", "device")
        assert beside.seconds(copy, TWO, MACHINE) == alone.seconds(copy, TWO, MACHINE)
    # Where the device has memory of its own, reading takes nothing from it.
    apart = tiny_machine(host=1 << 20)
    beside = BesideCopies(Roofline())
    assert beside.seconds(Run("first"), TWO, apart) == Roofline().seconds(Run("first"), TWO, apart)


def test_what_nobody_measured_follows_from_the_rates() -> None:
    # 1 GB/s of 1 GB/s leaves nothing; 0.1 GB/s leaves four fifths, less what checking takes.
    assert physical_slowdown(tiny_machine(nvme_bytes_per_s=1e9)) == 3.0
    found = physical_slowdown(tiny_machine(nvme_bytes_per_s=1e8))
    assert found == pytest.approx(1 / (0.8 * (1 - 0.1 / 2.8)))


def test_features_are_what_a_step_touches() -> None:
    made = program(
        [
            array("x", "activation", 4),
            array("table", "weight", 1000),
            array("w", "weight", 100),
            array("c", "cache", 50),
            array("y", "activation", 4),
        ],
        [
            Step("product", "k#3", ("x", "w"), ("y",), ("c",), flops=260),
            Step("look up", "k", ("x", "table"), ("y",), flops=0),
        ],
        ["y"],
    )
    product = run_features(made.step("product"), made)
    assert (product.kind, product.dtype, product.rows) == ("k", "float32", 1)
    assert (product.weight_flops, product.other_flops) == (200, 60)
    assert (product.weight_bytes, product.cache_bytes, product.value_bytes) == (400, 200, 32)
    # No arithmetic, so next to nothing of the table is touched.
    assert run_features(made.step("look up"), made).weight_bytes == 0
    assert [row_class(rows) for rows in (1, 2, 8, 9, 16, 256, 257)] == [0, 1, 1, 2, 2, 6, 7]


def test_codes_are_weights_of_up_to_two_numbers_in_a_byte() -> None:
    made = program(
        [
            array("x", "activation", 128),
            dataclasses.replace(array("codes", "weight", 16), shape=(2, 68), dtype="uint8"),
            array("bias", "weight", 2),
            array("y", "activation", 2),
        ],
        [Step("product", "k", ("x", "codes", "bias"), ("y",), flops=512)],
        ["y"],
    )
    found = run_features(made.step("product"), made)
    assert (found.dtype, found.weight_flops, found.other_flops) == ("uint8", 512, 0)
    assert found.weight_bytes == 2 * 68 + 2 * 4


def test_drift_is_measured_over_predicted_and_has_a_band() -> None:
    cost = LearnedCost(coefficients())
    spans = simulate(PLAN, TWO, MACHINE, cost)
    for factor, out in ((1.0, False), (1.05, False), (3.0, True), (0.3, True)):
        slower = [Span(s.index, factor * s.start_s, factor * s.end_s) for s in spans]
        found = {one.lane: one for one in drifts(PLAN, TWO, MACHINE, cost, slower)}
        assert set(found) == {"compute", "nvme->device"}
        for one in found.values():
            # Overlaps are known to one digit.
            assert one.ratio == pytest.approx(factor, rel=0.05)
            assert one.out is out


# 4 MiB in 1,024 blocks over the link of `coefficients`.
COPY_S = 1e-4 + 1024 * 1e-5 + 4 * (1 << 20) / 1e9


def drift_of(lane: str, times: list[tuple[float, float]], plan: Plan = PLAN) -> float:
    """Measured over predicted of a lane, for actions that were busy at these times."""
    spans = [Span(index, *time) for index, time in enumerate(times)]
    found = {
        one.lane: one for one in drifts(plan, TWO, MACHINE, LearnedCost(coefficients()), spans)
    }
    return found[lane].ratio


def test_drift_is_of_seconds_that_were_measured() -> None:
    times = [(0.0, 0.03), (0.1, 0.3), (0.4, 0.44), (0.5, 0.8)]
    assert drift_of("nvme->device", times) == pytest.approx(0.07 / (2 * COPY_S))
    # Both steps take what came from disk, so they are predicted to be slow.
    alone_s = sum(LearnedCost(coefficients()).run_s(run_features(one, TWO)) for one in TWO.steps)
    assert drift_of("compute", times) == pytest.approx(0.5 / (SLOWDOWN * alone_s))


def test_a_transfer_that_seems_to_take_no_time_was_made_beside_the_one_before() -> None:
    times = [(0.0, 0.03), (0.1, 0.3), (0.03, 0.03), (0.5, 0.8)]
    assert drift_of("nvme->device", times) == pytest.approx(0.03 / (2 * COPY_S))


def test_a_transfer_under_way_at_the_end_is_no_part_of_drift() -> None:
    first_copy, first, second_copy, second = PLAN.actions
    plan = dataclasses.replace(PLAN, actions=(first_copy, first, second, second_copy))
    times = [(0.0, 0.03), (0.1, 0.3), (0.5, 0.8), (0.6, 0.8)]
    assert drift_of("nvme->device", times, plan) == pytest.approx(0.03 / COPY_S)


def test_steps_whose_ends_nobody_saw_are_no_part_of_drift() -> None:
    def lanes(*runs: Span) -> set[str]:
        spans = [Span(0, 0.0, 0.03), *runs]
        found = drifts(PLAN, TWO, MACHINE, LearnedCost(coefficients()), spans)
        return {one.lane for one in found}

    assert lanes(Span(1, 0.1, 0.3), Span(3, 0.4, 0.5)) == {"compute", "nvme->device"}
    assert lanes(Span(1, 0.1, 0.3, 0.1), Span(3, 0.4, 0.5, 0.1)) == {"nvme->device"}
    # Of fused steps nobody knows what each of them took.
    assert lanes(Span(1, 0.1, 0.3), Span(3, 0.3, 0.3)) == set()
    assert lanes() == set()


def test_of_many_equal_steps_all_count_in_drift() -> None:
    """Nine take a second each, the tenth 91 of them: ten seconds on average."""
    steps = [Step(f"s{i}", "layer", ("x",), (f"h{i}",)) for i in range(10)]
    values = [array(f"h{i}", "activation", 1) for i in range(10)]
    many = program([array("x", "input", 1), *values], steps, ["h9"])
    plan = Plan(many.digest, MACHINE.digest, (), tuple(Run(step.name) for step in steps), ())
    spans = [Span(i, 100.0 * i, 100.0 * i + (91 if i == 9 else 1)) for i in range(10)]
    cost = LearnedCost(coefficients())
    (found,) = drifts(plan, many, MACHINE, cost, spans)
    assert found.ratio == pytest.approx(10 / cost.run_s(run_features(steps[0], many)))


def test_both_ends_of_the_band_are_told_as_what_they_are() -> None:
    assert str(Drift("compute", 3.0, 1.25)) == (
        "compute took 3.00 times what was predicted, and at most 1.25 was expected"
    )
    assert str(Drift("compute", 0.3, 1.25)) == (
        "compute took 0.30 times what was predicted, and at least 0.80 was expected"
    )


def test_a_file_comes_back_as_it_was_and_is_small(tmp_path: Path) -> None:
    toml = tmp_path / "laptop.toml"
    found = coefficients()
    file = write_cost(found, toml)
    assert file == cost_file(toml) == tmp_path / "laptop.cost.json"
    assert file.stat().st_size < 6000
    assert list(tmp_path.iterdir()) == [file]
    cost = cost_beside(toml, MACHINE)
    assert isinstance(cost, LearnedCost)
    assert to_json(cost.coefficients) == to_json(found)
    one = run_features(TWO.step("first"), TWO)
    assert cost.run_s(one) == pytest.approx(LearnedCost(found).run_s(one), rel=1e-3)


def test_a_machine_without_a_file_has_its_rates(tmp_path: Path) -> None:
    assert isinstance(cost_beside(tmp_path / "laptop.toml", MACHINE), Roofline)


def test_a_file_of_another_machine_is_refused_whatever_the_budgets(tmp_path: Path) -> None:
    toml = tmp_path / "laptop.toml"
    write_cost(coefficients(), toml)
    roomy = MACHINE.with_capacities({"device": 1 << 30})
    assert isinstance(cost_beside(toml, roomy), LearnedCost)
    faster = tiny_machine(flops_per_s=1e12, nvme_bytes_per_s=1e9)
    with pytest.raises(
        DamagedError, match=r"laptop.cost.json: fitted for rates .* calibrate again"
    ):
        cost_beside(toml, faster)


def changed(**values: Any) -> bytes:
    return json.dumps(json.loads(to_json(coefficients())) | values).encode()


def inside(key: str, **values: Any) -> bytes:
    found = json.loads(to_json(coefficients()))
    return changed(**{key: found[key] | values})


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not JSON"),
        (b"[]", "must be an object"),
        (b"[" * 100_000, "not JSON"),
        (b" " * (300 << 10), "larger than"),
        (changed(version=2), "version 2 is unknown"),
        (changed(more=1), "'more' is one too many or missing"),
        (changed(machine="xyz"), "machine must be 16 hexadecimal"),
        (changed(dtypes=[]), "dtypes must not be empty"),
        (changed(dtypes=["bfloat16", "text"]), "dtype 'text' is unknown"),
        *[
            (changed(dtypes=[name]), f"dtype '{name}' is unknown")
            for name in (",", "O", "V0", "f4,f4", "f4", "float32 ", "i8", "complex64")
        ],
        (changed(kinds=["a", "a"]), "kinds must differ"),
        (changed(kinds=["a"]), "run kind must have|run kind must be a list"),
        (changed(cases=-1), "cases must be a whole number"),
        (inside("run", overhead_s=float("nan")), "run overhead_s must be a number"),
        (inside("run", overhead_s=True), "run overhead_s must be a number"),
        (inside("run", overhead_s=10**400), "run overhead_s must be a number"),
        (inside("run", overhead_s=float("-inf")), "run overhead_s must be a number"),
        (inside("run", slope=[1e9] * 5), "run slope must be a number"),
        (inside("margins", **{"0.9": [0.1]}), "margins must have 5 entries"),
        (inside("margins", **{"0.90": [0.1] * 5}), "a quantile is written 0.9"),
        (inside("links", **{"a->b": {}}), "link 'a->b' must have the keys"),
        (
            inside(
                "links",
                **{
                    "a->b": {
                        "profile_bytes_per_s": 1,
                        "latency_s": 0,
                        "block_s": 0,
                        "bytes_per_s": 0,
                        "slowdown": 1,
                        "margins": {"0.9": 1},
                    }
                },
            ),
            "bytes_per_s must be a number from 1",
        ),
    ],
)
def test_a_damaged_file_is_refused(body: bytes, says: str) -> None:
    with pytest.raises(DamagedError, match=says):
        from_json(body)
