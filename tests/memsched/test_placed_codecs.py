"""Codecs chosen for the machine that a program runs on, against every possible choice."""

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest
from programs import chain, random_program, tiny_machine

from memsched.bound import read_masses, solve
from memsched.bound.choosing import choose_placed
from memsched.bound.kinds import Variants
from memsched.codecs.choice import RAW, Candidate, Choice, Subject
from memsched.cost import Roofline
from memsched.machine import Machine
from memsched.program import Program

COST = Roofline()
SIZES = {"half": 2, "quarter": 4}  # codecs, and what they divide an array by
SAVING = 0.1
BUDGETS = (0.0, 0.11, 0.26, 1.0)


def encoded(program: Program, codecs: Mapping[str, str]) -> Program:
    """The program with smaller weights."""
    arrays = dict(program.arrays)
    for name, codec in codecs.items():
        spec = arrays[name]
        if codec != RAW:
            fewer = -(-spec.shape[0] // SIZES[codec])
            arrays[name] = dataclasses.replace(spec, shape=(fewer,))
    return dataclasses.replace(program, arrays=arrays)


def variants(program: Program) -> Variants:
    weights = program.of_kind("weight")
    by_codec = {codec: encoded(program, dict.fromkeys(weights, codec)) for codec in SIZES}
    return Variants(program, by_codec, {name: (name,) for name in weights})


def subject(program: Program, name: str, half: float, quarter: float) -> Subject:
    small = encoded(program, {name: "half"}), encoded(program, {name: "quarter"})
    candidates = tuple(
        Candidate(codec, one.arrays[name].nbytes, error)
        for codec, one, error in zip(SIZES, small, (half, quarter), strict=True)
    )
    return Subject(name, program.arrays[name].nbytes, 1.0, candidates)


def bound_s(program: Program, codecs: Mapping[str, str], machine: Machine) -> float:
    return solve(read_masses(encoded(program, codecs), machine, COST)).seconds


def placed(
    program: Program, subjects: Sequence[Subject], machine: Machine, budget: float
) -> Choice | None:
    return choose_placed(
        subjects, variants(program), machine, COST, error_budget=budget, smallest_saving=SAVING
    )


def codecs_of(found: Choice) -> dict[str, str]:
    return {one.name: one.codec for one in found.arrays}


def choices(subjects: Sequence[Subject], budget: float) -> Iterator[dict[str, str]]:
    """All within a budget."""
    options = [
        [(RAW, 0.0), *((one.codec, one.error) for one in subject.candidates)]
        for subject in subjects
    ]
    for combination in itertools.product(*options):
        if math.fsum(error**2 for _, error in combination) <= budget**2:
            yield {one.name: codec for one, (codec, _) in zip(subjects, combination, strict=True)}


def drawn(seed: int) -> tuple[Program, list[Subject], Machine, float]:
    """Four weights of two kinds of errors, on a machine that may hold them all or not."""
    rng, chosen = np.random.default_rng(seed), random.Random(seed)
    program = random_program(rng, steps=chosen.randint(2, 5), weights=4, most_values=400)
    subjects = [
        subject(program, name, chosen.choice((0.1, 0.02)), chosen.choice((0.3, 0.1)))
        for name in program.of_kind("weight")
    ]
    host = [None, chosen.randint(2000, 6000)][seed % 2]
    rates = {"nvme_bytes_per_s": 10 ** chosen.uniform(5, 7), "flops_per_s": 1e9}
    machine = tiny_machine(device=chosen.randint(5000, 9000), host=host, **rates)
    return program, subjects, reading(machine, 10 ** chosen.uniform(5, 8)), chosen.choice(BUDGETS)


def reading(machine: Machine, bytes_per_s: float) -> Machine:
    """A machine whose steps read the device at this rate."""
    compute = dataclasses.replace(machine.compute, bytes_per_s=bytes_per_s)
    return dataclasses.replace(machine, compute=compute)


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_within_the_budget_makes_a_faster_pass(seed: int) -> None:
    program, subjects, machine, budget = drawn(seed)
    found = placed(program, subjects, machine, budget)
    best_s = min(bound_s(program, codecs, machine) for codecs in choices(subjects, budget))
    if found is None:
        least = encoded(program, {one.name: "quarter" for one in subjects})
        touched = [sum(least.arrays[name].nbytes for name in step.inputs) for step in least.steps]
        assert max(touched) > machine.tier("device").capacity_bytes / 2
        return
    assert found.predicted_error <= budget
    own_s = bound_s(program, codecs_of(found), machine)
    # What is faster by less than a thousandth is not worth an error.
    assert own_s <= best_s * 1.002, (own_s / best_s, codecs_of(found))


def alike(count: int, budget_of: int) -> tuple[Program, list[Subject], float]:
    """A chain of equal weights of 256 B, and a budget for so many of them in halves."""
    program = chain(count)
    subjects = [subject(program, name, 0.1, 0.2) for name in program.of_kind("weight")]
    return program, subjects, 0.1 * math.sqrt(budget_of) * 1.001


def test_what_gains_nothing_stays_raw() -> None:
    program, subjects, budget = alike(8, 8)
    found = placed(program, subjects, tiny_machine(), budget)
    assert found is not None
    assert set(codecs_of(found).values()) == {RAW}
    assert {one.reason for one in found.arrays} == {"raw: an encoding of it makes no pass faster"}


def test_weights_that_stay_are_encoded_where_steps_wait_for_memory() -> None:
    program, subjects, budget = alike(8, 4)
    machine = reading(tiny_machine(flops_per_s=1e12), 1e6)
    found = placed(program, subjects, machine, budget)
    assert found is not None
    assert sorted(codecs_of(found).values()) == ["half"] * 4 + [RAW] * 4


def test_equal_weights_are_encoded_in_turn() -> None:
    program, subjects, budget = alike(12, 4)
    found = placed(program, subjects, tiny_machine(device=2500, flops_per_s=1e12), budget)
    assert found is not None
    places = [place for place, one in enumerate(found.arrays) if one.codec == "half"]
    gaps = [after - before for before, after in itertools.pairwise(places)]
    assert len(places) == 4
    assert max(gaps) <= 4


def test_of_unlike_members_those_with_the_least_error_are_encoded() -> None:
    program, subjects, budget = alike(6, 3)  # on average an error counts a little more than 0.1
    errors = (0.14, 0.06, 0.1, 0.07, 0.15, 0.08)
    subjects = [
        dataclasses.replace(one, candidates=(dataclasses.replace(one.candidates[0], error=error),))
        for one, error in zip(subjects, errors, strict=True)
    ]
    found = placed(program, subjects, tiny_machine(device=1500, flops_per_s=1e12), budget)
    assert found is not None
    assert [one.codec for one in found.arrays] == [RAW, "half", RAW, "half", RAW, RAW]
    assert found.arrays[4].reason.startswith("raw: budget spent; half needs 0.15 of it")


def test_a_step_that_fits_in_no_form_is_told() -> None:
    program, subjects, budget = alike(4, 4)
    assert placed(program, subjects, tiny_machine(device=256), budget) is None


def test_a_step_that_fits_encoded_only_is_encoded() -> None:
    program, subjects, budget = alike(1, 1)
    found = placed(program, subjects, tiny_machine(device=704), budget)
    assert found is not None
    assert codecs_of(found) == {"w0": "half"}
