"""The referee against random plans: right ones, and thousands that were spoilt.

What is right is decided by playing a plan through on hashes, never by verify itself. The figures
are printed by

    python -m pytest tests/memsched/test_verify_random.py -rP
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import programs
import pytest
from plan_mutations import MUTATIONS, Case
from programs import tiny_machine
from random_plans import random_plan
from symbolic import objections, play

from memsched.errors import PlanError
from memsched.machine import Machine
from memsched.plan import Plan, Run
from memsched.program import Program
from memsched.referee import verify


def tight(machine: Machine, plan: Plan, program: Program) -> Machine:
    """The machine with exactly the bytes that the plan takes."""
    seen = play(plan, program, machine)
    return machine.with_capacities(
        {tier: max(seen.peaks[tier], seen.reach[tier]) for tier in seen.peaks}
    )


def cases(seeds: Iterator[int]) -> Iterator[Case]:
    """Random valid plans of random and of named programs, on machines of two and three tiers."""
    named = list(programs.TINY.values())
    for seed in seeds:
        rng = np.random.default_rng(seed)
        some = named[seed // 2 % len(named)]() if seed % 2 else programs.random_program(rng)
        for machine in (tiny_machine(), tiny_machine(host=1 << 20)):
            plan = random_plan(rng, some, machine)
            yield Case(plan, some, tight(machine, plan, some), rng)


def test_random_valid_plans_are_accepted_with_the_peaks_that_brute_force_finds() -> None:
    again = 0
    for case in itertools.islice(cases(itertools.count()), 120):
        assert verify(case.plan, case.program, case.machine) == (
            play(case.plan, case.program, case.machine).peaks
        )
        assert not objections(case.plan, case.program, case.machine)
        runs = sum(isinstance(action, Run) for action in case.plan.actions)
        again += runs - len(case.program.steps)
    assert again > 10, "too few steps run again for this test to mean anything"


def test_one_byte_less_than_a_random_plan_takes_is_refused() -> None:
    for case in itertools.islice(cases(itertools.count(1000)), 30):
        for tier, peak in verify(case.plan, case.program, case.machine).items():
            if peak:
                with pytest.raises(PlanError, match=f"{tier!r} would hold|not within the"):
                    verify(case.plan, case.program, case.machine.with_capacities({tier: peak - 1}))


# Rules of form: breaking one alone spoils neither bits nor budgets, but the runtime relies on it.
FORM = (
    "are taken",
    "cannot be held here",
    "has no arena",
    "is already in",
    "is listed twice",
    "is no multiple",
    "is not the index of a Copy",
    "is placed by its tier",
    "is stale or early",
    "is unknown; steps read",
    "lies in the arena",
    "must rest in",
    "never run",
    "runs again",
)


def mutation_figures(broken: int, first_seed: int = 0) -> Counter[tuple[str, str]]:
    """Spoils valid plans until so many are really broken; counts (mutation, what came of it).

    Whether a plan is broken is decided by playing it through, never by verify.
    """
    count: Counter[tuple[str, str]] = Counter()
    found = 0
    for case in cases(itertools.count(first_seed)):
        for name, spoil in MUTATIONS.items():
            plan = spoil(case)
            if plan == case.plan:
                continue
            wrong = objections(plan, case.program, case.machine)
            found += bool(wrong)
            refusal = refused(plan, case)
            why = wrong[0].split(":")[0] if wrong else "harmless"
            count[name, f"{why}, {'refused' if refusal else 'accepted'}"] += 1
            if refusal and not wrong:
                assert any(form in refusal for form in FORM), f"{name}: {refusal}"
            assert refusal or not wrong, f"{name}: accepted, but {wrong}"
        if found >= broken:
            return count
    raise AssertionError("seeds never end")


def refused(plan: Plan, case: Case) -> str:
    """What verify says against a plan; nothing if it accepts it."""
    try:
        verify(plan, case.program, case.machine)
    except PlanError as refusal:
        return str(refusal)
    return ""


def test_no_randomly_broken_plan_is_accepted(
    record_property: Callable[[str, object], None],
) -> None:
    figures = mutation_figures(2000)
    totals: Counter[str] = Counter()
    for (name, outcome), number in sorted(figures.items()):
        print(f"{name:20} {outcome:20} {number:5}")
        totals[outcome] += number
    print(dict(sorted(totals.items())))
    record_property("mutations", dict(sorted(totals.items())))
    broken = sum(n for outcome, n in totals.items() if not outcome.startswith("harmless"))
    assert broken >= 2000
    assert all(totals[f"{why}, refused"] > 100 for why in ("bits", "budget", "crash"))
    # Else the referee refuses whatever it has not seen before.
    assert totals["harmless, accepted"] > 50
    assert {name for name, _ in figures} == set(MUTATIONS)
