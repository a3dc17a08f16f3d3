"""Groups of weights: the same programs in fewer pieces, and plans that are right in single ones."""

import dataclasses

import numpy as np
import pytest

from memsched.cost import Roofline
from memsched.cost.features import run_features
from memsched.machine import Compute, Link, Machine, Tier
from memsched.passes.baselines import baselines
from memsched.passes.compile import compile_phases, compile_plan
from memsched.passes.grouping import GROUPS, MOST_ALONE, group_weights
from memsched.plan import Copy, Run
from memsched.program import ArraySpec, Program, Step
from memsched.referee import verify

LAYERS, EXPERTS, EXPERT_BYTES = 3, 80, 500
WHOLE = LAYERS * EXPERTS * 512


def machine(device: int, *, tiers: int) -> Machine:
    near = [Tier("device", device, 1 << 40, 64)]
    links = [Link("nvme", "device", 1e6, 1e-5), Link("device", "nvme", 1e6)]
    if tiers == 3:
        near.append(Tier("host", WHOLE // 2, 1 << 40, 128))
        links = [
            *(Link("nvme", "host", 1e6, 1e-5), Link("host", "nvme", 1e6)),
            *(Link("host", "device", 4e6, 1e-6), Link("device", "host", 4e6)),
        ]
    nvme = Tier("nvme", 1 << 40, 1 << 40, 64)
    return Machine("any", "cpu", (*near, nvme), tuple(links), Compute(1e9, 1e8))


def experts(layer: int) -> list[str]:
    return [f"layer{layer}.expert{index}" for index in range(EXPERTS)]


def program(tokens: int = 1) -> Program:
    names = [name for layer in range(LAYERS) for name in experts(layer)]
    arrays = {name: ArraySpec(name, (EXPERT_BYTES,), "uint8", "weight") for name in names}
    for layer in range(LAYERS + 1):
        kind = "input" if layer == 0 else "activation"
        arrays[f"x{layer}"] = ArraySpec(f"x{layer}", (tokens,), "float32", kind)
    steps = tuple(
        Step(f"s{layer}", "k", (f"x{layer}", *experts(layer)), (f"x{layer + 1}",), (), 1000, 64)
        for layer in range(LAYERS)
    )
    return Program(arrays, steps, (f"x{LAYERS}",))


def test_every_weight_is_in_one_group_or_alone() -> None:
    grouped = group_weights({"a": program(), "b": program(4)}, machine(WHOLE, tiers=2))
    members = [name for names in grouped.members.values() for name in names]
    assert sorted(members) == sorted(name for i in range(LAYERS) for name in experts(i))
    assert LAYERS < len(grouped.members) <= LAYERS * (GROUPS + 4)
    for coarse in grouped.programs.values():
        assert coarse.of_kind("weight") == tuple(grouped.members)
        for layer, step in enumerate(coarse.steps):
            assert [n for group in step.reads[1:] for n in grouped.members[group]] == experts(layer)
            assert step.reads[0] == f"x{layer}"
    for group, names in grouped.members.items():
        places = [grouped.shares[name] for name in names]
        assert places == [(512 * index, 512) for index in range(len(names))]
        assert grouped.programs["a"].arrays[group].nbytes == 512 * len(names)


def test_few_weights_stay_alone() -> None:
    whole = program()
    few = dataclasses.replace(whole.steps[0], reads=("x0", *experts(0)[:MOST_ALONE]))
    small = Program(whole.arrays, (few,), ("x1",))
    grouped = group_weights({"": small}, machine(WHOLE, tiers=2))
    assert grouped.members == {}
    assert grouped.programs[""] is small


def test_a_weight_that_another_phase_reads_at_another_time_is_not_in_the_group() -> None:
    whole = program()
    head = Step("head", "k", (experts(0)[0],), ("x1",), ())
    other = Program(whole.arrays, (head,), ("x1",))
    grouped = group_weights({"a": whole, "b": other}, machine(WHOLE, tiers=2))
    assert experts(0)[0] not in {n for names in grouped.members.values() for n in names}
    assert experts(0)[0] in grouped.programs["a"].steps[0].reads


@pytest.mark.parametrize("tiers", [2, 3])
@pytest.mark.parametrize("share", [0.45, 0.7, 0.95, 1.5])
def test_the_referee_accepts_plans_that_were_made_of_groups(share: float, tiers: int) -> None:
    here = machine(int(share * WHOLE), tiers=tiers)
    programs = {"many": program(4), "one": program()}
    for key, plan in compile_phases(programs, here).items():
        peaks = verify(plan, programs[key], here)
        assert peaks["device"] <= here.tier("device").capacity_bytes
    alone = compile_plan(programs["one"], here)
    verify(alone, programs["one"], here)
    copied = {action.array for action in alone.actions if isinstance(action, Copy)}
    assert bool(copied) == (share < 1)
    assert copied <= set(programs["one"].arrays)
    assert sum(isinstance(action, Run) for action in alone.actions) == LAYERS


def test_a_group_takes_the_time_of_its_members() -> None:
    here = machine(WHOLE, tiers=2)
    grouped = group_weights({"": program()}, here)
    cost = grouped.cost(Roofline())
    group, names = next(iter(grouped.members.items()))
    seconds = cost.seconds(Copy(group, "nvme", "device"), grouped.programs[""], here)
    assert seconds == pytest.approx(len(names) * (1e-5 + EXPERT_BYTES / 1e6))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "uint8"])
def test_a_step_computes_the_same_with_groups(dtype: str) -> None:
    whole, count = program(), 512 // np.dtype(dtype).itemsize
    weights = {name: ArraySpec(name, (count,), dtype, "weight") for name in whole.of_kind("weight")}
    steps = tuple(dataclasses.replace(step, flops=1 << 20) for step in whole.steps)
    whole = dataclasses.replace(whole, arrays={**whole.arrays, **weights}, steps=steps)
    coarse = group_weights({"": whole}, machine(WHOLE, tiers=2)).programs[""]
    assert len(coarse.arrays) < len(whole.arrays)
    for before, after in zip(whole.steps, coarse.steps, strict=True):
        assert run_features(after, coarse) == run_features(before, whole)


def test_plain_ways_are_predicted_of_groups_too() -> None:
    here = machine(int(0.7 * WHOLE), tiers=2)
    whole = program()
    ways = baselines(whole, here)
    assert {"tail spill", "lru", "clock", "adaptive"} <= set(ways)
    for way in ways.values():
        if way.plan is not None:
            verify(way.plan, whole, here)
