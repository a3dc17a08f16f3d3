"""The bound of a pass: never above a schedule, and for some programs hardly below one."""

from collections.abc import Sequence

import numpy as np
import pytest
from programs import naive_plan, random_layers, random_program, tiny_machine
from random_plans import random_round

from memsched.bound import least_busy_s, read_masses, solve
from memsched.cost import Roofline, is_steady, simulate_rounds
from memsched.machine import DEVICE, Machine
from memsched.passes.compile import compile_plan
from memsched.plan import Plan, Run
from memsched.program import Program
from memsched.referee import verify

COST = Roofline()
PARTS = 10
RANDOM, LAYERED = 9400, 600
FIRST, SEVERAL = 4, 4
EVERYTHING = 1 << 20
ROUNDING = 1 + 1e-9


def long_run_s(plan: Plan, program: Program, machine: Machine) -> float:
    """Seconds of a round, in the mean over several after the first ones."""
    rounds = simulate_rounds(plan, program, machine, COST, FIRST + SEVERAL)
    last = [
        max(span.end_s for span in one if isinstance(plan.actions[span.index], Run))
        for one in rounds
    ]
    return (last[-1] - last[FIRST - 1]) / SEVERAL


def measured_s(plan: Plan, program: Program, machine: Machine) -> tuple[float, float, float]:
    """Seconds of all steps, of the bound, and of a round of the plan."""
    # It is a schedule of any machine on which it fits, so of the smallest.
    tight = machine.with_capacities(verify(plan, program, machine))
    assert is_steady(plan, program)
    masses = read_masses(program, tight, COST)
    bound_s = max(solve(masses).seconds, *least_busy_s(masses).values())
    return masses.compute_s, bound_s, long_run_s(plan, program, tight)


@pytest.mark.parametrize("part", range(PARTS))
def test_no_plan_of_9400_random_programs_beats_the_bound(part: int) -> None:
    for seed in range(part, RANDOM, PARTS):
        rng = np.random.default_rng(seed)
        made = random_program(
            rng, steps=int(rng.integers(2, 9)), weights=int(rng.integers(1, 9)), most_values=60
        )
        host = [None, EVERYTHING][seed % 2]
        rates = {"nvme_bytes_per_s": 10 ** rng.uniform(4, 7)}
        machine = tiny_machine(host=host, flops_per_s=10 ** rng.uniform(5, 8), **rates)
        plan = random_round(rng, made, machine) if seed % 3 else naive_plan(made, machine)
        _, bound_s, took_s = measured_s(plan, made, machine)
        assert bound_s <= took_s * ROUNDING, seed


def some(rng: np.random.Generator, names: Sequence[str]) -> list[str]:
    """A random number of them, as far from each other as can be."""
    whole, count = len(names), int(rng.integers(len(names)))
    return [
        name
        for index, name in enumerate(names)
        if (index + 1) * count // whole > index * count // whole
    ]


@pytest.mark.parametrize("part", range(PARTS))
def test_plans_of_600_programs_of_layers_come_close_to_the_bound_and_never_beat_it(
    part: int,
) -> None:
    ratios, planned = [], 0
    for seed in range(part, LAYERED, PARTS):
        rng = np.random.default_rng(seed)
        made = random_layers(rng)
        nvme = 10 ** rng.uniform(3, 5)
        machine = tiny_machine(
            host=[None, EVERYTHING][seed // PARTS % 2],
            nvme_bytes_per_s=nvme,
            host_bytes_per_s=nvme * 10 ** rng.uniform(1, 3),
        )
        plans = [naive_plan(made, machine, some(rng, made.of_kind("weight")))]
        if seed // PARTS % 15 == 0:
            peaks = verify(plans[0], made, machine)
            tight = machine.with_capacities({DEVICE: peaks[DEVICE]})
            plans.append(compile_plan(made, tight, COST, plan_seconds=0.0))
            planned += 1
        for plan in plans:
            compute_s, bound_s, took_s = measured_s(plan, made, machine)
            assert bound_s <= took_s * ROUNDING, seed
            # Elsewhere it is not memory that sets the bound.
            if bound_s > compute_s * (1 + 1e-6):
                ratios.append(took_s / bound_s)
    assert planned >= 4
    assert len(ratios) >= 0.8 * LAYERED / PARTS
    assert sum(ratio < 1.05 for ratio in ratios) >= 8
