"""No plain way is faster than what is planned, and less time for planning makes no wrong plan."""

import dataclasses

import numpy as np
import pytest
from decoders import computer, decoder, tower
from programs import TINY, random_program, tiny_machine

from memsched.cost import CostModel, Roofline, plan_seconds
from memsched.cost.contention import BesideCopies
from memsched.errors import DoesNotFitError, ProgramError
from memsched.machine import HOST, NVME, Machine
from memsched.passes.baselines import baselines
from memsched.passes.compile import compile_phases, compile_plan
from memsched.passes.effort import Effort, effort_of
from memsched.plan import Action, Plan, Run
from memsched.program import Program
from memsched.referee import verify

LAYERS = 8
DECODER = decoder(layers=LAYERS)
PHASES = {
    "vision": tower(layers=4),
    "prefill": decoder(layers=LAYERS, tokens=256, with_head=False),
    "decode": DECODER,
}


def laptop(device: int, host: int | None) -> Machine:
    """Two links about equally busy: a disk, and a bus not much faster."""
    machine = computer(device=device, host=host)
    rates = {(NVME, HOST): 1.6e9, (HOST, "device"): 2.8e9}
    links = tuple(
        dataclasses.replace(
            link, bytes_per_s=rates.get((link.source, link.target), link.bytes_per_s)
        )
        for link in machine.links
    )
    return dataclasses.replace(machine, links=links)


MACHINES = {
    "bus and disk": laptop(500_000_000, 600_000_000),
    "disk": laptop(400_000_000, 300_000_000),
    "bus": laptop(600_000_000, 3_000_000_000),
    "no host": laptop(700_000_000, None),
    "plenty": laptop(4_000_000_000, None),
}


def seconds(plan: Plan, program: Program, machine: Machine) -> float:
    return plan_seconds(plan, program, machine, Roofline())


@pytest.mark.parametrize("key", MACHINES)
def test_the_phase_repeated_most_is_as_fast_as_alone_and_as_any_plain_way(key: str) -> None:
    machine = MACHINES[key]
    plan = compile_phases(PHASES, machine)["decode"]
    verify(plan, DECODER, machine)
    together_s = seconds(plan, DECODER, machine)
    assert together_s <= seconds(compile_plan(DECODER, machine), DECODER, machine) * (1 + 1e-9)
    ways = baselines(DECODER, machine)
    assert len(ways) == (1 if key == "plenty" else 7)
    for name, way in ways.items():
        assert way.seconds >= together_s * (1 - 1e-9), name
        if way.plan is not None:
            verify(way.plan, DECODER, machine)


@pytest.mark.parametrize("seed", range(40))
def test_no_plain_way_beats_the_last_of_random_phases(seed: int) -> None:
    rng = np.random.default_rng(seed)
    made = random_program(rng, steps=int(rng.integers(2, 10)), weights=int(rng.integers(3, 9)))
    host = [None, int(rng.integers(600, 4000))][seed % 2]
    machine = tiny_machine(device=int(rng.integers(900, 2500)), host=host)
    try:
        plans = compile_phases({"again": made, "last": made}, machine)
    except DoesNotFitError as error:
        machine = machine.with_capacities(error.smallest)
        plans = compile_phases({"again": made, "last": made}, machine)
    took_s = seconds(plans["last"], made, machine)
    verify(plans["last"], made, machine)
    for name, way in baselines(made, machine).items():
        assert way.seconds >= took_s * (1 - 1e-9), name


@pytest.mark.parametrize("key", ["bus and disk", "no host"])
def test_less_time_for_planning_tries_less_and_still_beats_plain_ways(key: str) -> None:
    machine = MACHINES[key]
    took = []
    for plan_s in (0.0, 0.02, 0.2, None):
        plan = compile_plan(DECODER, machine, plan_seconds=plan_s)
        verify(plan, DECODER, machine)
        assert plan == compile_plan(DECODER, machine, plan_seconds=plan_s)
        took.append(seconds(plan, DECODER, machine))
        for name, way in baselines(DECODER, machine, plan_seconds=plan_s).items():
            assert way.seconds >= took[-1] * (1 - 1e-9), name
    assert took[-1] == min(took) < took[0]


def test_effort_is_a_share_of_the_usual_one() -> None:
    usual = Effort()
    assert effort_of(None) == effort_of(1e6) == usual
    none = effort_of(0.0)
    assert dataclasses.astuple(none) == (0, 0, 0, 0, 0)
    some, more = effort_of(0.1), effort_of(0.2)
    assert 0 < some.search < more.search < usual.search
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ProgramError, match="0 seconds or more"):
            compile_plan(TINY["decode"](), tiny_machine(device=2000), plan_seconds=wrong)


class Slowing(Roofline):
    """Steps take twice as long beside copies, copies 1.2 times as long beside steps."""

    def slowdown(self, action: Action, program: Program, machine: Machine) -> float:
        return 2.0 if isinstance(action, Run) else 1.2


def judged(machine: Machine, made: Program, cost: CostModel) -> tuple[float, dict[str, float]]:
    """Seconds of the plan and of plain ways by a cost model that planning takes for simpler."""
    seen = BesideCopies(cost)
    plan = compile_phases({"": made}, machine, seen, predicted_by=cost)[""]
    verify(plan, made, machine)
    ways = baselines(made, machine, seen, predicted_by=cost)
    for way in ways.values():
        if way.plan is not None:
            assert way.seconds >= plan_seconds(way.plan, made, machine, cost) * (1 - 1e-9)
    seconds = {name: way.seconds for name, way in ways.items()}
    return plan_seconds(plan, made, machine, cost), seconds


def fast_disk(share: float) -> Machine:
    """Memory for so much of the weights, and a disk that is busy for a part of a round only."""
    whole = sum(DECODER.arrays[name].nbytes for name in DECODER.of_kind("weight"))
    machine = laptop(int(share * whole), None)
    links = tuple(dataclasses.replace(link, bytes_per_s=8e9) for link in machine.links)
    return dataclasses.replace(machine, links=links)


@pytest.mark.parametrize("share", [0.85, 0.99])
def test_plans_that_planning_takes_for_alike_are_told_apart(share: float) -> None:
    machine, cost = fast_disk(share), Slowing()
    took_s, ways = judged(machine, DECODER, cost)
    assert took_s <= min(ways.values()) * (1 + 1e-9)
    by_planning = compile_phases({"": DECODER}, machine, BesideCopies(cost))[""]
    assert took_s < 0.9 * plan_seconds(by_planning, DECODER, machine, cost)


@pytest.mark.parametrize("cost", [Slowing(), Roofline()], ids=["slowing", "rates"])
@pytest.mark.parametrize("seed", range(10))
def test_no_plain_way_is_faster_for_random_programs_where_steps_are_slowed(
    seed: int, cost: CostModel
) -> None:
    rng = np.random.default_rng(seed)
    made = random_program(rng, steps=int(rng.integers(2, 10)), weights=int(rng.integers(3, 9)))
    machine = tiny_machine(device=int(rng.integers(900, 2500)))
    try:
        took_s, ways = judged(machine, made, cost)
    except DoesNotFitError as error:
        took_s, ways = judged(machine.with_capacities(error.smallest), made, cost)
    assert took_s <= min(ways.values()) * (1 + 1e-9)
