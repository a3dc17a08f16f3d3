"""Plans as text: exactly this text, the same bytes each time, and nothing else is taken."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import programs
import pytest

from memsched.errors import MemschedError, PlanError
from memsched.machine import Machine
from memsched.plan import Copy, Free, Plan, Residence, Run
from memsched.plan_json import from_json, plan_digest, to_json
from memsched.program import Program

PROGRAM = programs.chain(layers=1)
MACHINE = programs.tiny_machine(device=1024)
PLAN = Plan(
    program=PROGRAM.digest,
    machine=MACHINE.digest,
    entry=(Residence("x", "device"), Residence("w0", "nvme")),
    actions=(
        Copy("w0", "nvme", "device"),
        Run("layer0"),
        Free("w0", "device"),
        Free("x", "device"),
    ),
    exit=(Residence("h0", "device"), Residence("w0", "nvme")),
    slots={0: 64},
)
TEXT = f"""\
{{"format": "memsched plan", "version": 1,
"program": "{PROGRAM.digest}", "machine": "{MACHINE.digest}",
"entry": [
["x", "device", "raw", null],
["w0", "nvme", "raw", null]],
"actions": [
["copy", "w0", "nvme", "device", "raw", 64],
["run", "layer0"],
["free", "w0", "device"],
["free", "x", "device"]],
"exit": [
["h0", "device", "raw", null],
["w0", "nvme", "raw", null]]}}
"""
CASES = [
    (program, machine)
    for program in (programs.chain(), programs.decode(), programs.prefill(), programs.training())
    for machine in (programs.tiny_machine(), programs.tiny_machine(host=1 << 20))
]


def test_a_plan_is_this_text() -> None:
    assert to_json(PLAN) == TEXT
    assert from_json(TEXT, PROGRAM, MACHINE) == PLAN


@pytest.mark.parametrize(("program", "machine"), CASES)
def test_a_plan_reads_back_and_the_same_plan_is_the_same_bytes(
    program: Program, machine: Machine
) -> None:
    plan = programs.naive_plan(program, machine)
    text = to_json(plan)
    again = from_json(text, program, machine)
    assert again == plan
    backwards = Plan(**{**vars(plan), "slots": dict(reversed(list(plan.slots.items())))})
    assert to_json(again) == to_json(backwards) == text
    assert plan_digest(again) == plan_digest(plan)


def test_layout_does_not_matter_to_the_reader() -> None:
    assert from_json(json.dumps(json.loads(TEXT), indent=3), PROGRAM, MACHINE) == PLAN


def test_a_digest_sees_every_part() -> None:
    others = [
        {"program": "0" * 16},
        {"machine": "0" * 16},
        {"entry": PLAN.entry[:1]},
        {"exit": ()},
        {"actions": PLAN.actions[:3]},
        {"slots": {0: 0}},
    ]
    plans = [PLAN, *(Plan(**{**vars(PLAN), **other}) for other in others)]
    digests = {plan_digest(plan) for plan in plans}
    assert len(digests) == len(plans)
    assert all(len(digest) == 16 for digest in digests)


def test_a_larger_machine_is_taken_and_a_smaller_one_refused() -> None:
    # 64 B before the weight, then x, w0 and h0 of 256 B each.
    enough = programs.tiny_machine(device=832, nvme=0, nvme_bytes_per_s=5.0)
    assert enough.digest != PLAN.machine
    with pytest.raises(PlanError, match=r"'device' would hold 768 B of 767 B"):
        from_json(TEXT, PROGRAM, programs.tiny_machine(device=767))
    assert from_json(TEXT, PROGRAM, programs.tiny_machine(device=1 << 30)) == PLAN
    assert from_json(TEXT, PROGRAM, enough) == PLAN


def test_another_program_is_refused() -> None:
    with pytest.raises(PlanError, match=f"made for program {PROGRAM.digest}"):
        from_json(TEXT, programs.chain(layers=1, values=63), MACHINE)


def test_a_slot_without_a_copy_cannot_be_written() -> None:
    for index in (1, 4, -1):
        with pytest.raises(PlanError, match=f"slots: {index} is not the index of a Copy"):
            to_json(Plan(**{**vars(PLAN), "slots": {index: 0}}))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"memsched plan"', '"something"', "cannot be read, only"),
        ('"version": 1', '"version": 2', "cannot be read, only"),
        ('"version": 1', '"version": true', "cannot be read, only"),
        ('"version": 1', '"version": 1, "version": 1', "same key twice"),
        ('"version": 1', '"version": 1, "colour": 1', "has the keys"),
        ('"version": 1', '"version": NaN', "NaN is no number"),
        ('"version": 1', '"version": ' + "1" * 5000, "not JSON"),
        (f'"{PROGRAM.digest}"', '"00"', "program must be 16 hex"),
        (f'"{MACHINE.digest}"', "7", "machine must be 16 hex"),
        ('"entry": [', '"entry": {}, "x": [', "has the keys"),
        ('["x", "device", "raw", null]', "7", r"entry\[0\] must be a list"),
        ('["x", "device", "raw", null]', '["x", "device", "raw"]', r"entry\[0\] has 3 items"),
        ('["x", "device", "raw", null]', '["x", "device", "raw", -1]', r"entry\[0\].*offset"),
        ('["x", "device", "raw", null]', '["x", "device", 5, null]', r"entry\[0\].*names"),
        ('"raw", 64', '"raw", 64.0', r"actions\[0\].*offset"),
        ('"raw", 64', '"raw", true', r"actions\[0\].*offset"),
        ('"raw", 64', f'"raw", {1 << 61}', r"actions\[0\].*offset"),
        ('"raw", 64', '"raw", 65', "no multiple of 64"),
        ('"raw", 64', '"raw"', r"actions\[0\] is no action"),
        ('"raw", 64', '"raw", null', "offset is None"),
        ('["run", "layer0"]', '["run", "layer1"]', "no step 'layer1'"),
        ('["run", "layer0"]', '["run", ["layer0"]]', r"actions\[1\].*names"),
        ('["run", "layer0"]', '["skip", "layer0"]', r"actions\[1\] is no action"),
        ('["run", "layer0"]', "[]", r"actions\[1\] is no action"),
        ('["run", "layer0"]', f'["run", "{"a" * 1001}"]', r"actions\[1\].*up to 1000"),
        ('["free", "w0", "device"],\n', "", "exit"),
        (TEXT, "[]", "must be an object"),
        (TEXT, "", "not JSON"),
        (TEXT, "[" * 100_000, "not JSON"),
    ],
)
def test_broken_text_is_refused_in_one_line(old: str, new: str, says: str) -> None:
    assert TEXT.count(old) == 1
    with pytest.raises(PlanError, match=says) as caught:
        from_json(TEXT.replace(old, new), PROGRAM, MACHINE)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def values_of(node: Any, put: Callable[[Any], None]) -> list[tuple[Any, Callable[[Any], None]]]:
    """Every value in a JSON tree, with a function that replaces it."""
    found = [(node, put)]
    if isinstance(node, dict | list):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            found += values_of(node[key], lambda new, key=key: node.__setitem__(key, new))
    return found


def test_no_replaced_value_gets_past_the_referee_or_crashes_the_reader() -> None:
    plan = programs.naive_plan(programs.decode(), MACHINE)
    text = to_json(plan)
    junk = [None, True, -1, 0, 64, 1.5, 10**30, "", "w0", "nvme", "\ud800", [], {}, [[]], {"a": 1}]
    count = len(values_of(json.loads(text), lambda new: None))
    rng = np.random.default_rng(1)
    refused = 0
    for index in range(1, count):
        tree = json.loads(text)
        old, put = values_of(tree, lambda new: None)[index]
        new = junk[rng.integers(len(junk))]
        put(new)
        try:
            again = from_json(json.dumps(tree), programs.decode(), MACHINE)
        except MemschedError:
            refused += 1
        else:
            assert new == old or again != plan
    assert refused > 0.9 * count


def test_a_plan_survives_a_file(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(to_json(PLAN))
    assert from_json((tmp_path / "plan.json").read_text(), PROGRAM, MACHINE) == PLAN
