"""Phases agree on what they share."""

import functools
import itertools
from collections.abc import Mapping

import pytest
from decoders import computer, decoder, tower
from programs import TINY, array, program, tiny_machine

from memsched.cost import Roofline, is_steady, plan_seconds
from memsched.errors import DoesNotFitError, ProgramError
from memsched.machine import DEVICE, HOST, Machine
from memsched.passes.bridge import bridge, stays_idle
from memsched.passes.compile import compile_phases, compile_plan
from memsched.plan import Copy, Plan, Residence, Run
from memsched.program import Program, Step
from memsched.referee import verify, verify_hand_over

PHASES = {
    "vision": tower(),
    "prefill": decoder(tokens=512, with_head=False),
    "decode": decoder(),
}
ARRAYS = {name: spec for made in PHASES.values() for name, spec in made.arrays.items()}
MACHINES = {
    "2 GB": computer(device=2_000_000_000),
    "1 GB": computer(device=1_000_000_000),
    "everything": computer(device=6_000_000_000),
    "card": computer(device=2_000_000_000, host=2_000_000_000),
}


def kept(plan: Plan, tier: str = DEVICE) -> dict[str, int | None]:
    """Weights that rest in a tier and never move, with their offsets."""
    moved = {one.array for one in plan.actions if isinstance(one, Copy) and one.target == tier}
    return {
        rest.array: rest.offset
        for rest in plan.entry
        if rest.tier == tier and ARRAYS[rest.array].kind == "weight" and rest.array not in moved
    }


@functools.cache
def planned(key: str) -> Mapping[str, Plan]:
    return compile_phases(PHASES, MACHINES[key])


@pytest.mark.parametrize("key", MACHINES)
def test_phases_hand_their_weights_over(key: str) -> None:
    plans, machine = planned(key), MACHINES[key]
    assert list(plans) == list(PHASES)
    peaks = {key: verify(plans[key], made, machine) for key, made in PHASES.items()}
    assert all(is_steady(plans[key], made) for key, made in PHASES.items())
    for one, other in itertools.combinations(plans.values(), 2):
        for tier in (DEVICE, HOST):
            first, second = kept(one, tier), kept(other, tier)
            assert all(first[name] == second[name] for name in first.keys() & second.keys())
    # Prefill keeps of the layers what decode keeps, as far as it has room, before anything else.
    prefill, decode = kept(plans["prefill"]), kept(plans["decode"])
    layers = {name for name in decode if name in PHASES["prefill"].arrays}
    assert prefill.keys() <= layers or layers <= prefill.keys()
    moved = moved_between(plans, peaks, machine)
    assert sum(moved[3:]) < sum(moved[:3])
    assert key != "everything" or moved[3:] == [0, 0, 0]


def moved_between(
    plans: Mapping[str, Plan], peaks: Mapping[str, Mapping[str, int]], machine: Machine
) -> list[int]:
    """Bytes copied before each phase of two requests."""
    state: tuple[Residence, ...] = ()
    moved = []
    for key in [*PHASES, *PHASES]:
        made, plan = PHASES[key], plans[key]
        idle = stays_idle(state, plan, made, peaks[key], ARRAYS, machine)
        rests = tuple(one for one in plan.entry if one.tier != "nvme")
        wanted = (*(one for one in rests if ARRAYS[one.array].kind == "weight"), *idle)
        order = [name for step in made.steps for name in step.reads]
        crossing, crossing_plan = bridge(state, wanted, ARRAYS, machine, order)
        verify(crossing_plan, crossing, machine)
        verify_hand_over(crossing_plan, plan, set(made.arrays) & set(crossing.arrays))
        copies = [one for one in crossing_plan.actions if isinstance(one, Copy)]
        moved.append(sum(ARRAYS[one.array].nbytes for one in copies))
        state = wanted
    return moved


@pytest.mark.parametrize("key", ["2 GB", "card"])
def test_the_phase_repeated_most_loses_nothing_to_the_others(key: str) -> None:
    plans, machine = planned(key), MACHINES[key]
    alone = compile_plan(PHASES["decode"], machine)
    made = PHASES["decode"]
    together_s = plan_seconds(plans["decode"], made, machine, Roofline())
    assert together_s <= 1.02 * plan_seconds(alone, made, machine, Roofline())


def test_phases_that_compute_long_stream_for_nothing() -> None:
    plans, machine = planned("2 GB"), MACHINES["2 GB"]
    for key in ("vision", "prefill"):
        made = PHASES[key]
        compute = sum(Roofline().seconds(Run(step.name), made, machine) for step in made.steps)
        assert plan_seconds(plans[key], made, machine, Roofline()) < 1.1 * compute


def test_a_single_phase_is_a_plan_and_wrong_levels_are_refused() -> None:
    machine = tiny_machine(device=2000)
    plans = compile_phases({"only": TINY["decode"]()}, machine)
    verify(plans["only"], TINY["decode"](), machine)
    with pytest.raises(ProgramError, match="level 'aggressive' is unknown"):
        compile_phases({"only": TINY["decode"]()}, machine, level="aggressive")


@pytest.mark.parametrize("device", [1100, 1400, 1800, 2600])
@pytest.mark.parametrize("host", [None, 900])
def test_tiny_phases_share_a_weight_in_every_budget(device: int, host: int | None) -> None:
    first = shared_chain(["a", "b", "c"], values=40)
    second = shared_chain(["b", "c", "d"], values=20)
    machine = tiny_machine(device=device, host=host)
    try:
        plans = compile_phases({"first": first, "second": second}, machine)
    except DoesNotFitError:
        assert device < 1200
        return
    verify(plans["first"], first, machine)
    verify(plans["second"], second, machine)


def shared_chain(names: list[str], values: int) -> Program:
    states = [f"h{index}" for index in range(len(names) + 1)]
    return program(
        [array(states[0], "input", values)]
        + [array(name, "activation", values) for name in states[1:]]
        + [array(name, "weight", 100) for name in names],
        [
            Step(f"s{i}", "k", (states[i], name), (states[i + 1],), flops=100)
            for i, name in enumerate(names)
        ],
        [states[-1]],
    )
