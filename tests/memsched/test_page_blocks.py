"""What blocks of lanes say of their actions: against the plan, step by step."""

import dataclasses
from typing import Any

import programs
import pytest
from report_pages import COST, COVER, chapter_of, naive_chapter

from memsched.passes.compile import compile_plan
from memsched.plan import Copy, Free, Plan, Residence, Run
from memsched.program import Program
from memsched.report.chapter import Chapter
from memsched.report.page_data import page_data
from memsched.report.timeline import lane_blocks, usual_spans

CLOSE = 1e-8  # the page has nine digits


def ahead_chapter() -> Chapter:
    """A decode step that fetches a weight for the next pass, when it has read it in this one."""
    program, machine = programs.decode(), programs.tiny_machine(device=3000)
    return chapter_of(compile_plan(program, machine), program, machine, measured=True)


def rows(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    across = zip(*columns.values(), strict=True)
    return [dict(zip(columns, values, strict=True)) for values in across]


def name_of(plan: Plan, index: int) -> str:
    action = plan.actions[index]
    return action.step if isinstance(action, Run) else action.array


def reader_behind(plan: Plan, program: Program, index: int) -> int | None:
    """The next Run of an array, found by walking on, and on from the beginning."""
    name, many = name_of(plan, index), len(plan.actions)
    for place in (*range(index + 1, many), *range(index)):
        action = plan.actions[place]
        if isinstance(action, Run) and name in program.step(action.step).inputs:
            return place
    return None


@pytest.mark.parametrize("view", ["predicted", "measured"])
@pytest.mark.parametrize("chapter", [naive_chapter(measured=True), ahead_chapter()])
def test_a_block_of_one_action_says_which_and_who_needs_it_next(
    chapter: Chapter, view: str
) -> None:
    plan = chapter.plan
    spans = {"predicted": chapter.predicted, "measured": chapter.measured}[view]
    data = page_data([chapter], COVER)
    (shown,), text = data["chapters"], data["texts"]
    for lane in shown["lanes"]:
        for block in rows(lane["views"][view]):
            index = block["first"]
            assert text[block["name"]] == text[block["last"]] == name_of(plan, index)
            assert block["start_s"] == pytest.approx(spans[index].start_s, rel=CLOSE, abs=1e-12)
            if isinstance(plan.actions[index], Run):
                assert (block["row"], block["next"]) == (None, None)
                continue
            assert text[shown["arrays"]["name"][block["row"]]] == name_of(plan, index)
            reader = reader_behind(plan, chapter.program, index)
            assert reader is not None
            step, start_s = block["next"]
            assert text[step] == name_of(plan, reader)
            if reader < index:
                assert start_s is None
            else:
                assert start_s == pytest.approx(spans[reader].start_s, rel=CLOSE, abs=1e-12)


def test_the_plan_of_these_tests_fetches_for_the_next_pass() -> None:
    chapter = ahead_chapter()
    plan, program = chapter.plan, chapter.program
    copies = [index for index, one in enumerate(plan.actions) if isinstance(one, Copy)]
    behind = [reader_behind(plan, program, index) or 0 for index in copies]
    assert {reader < copy for reader, copy in zip(behind, copies, strict=True)} == {True, False}


def test_what_nobody_reads_has_no_next_use() -> None:
    program, machine = programs.chain(layers=1), programs.tiny_machine()
    naive = programs.naive_plan(program, machine)
    spare = dataclasses.replace(program.arrays["w0"], name="spare")
    program = dataclasses.replace(program, arrays={**program.arrays, "spare": spare})
    moved = (Copy("spare", "nvme", "device"), Free("spare", "device"))
    rest = Residence("spare", "nvme")
    plan = Plan(
        program.digest,
        machine.digest,
        (*naive.entry, rest),
        (*naive.actions, *moved),
        (*naive.exit, rest),
    )
    data = page_data([chapter_of(plan, program, machine)], COVER)
    lanes = data["chapters"][0]["lanes"]
    blocks = [row for lane in lanes for row in rows(lane["views"]["predicted"])]
    (found,) = [block for block in blocks if data["texts"][block["name"]] == "spare"]
    assert found["next"] is None


def test_a_block_of_many_actions_has_the_first_and_the_last_of_them() -> None:
    program, machine = programs.chain(layers=40), programs.tiny_machine(device=8192)
    plan = programs.naive_plan(program, machine)
    spans = usual_spans(plan, program, machine, COST)
    for blocks in lane_blocks(plan, program, spans, 5).values():
        reached = -1
        for block in blocks:
            kind = type(plan.actions[block.first])
            alike = [
                index
                for index in range(reached + 1, block.last + 1)
                if isinstance(plan.actions[index], kind)
            ]
            assert (alike[0], alike[-1], len(alike)) == (block.first, block.last, block.count)
            reached = block.last
        assert max(block.count for block in blocks) > 1
