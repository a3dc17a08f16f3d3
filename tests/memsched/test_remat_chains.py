"""Chains there and back take the least time, or at most a hundredth more.

Shorter ones against searches of all schedules; those of up to 60 steps against bounds, and against
known optima of chains with sizes all alike. `remat_bound` says how to try many more.
"""

import functools
import heapq
import itertools
import math

import numpy as np
import pytest
from remat_bound import none_below
from remat_chains import UNIT, needs_of, rooms, there_and_back, without_tapes
from remat_oracles import exact_seconds, two_moments_seconds

from memsched.passes.needs import Needs
from memsched.passes.remat import best_order
from memsched.passes.remat_chain import as_chain

# By how much an order may take longer than the best one.
GAP = 1.01
ROUNDING = 1 + 1e-9


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


@pytest.mark.parametrize("seed", range(8))
def test_both_searches_find_the_same_and_the_bound_is_no_more(seed: int) -> None:
    layers, reads_result = 3 + seed % 2, bool(seed % 2)
    needs = needs_of(there_and_back(seed, layers, reads_result=reads_result))
    for room in rooms(needs, (0.0, 0.2, 0.4, 0.6, 0.8)):
        least = least_seconds(needs, room, layers)
        assert exact_seconds(needs, room, layers) == pytest.approx(least, rel=1e-9)
        bound = two_moments_seconds(needs, room, layers, reads_result=reads_result)
        assert bound <= least * ROUNDING


@pytest.mark.parametrize("loose", [True, False])
@pytest.mark.parametrize("reads_result", [True, False])
@pytest.mark.parametrize("layers", [3, 5, 7])
def test_short_chains_are_computed_in_the_least_time_of_all_schedules(
    layers: int, *, reads_result: bool, loose: bool
) -> None:
    for seed in (100, 101):
        made = there_and_back(seed, layers, reads_result=reads_result, loose=loose)
        needs = needs_of(made)
        assert as_chain(needs) is not None
        for room in rooms(needs, (0.2, 0.5)):
            found = seconds(needs, room)
            assert exact_seconds(needs, room, layers, found / GAP) == math.inf


@pytest.mark.parametrize(
    ("seed", "layers", "reads_result", "loose", "units"),
    [
        (112, 3, False, False, 15),
        (140, 4, False, False, 11),
        (149, 4, False, True, 20),
        (155, 4, True, False, 16),
        (18, 6, False, True, 16),
        (31, 7, False, False, 15),
        (5, 6, True, False, 17),
        (26, 6, True, False, 24),
        (1067, 7, True, True, 16),
    ],
)
def test_states_need_not_stay_until_their_way_back(
    seed: int, layers: int, reads_result: bool, loose: bool, units: int
) -> None:
    needs = needs_of(there_and_back(seed, layers, reads_result=reads_result, loose=loose))
    least = exact_seconds(needs, units * UNIT, layers)
    assert seconds(needs, units * UNIT) == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize(
    ("seed", "layers", "reads_result", "loose"),
    [
        (1, 20, True, False),
        (3, 29, True, True),
        (4, 29, False, True),
    ],
)
def test_chains_of_up_to_60_steps_take_at_most_a_hundredth_more_than_a_bound(
    seed: int, layers: int, *, reads_result: bool, loose: bool
) -> None:
    made = there_and_back(seed, layers, reads_result=reads_result, loose=loose)
    assert len(made.steps) <= 60
    needs = needs_of(made)
    for room in rooms(needs, (0.5, 0.7)):
        bound = two_moments_seconds(needs, room, layers, reads_result=reads_result)
        found = seconds(needs, room)
        assert sum(needs.step_s) < bound <= found * ROUNDING
        assert found <= GAP * bound


