"""No pass makes a valid plan invalid, or slower by prediction: each on random programs."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from programs import random_layers, random_program, tiny_machine, training

from memsched.cost import Remembered, Roofline, plan_seconds
from memsched.errors import DoesNotFitError
from memsched.machine import HOST, NVME, Machine
from memsched.passes.budgets import fastest, host_room
from memsched.passes.caching import better_cached
from memsched.passes.effort import Effort
from memsched.passes.lower.values import largest_value_bytes, value_actions, value_budgets
from memsched.passes.needs import Needs, read_needs
from memsched.passes.orders import reordered
from memsched.passes.recipes import Room, read_room
from memsched.passes.refine import refined
from memsched.passes.remat import rematerialised
from memsched.passes.remat_greedy import greedy_order
from memsched.passes.remat_order import Order, repeatable, unroll
from memsched.passes.remat_polish import peak_bytes, polished, read_runs
from memsched.passes.search import SAME, Found, search, tail_spill
from memsched.passes.tune import tuned
from memsched.plan import Copy, Free, Plan
from memsched.program import Program
from memsched.referee import verify

COST = Roofline()
EVERYTHING = 1 << 20
LITTLE, TWO_STARTS = Effort(0, 0, 0, 0, 0), Effort(0, 0, 0, 2, 0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A program on a machine, the first plan there is for it, and the room of its weights."""

    needs: Needs
    found: Found
    room: Room


def started(needs: Needs) -> Case:
    """The plainest plan, tried in few sizes of rings: there is something to gain."""
    host = 0 if needs.machine.device_is_host else needs.machine.tier(HOST).capacity_bytes
    values = value_actions(
        needs,
        min(value_budgets(needs).relaxed, needs.device_capacity_bytes - needs.largest_step_bytes),
        max(0, host - max(needs.host_bytes[name] for name in needs.weights)),
        needs.machine.tier(NVME).capacity_bytes,
    )
    device_bytes = needs.device_capacity_bytes - values.device_bytes
    room = read_room(needs, device_bytes, host_room(needs, values), repeat=True)
    found = tail_spill(needs, values, room, LITTLE)
    if found is None:
        raise DoesNotFitError("no ring is small enough", {})
    return Case(needs, found, room)


def searched(case: Case) -> tuple[Plan, Plan]:
    found = search(case.needs, case.found, case.found.values, case.room, LITTLE)
    assert found is not None
    return case.found.plan, found.plan


def refined_from(case: Case) -> tuple[Plan, Plan]:
    found = refined(case.needs, case.found, case.room.device_bytes, repeat=True)
    return case.found.plan, found.plan


def reordered_from(case: Case) -> tuple[Plan, Plan]:
    rooms = [(case.found.values, case.room)]
    found = reordered(case.needs, case.found, rooms, most_orders=2000)
    return case.found.plan, found.plan


def tuned_from(case: Case) -> tuple[Plan, Plan]:
    found = tuned(
        case.needs,
        case.found,
        case.room.device_bytes,
        case.room.host_bytes,
        repeat=True,
        most_actions=2000,
    )
    return case.found.plan, found.plan


def cached(case: Case) -> tuple[Plan, Plan]:
    return case.found.plan, better_cached(case.needs, case.found, repeat=True)


def computed_again(case: Case) -> tuple[Plan, Plan]:
    return case.found.plan, rematerialised(case.needs, lambda needs: started(needs).found.plan)


def placed(case: Case) -> tuple[Plan, Plan]:
    """With what integer programming proposes, and without."""
    before = fastest(case.needs, repeat=True, effort=LITTLE)
    return before.plan, fastest(case.needs, repeat=True, effort=TWO_STARTS).plan


Change = Callable[[Case], tuple[Plan, Plan]]
# For each pass its programs, and how many of them get faster at least.
PASSES: dict[str, tuple[Change, tuple[str, ...], int]] = {
    "search": (searched, ("steps", "layers"), 4),
    "refine": (refined_from, ("steps", "training"), 10),
    "orders": (reordered_from, ("steps",), 12),
    "tune": (tuned_from, ("steps", "layers"), 8),
    "cache": (cached, ("steps", "layers"), 8),
    "remat": (computed_again, ("steps", "training"), 6),
    "starts": (placed, ("layers",), 2),
}
SEEDS = {"steps": 40, "layers": 8, "training": 16}


def needs_of(program: Program, machine: Machine) -> Needs:
    return read_needs(program, machine, Remembered(COST))


