"""The bound of a pass: never above a schedule, and worth what its prices say."""

import numpy as np
import pytest
from programs import naive_plan, random_program, tiny_machine
from random_plans import random_plan

from memsched.bound import least_busy_s, read_masses, solve
from memsched.cost import Roofline, is_steady, simulate_rounds
from memsched.machine import Machine
from memsched.plan import Plan, Run
from memsched.program import Program
from memsched.referee import verify

COST = Roofline()
PROGRAMS = 10_000
FIRST, SEVERAL = 4, 4


def long_run_s(plan: Plan, program: Program, machine: Machine) -> float:
    """Seconds of a round, in the mean over several after the first ones."""
    rounds = simulate_rounds(plan, program, machine, COST, FIRST + SEVERAL)
    last = [
        max(span.end_s for span in one if isinstance(plan.actions[span.index], Run))
        for one in rounds
    ]
    return (last[-1] - last[FIRST - 1]) / SEVERAL


def drawn(seed: int) -> tuple[np.random.Generator, Program, Machine]:
    rng = np.random.default_rng(seed)
    made = random_program(
        rng, steps=int(rng.integers(2, 9)), weights=int(rng.integers(1, 9)), most_values=60
    )
    host = [None, int(rng.integers(64, 3000))][seed % 2]
    rates = {"nvme_bytes_per_s": 10 ** rng.uniform(4, 7), "flops_per_s": 10 ** rng.uniform(5, 8)}
    machine = tiny_machine(device=int(rng.integers(300, 3000)), host=host, **rates)
    return rng, made, machine


@pytest.mark.parametrize("part", range(10))
def test_no_random_plan_of_10_000_programs_beats_the_bound(part: int) -> None:
    steady = 0
    for seed in range(part, PROGRAMS, 10):
        rng, made, machine = drawn(seed)
        roomy = machine.with_capacities({tier.name: 1 << 20 for tier in machine.tiers})
        plan = random_plan(rng, made, roomy) if seed % 3 else naive_plan(made, roomy)
        # It is a schedule of any machine on which it fits, so of the smallest.
        tight = machine.with_capacities(verify(plan, made, roomy))
        if is_steady(plan, made):
            steady += 1
            masses = read_masses(made, tight, COST)
            bound = max(solve(masses).seconds, *least_busy_s(masses).values())
            assert bound <= long_run_s(plan, made, tight) * (1 + 1e-9), seed
    assert steady > PROGRAMS / 40
