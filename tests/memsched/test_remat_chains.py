"""Chains there and back: against brute force over all schedules, and against a plain recursion."""

import functools
import heapq
import math

import numpy as np
import pytest
from programs import array, program, tiny_machine

from memsched.cost import Remembered, Roofline
from memsched.passes.lower.values import value_budgets
from memsched.passes.needs import Needs, read_needs
from memsched.passes.remat import best_order
from memsched.passes.remat_chain import as_chain
from memsched.program import Program, Step

UNIT = 64


def there_and_back(seed: int, layers: int, *, reads_result: bool, loose: bool = True) -> Program:
    """Layers with states, tapes, cotangents and gradients of random sizes, in units of 64 B."""
    rng = np.random.default_rng(seed)

    def some(low: int, high: int, count: int) -> list[int]:
        return [int(value) for value in rng.integers(low, high + 1, count)]

    state, tape = some(1, 4, layers), some(int(not loose), 4, layers)
    left = some(0, 1 if loose else 0, layers)
    cotangent = some(1, 3 if loose else 1, layers + 1)
    there, back = some(100, 1000, layers), some(200, 2000, layers)
    states = ["x", *(f"state{i + 1}" for i in range(layers))]
    arrays = [array("x", "input", 1)]
    arrays += [array(name, "activation", 16 * state[i]) for i, name in enumerate(states[1:])]
    arrays += [array(f"tape{i}", "activation", 16 * tape[i]) for i in range(layers)]
    arrays += [array(f"back{i}", "activation", 16 * cotangent[i]) for i in range(1, layers + 1)]
    arrays += [array(f"gradient{i}", "activation", 16 * left[i]) for i in range(layers)]
    steps = [
        Step(f"there{i}", "there", (states[i],), (states[i + 1], f"tape{i}"), flops=there[i])
        for i in range(layers)
    ]
    steps.append(Step("loss", "loss", (states[-1],), (f"back{layers}",), flops=1))
    for i in reversed(range(layers)):
        reads = [states[i], f"tape{i}", f"back{i + 1}", *([states[i + 1]] if reads_result else [])]
        writes = [f"gradient{i}", *([f"back{i}"] if i else [])]
        steps.append(Step(f"back{i}", "back", tuple(reads), tuple(writes), flops=back[i]))
    return program(arrays, steps, [f"gradient{i}" for i in range(layers)])


def needs_of(made: Program) -> Needs:
    return read_needs(made, tiny_machine(), Remembered(Roofline()))


def rooms(needs: Needs, shares: tuple[float, ...]) -> list[int]:
    """Memories between the least with everything moved out and the least with nothing."""
    budgets = value_budgets(needs)
    span = budgets.tight - budgets.spilled
    return [int(budgets.spilled + share * span) // UNIT * UNIT for share in shares]


def seconds(needs: Needs, room: int) -> float:
    order = best_order(needs, room)
    return math.inf if order is None else sum(needs.step_s[index] for index in order)


def least_seconds(needs: Needs, room: int, last_again: int) -> float:
    """Dijkstra over all sequences of runs and frees: what lies there, and how far it has come."""
    made, names = needs.program, list(needs.program.arrays)
    bit = {name: 1 << place for place, name in enumerate(names)}
    reads = [sum(bit[name] for name in step.inputs) for step in made.steps]
    writes = [sum(bit[name] for name in step.writes) for step in made.steps]
    fixed = sum(bit[name] for name in {*made.outputs, *made.given})

    @functools.cache
    def nbytes(held: int) -> int:
        return sum(needs.device_bytes[name] for name in names if held & bit[name])

    start = (sum(bit[name] for name in made.given), 0)
    best, heap = {start: 0.0}, [(0.0, start)]
    while heap:
        spent, (held, done) = heapq.heappop(heap)
        if done == len(made.steps):
            return spent
        if spent > best[held, done]:
            continue
        found = [(spent, (held ^ one, done)) for one in bit.values() if held & one & ~fixed]
        for index in (*range(min(done, last_again)), done):
            after = held | writes[index]
            possible = not (reads[index] & ~held or writes[index] & held)
            if possible and nbytes(after) <= room:
                found.append((spent + needs.step_s[index], (after, done + (index == done))))
        for then, state in found:
            if then < best.get(state, math.inf):
                best[state] = then
                heapq.heappush(heap, (then, state))
    return math.inf


@pytest.mark.parametrize("seed", range(12))
def test_short_chains_are_computed_in_the_least_time_of_all_schedules(seed: int) -> None:
    layers = 2 + seed % 3
    needs = needs_of(there_and_back(seed, layers, reads_result=bool(seed % 2)))
    assert as_chain(needs) is not None
    for room in rooms(needs, (0.0, 0.3, 0.6, 0.85)):
        least = least_seconds(needs, room, layers)
        assert seconds(needs, room) <= 1.01 * least
        assert seconds(needs, room) >= least * (1 - 1e-9) or math.isinf(least)


def recursion_seconds(needs: Needs, room: int, layers: int) -> float:
    """The recurrence of Beaumont and others, 2019, word for word, for chains without gradients.

    Stage i makes state i + 1 and a tape; its way back reads state i and the tape, takes a
    cotangent of one unit and makes another one.
    """
    size = {name: -(-nbytes // UNIT) for name, nbytes in needs.device_bytes.items()}
    there, back = needs.step_s[:layers], needs.step_s[layers + 1 :][::-1]
    state = [0, *(size[f"state{i + 1}"] for i in range(layers))]
    tape = [size[f"tape{i}"] for i in range(layers)]

    @functools.cache
    def least(first: int, last: int, room: int) -> float:
        if room < 0:
            return math.inf
        work = 1 + state[first + 1] + tape[first]
        undo = tape[first] + (2 if first else 1)
        end = state[first + 1] + tape[first] + (1 if last == layers - 1 else 0)
        if first == last:
            fits = room >= max(work if last < layers - 1 else end, undo)
            return there[first] + back[first] if fits else math.inf
        found = math.inf
        if room >= max(work, undo):
            rest = least(first + 1, last, room - tape[first] - state[first + 1])
            found = there[first] + back[first] + rest
        spent, fits = 0.0, True
        for cut in range(first + 1, last + 1):
            held = state[cut - 1] if cut - 1 > first else 0
            fits = fits and room >= 1 + held + state[cut] + tape[cut - 1]
            spent += there[cut - 1]
            if fits:
                upper = least(cut, last, room - state[cut])
                found = min(found, spent + upper + least(first, cut - 1, room))
        return found

    return needs.step_s[layers] + least(0, layers - 1, room // UNIT - size["x"])


@pytest.mark.parametrize(("seed", "layers"), [(0, 9), (1, 16), (3, 29)])
def test_chains_of_up_to_60_steps_take_at_most_a_hundredth_more_than_the_optimum(
    seed: int, layers: int
) -> None:
    made = there_and_back(seed, layers, reads_result=False, loose=False)
    assert len(made.steps) <= 60
    needs = needs_of(made)
    for room in rooms(needs, (0.3,)):
        optimum = recursion_seconds(needs, room, layers)
        assert optimum < math.inf
        assert seconds(needs, room) <= 1.01 * optimum
        assert seconds(needs, room) > sum(needs.step_s), "something must be computed again"
