"""Plans do not change unnoticed: five of them are kept as text and replayed."""

import make_golden
import programs
import pytest
from make_golden import MACHINES
from symbolic import objections

from memsched.plan import Copy
from memsched.plan_json import from_json, to_json
from memsched.referee import verify, verify_hand_over


def test_every_tiny_program_has_a_golden_plan_and_no_other_is_kept() -> None:
    assert set(MACHINES) == set(programs.TINY)
    assert {path.stem for path in make_golden.GOLDEN.glob("*")} == set(MACHINES)


@pytest.mark.parametrize("name", MACHINES)
def test_the_planner_makes_the_same_bytes_again(name: str) -> None:
    kept = make_golden.path(name).read_text()
    assert to_json(make_golden.planned(name)) == kept, (
        "if this change of policy is meant: PYTHONPATH=. python tests/memsched/make_golden.py"
    )


@pytest.mark.parametrize("name", MACHINES)
def test_a_golden_plan_is_accepted_and_gives_the_programs_values(name: str) -> None:
    program, machine = programs.TINY[name](), MACHINES[name]
    plan = from_json(make_golden.path(name).read_text(), program, machine)
    peaks = verify(plan, program, machine)
    assert all(peaks[tier.name] <= tier.capacity_bytes for tier in machine.tiers)
    assert not objections(plan, program, machine)
    verify_hand_over(plan, plan, program.of_kind("weight"))


@pytest.mark.parametrize("name", MACHINES)
def test_a_golden_plan_moves_something_for_want_of_room(name: str) -> None:
    program, machine = programs.TINY[name](), MACHINES[name]
    plan = from_json(make_golden.path(name).read_text(), program, machine)
    assert any(isinstance(action, Copy) for action in plan.actions)
    held = {rest.array for rest in plan.entry if rest.tier == "device"}
    assert not held.issuperset(program.of_kind("weight"))