def drawn(rng: np.random.Generator, made: Program) -> Case:
    """A machine with room for a part of the program, on which steps wait for weights."""
    whole = needs_of(made, tiny_machine())
    budgets = value_budgets(whole)
    least = whole.largest_step_bytes + budgets.spilled
    device = int(rng.uniform(least, whole.weights_bytes + budgets.tight))
    sizes = [whole.host_bytes[name] for name in whole.weights]
    host = [None, int(rng.uniform(2 * max(sizes), 2 * max(sizes) + sum(sizes)))]
    rate = sum(sizes) / sum(whole.step_s) / rng.uniform(0.5, 4)
    machine = tiny_machine(
        device=device,
        host=host[int(rng.integers(2))],
        nvme_bytes_per_s=rate,
        host_bytes_per_s=rate * rng.uniform(1, 4),
    )
    return started(needs_of(made, machine))


def made_of(kind: str, rng: np.random.Generator) -> Program:
    if kind == "layers":
        return random_layers(rng)
    if kind == "training":
        return training(int(rng.integers(3, 8)))
    return random_program(rng, steps=8, weights=8)


def cases(kind: str) -> Iterator[Case]:
    for seed in range(SEEDS[kind]):
        rng = np.random.default_rng(seed)
        try:
            yield drawn(rng, made_of(kind, rng))
        except DoesNotFitError:
            continue


@pytest.mark.parametrize("name", PASSES)
def test_no_pass_makes_a_plan_invalid_or_slower(name: str) -> None:
    change, kinds, least = PASSES[name]
    tried = faster = 0
    for case in itertools.chain.from_iterable(map(cases, kinds)):
        program, machine = case.needs.program, case.needs.machine
        before, after = change(case)
        verify(before, program, machine)
        verify(after, program, machine)
        before_s = plan_seconds(before, program, machine, COST)
        after_s = plan_seconds(after, program, machine, COST)
        assert after_s <= before_s * SAME
        tried += 1
        faster += after_s * SAME < before_s
    assert tried >= 0.9 * sum(SEEDS[kind] for kind in kinds)
    assert faster >= least


def with_repeats(rng: np.random.Generator, needs: Needs) -> Order:
    """Steps that run again because there is little room, and some once more for nothing."""
    budgets = value_budgets(needs)
    room_bytes = int(rng.uniform(budgets.spilled, budgets.tight))
    order = list(greedy_order(needs, room_bytes, 1.0) or range(len(needs.program.steps)))
    for index in sorted(repeatable(needs.program)):
        for _ in range(int(rng.integers(2))):
            order.insert(int(rng.integers(order.index(index) + 1, len(order) + 1)), index)
    return tuple(order)


@pytest.mark.parametrize("kind", ["steps", "training"])
def test_a_polished_order_needs_no_more_memory_and_no_more_time(kind: str) -> None:
    shorter = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        program = made_of(kind, rng)
        needs = needs_of(program, tiny_machine())
        sizes = {
            name: needs.device_bytes[name]
            for name, array in program.arrays.items()
            if array.kind != "weight"
        }
        runs, order = read_runs(program, sizes, needs.step_s), with_repeats(rng, needs)
        room_bytes = peak_bytes(runs, order)
        better = polished(runs, order, room_bytes)
        shorter += len(better) < len(order)
        # All weights have room beside what the order needs; in less, steps would wait for ever.
        device_bytes = needs.weights_bytes + room_bytes
        machine = tiny_machine(device=device_bytes, nvme=0, nvme_bytes_per_s=1.0)
        took_s = []
        for one in (order, better):
            unrolled = unroll(program, one)
            cost = Remembered(unrolled.cost(COST, program))
            found = fastest(read_needs(unrolled.program, machine, cost), repeat=True)
            plan = unrolled.rolled_up(found.plan, program)
            verify(plan, program, machine)
            took_s.append(plan_seconds(plan, program, machine, COST))
        assert took_s[1] <= took_s[0] * SAME
    assert shorter >= 5


@pytest.mark.parametrize("seed", range(20))
def test_values_take_as_much_of_the_host_as_is_said(seed: int) -> None:
    made = random_program(np.random.default_rng(seed), steps=8, weights=8)
    needs = needs_of(made, tiny_machine(host=EVERYTHING))
    budget = value_budgets(needs).spilled
    for room in range(largest_value_bytes(needs), 2000, 64):
        values = value_actions(needs, budget, room, EVERYTHING)
        held = most = 0
        for action in itertools.chain.from_iterable(values.before):
            if isinstance(action, Copy) and action.target == HOST:
                held += needs.host_bytes[action.array]
            elif isinstance(action, Free) and action.tier == HOST:
                held -= needs.host_bytes[action.array]
            most = max(most, held)
        assert most <= values.host_bytes <= room
