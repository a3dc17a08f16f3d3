"""Programs of few weights, of which all orders are tried: budgets, plain ways, and time."""

import time

import numpy as np
import pytest
from programs import array, program, tiny_machine

from memsched.cost import Roofline, plan_seconds
from memsched.errors import DoesNotFitError
from memsched.machine import Machine
from memsched.passes.baselines import baselines
from memsched.passes.compile import compile_plan
from memsched.passes.orders import FEW
from memsched.plan import Plan
from memsched.program import Program, Step
from memsched.referee import verify


def few_weights(seed: int, count: int, least_values: int = 0) -> Program:
    """Weights of random sizes, some of no bytes; steps read up to four of them, in any order."""
    rng = np.random.default_rng(seed)
    sizes = [16 * int(lines) for lines in rng.integers(least_values, 40, count)]
    steps, states = [], ["h0"]
    for index in range(int(rng.integers(2, 9))):
        chosen = rng.choice(count, int(rng.integers(1, min(count, 4) + 1)), replace=False)
        states.append(f"h{index + 1}")
        reads = (states[-2], *(f"w{one}" for one in chosen))
        flops = int(rng.integers(1, 2000))
        steps.append(Step(f"s{index}", "k", reads, (states[-1],), flops=flops))
    read = {name for step in steps for name in step.inputs}
    arrays = [array("h0", "input", 1)]
    arrays += [array(name, "activation", int(rng.integers(1, 60))) for name in states[1:]]
    arrays += [array(f"w{i}", "weight", n) for i, n in enumerate(sizes) if f"w{i}" in read]
    return program(arrays, steps, [states[-1]])


def machine_for(made: Program, seed: int) -> Machine:
    """With room for a part of its weights; with a host tier or without."""
    rng = np.random.default_rng(seed)
    weights = sum(made.arrays[name].nbytes for name in made.of_kind("weight"))
    device = max(600, int(weights * rng.uniform(0.4, 1.2))) // 64 * 64
    return tiny_machine(device=device, host=1 << 20 if seed % 2 else None)


def planned(made: Program, machine: Machine) -> tuple[Plan, Machine]:
    """A plan, and the machine; with the least that would do where it has less."""
    try:
        return compile_plan(made, machine), machine
    except DoesNotFitError as error:
        enough = machine.with_capacities(error.smallest)
        return compile_plan(made, enough), enough


@pytest.mark.parametrize("seed", range(60))
def test_plans_of_few_weights_keep_their_budgets_and_no_plain_way_is_faster(seed: int) -> None:
    made = few_weights(seed, 1 + seed % FEW)
    plan, machine = planned(made, machine_for(made, seed))
    verify(plan, made, machine)
    seconds = plan_seconds(plan, made, machine, Roofline())
    for name, other in baselines(made, machine).items():
        assert seconds <= other.seconds * (1 + 1e-6), name


@pytest.mark.parametrize("device", [1152, 1216, 1300, 1400])
@pytest.mark.parametrize("host", [None, 1 << 20])
def test_a_weight_of_no_bytes_does_not_make_room_for_others(device: int, host: int | None) -> None:
    sizes = (100, 200, 0)
    states = ["h0", "h1", "h2", "h3"]
    made = program(
        [array("h0", "input", 1), *(array(name, "activation", 1) for name in states[1:])]
        + [array(f"w{i}", "weight", values) for i, values in enumerate(sizes)],
        [
            Step(f"s{i}", "k", (states[i], f"w{i}"), (states[i + 1],), flops=1000)
            for i in range(len(sizes))
        ],
        ["h3"],
    )
    machine = tiny_machine(device=device, host=host)
    verify(compile_plan(made, machine), made, machine)


def test_trying_ends_in_time_however_often_weights_are_read() -> None:
    # Without a limit for looking for offsets some of these took 7 s.
    longest_s = 0.0
    for seed in range(40):
        made = few_weights(seed, FEW, least_values=1)
        machine = machine_for(made, 2 * seed)
        start_s = time.process_time()
        planned(made, machine)
        longest_s = max(longest_s, time.process_time() - start_s)
    assert 0.0 < longest_s < 3.0