@pytest.mark.parametrize("seed", range(6))
def test_no_time_that_a_schedule_takes_is_ruled_out(seed: int) -> None:
    layers, reads_result = 3 + seed % 3, bool(seed % 2)
    needs = needs_of(there_and_back(seed, layers, reads_result=reads_result))
    for room in rooms(needs, (0.0, 0.2, 0.4, 0.6)):
        least = exact_seconds(needs, room, layers)
        ruled_out = none_below(needs, room, layers, least * 1.0001, reads_result=reads_result)
        assert least == math.inf or not ruled_out
        assert none_below(needs, room, layers, sum(needs.step_s), reads_result=reads_result)


@pytest.mark.parametrize(
    ("seed", "layers", "reads_result", "loose"),
    [
        (0, 10, False, True),
        (3, 10, True, False),
        (1, 14, True, False),
        (2, 20, False, False),
        (1, 29, False, True),
    ],
)
def test_no_schedule_in_little_room_is_faster_by_more_than_a_hundredth(
    seed: int, layers: int, reads_result: bool, loose: bool
) -> None:
    made = there_and_back(seed, layers, reads_result=reads_result, loose=loose)
    needs = needs_of(made)
    for room in rooms(needs, (0.2, 0.3, 0.4)):
        found = seconds(needs, room)
        assert sum(needs.step_s) < found / GAP < math.inf
        assert none_below(needs, room, layers, found / GAP, reads_result=reads_result)


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


@pytest.mark.parametrize(("seed", "layers"), [(0, 9), (1, 16), (2, 24)])
def test_in_little_room_no_chain_takes_longer_than_if_all_states_stay(
    seed: int, layers: int
) -> None:
    needs = needs_of(there_and_back(seed, layers, reads_result=False, loose=False))
    for room in rooms(needs, (0.3,)):
        persistent = recursion_seconds(needs, room, layers)
        assert sum(needs.step_s) < seconds(needs, room) <= persistent * ROUNDING < math.inf


def griewank_runs(stages: int, slots: int) -> int:
    """How often stages of a chain run so that each can be undone, if so many states are kept.

    Source: A. Griewank and A. Walther, Algorithm 799: Revolve, 2000.
    """
    times = next(r for r in itertools.count(1) if math.comb(slots + r, r) >= stages)
    return times * stages - math.comb(slots + times, times - 1)


@pytest.mark.parametrize("slots", [3, 4, 8])
def test_chains_of_equal_stages_without_tapes_run_as_often_as_griewank_and_walther_say(
    slots: int,
) -> None:
    needs = needs_of(without_tapes([1000] * 29))
    order = best_order(needs, (slots + 3) * UNIT)
    assert order is not None
    assert len(needs.step_s) == 59
    assert sum(index < 29 for index in order) == griewank_runs(30, slots)


@pytest.mark.parametrize(("seed", "slots"), [(1, 4), (2, 6)])
def test_chains_without_tapes_take_the_least_time(seed: int, slots: int) -> None:
    there = np.random.default_rng(seed).integers(100, 1001, 29).tolist()
    needs = needs_of(without_tapes(there))

    @functools.cache
    def least(first: int, last: int, kept: int) -> float:
        """To undo stages, with the state before the first one among those that are kept."""
        if first == last:
            return 0.0
        if kept == 1:
            return sum(sum(needs.step_s[first:end]) for end in range(first + 1, last + 1))
        return min(
            sum(needs.step_s[first:cut]) + least(cut, last, kept - 1) + least(first, cut - 1, kept)
            for cut in range(first + 1, last + 1)
        )

    optimum = least(0, 29, slots) + sum(needs.step_s[29:])
    assert seconds(needs, (slots + 3) * UNIT) == pytest.approx(optimum, rel=1e-9)


@pytest.mark.parametrize("slots", [2, 3])
def test_what_is_known_of_chains_without_tapes_is_the_least_of_all_schedules(slots: int) -> None:
    needs = needs_of(without_tapes([1000] * 7))
    least = exact_seconds(needs, (slots + 3) * UNIT, 7)
    rest = sum(needs.step_s[7:])
    assert least == pytest.approx(rest + griewank_runs(8, slots) * needs.step_s[0], rel=1e-9)
