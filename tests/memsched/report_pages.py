"""Chapters for tests of pages and traces."""

import dataclasses
from collections.abc import Mapping, Sequence

import programs

from memsched.cost import Roofline, Span
from memsched.machine import Machine
from memsched.plan import Plan
from memsched.program import Program
from memsched.report import Line, summarize
from memsched.report.chapter import Chapter, Cover
from memsched.report.timeline import usual_spans

COST = Roofline()
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\u2028{{DATA}}"
COVER = Cover("A title", ("two", "lines"), 1.5, 9.25, {"device": 1024}, {"dtype": "float32"})


def chapter_of(
    plan: Plan, program: Program, machine: Machine, *, name: str = "decode", measured: bool = False
) -> Chapter:
    """A chapter with all that it can have. What was measured takes twice as long as predicted."""
    others = {"resident": None, "tail spill": 2.5}
    predicted = usual_spans(plan, program, machine, COST)
    lines = (Line("a pass", "s", 1.0, 2.0), Line("device peak", "B", 4096.0, 5000.0))
    return Chapter(
        name,
        plan,
        program,
        machine,
        summarize(plan, program, machine, COST, others),
        predicted,
        twice(predicted) if measured else (),
        lines if measured else (),
        count=3,
        tokens=2,
        moving_s=0.5,
        gains_s={"device": 0.001, "disk": 0.0},
    )


def twice(spans: Sequence[Span]) -> tuple[Span, ...]:
    return tuple(Span(one.index, 2 * one.start_s, 2 * one.end_s) for one in spans)


def naive_chapter(*, measured: bool = False, host: int | None = None) -> Chapter:
    """A decode step that keeps nothing."""
    machine = programs.tiny_machine(device=8192, host=host)
    program = programs.decode()
    plan = programs.naive_plan(program, machine)
    return chapter_of(plan, program, machine, measured=measured)


def encoded(chapter: Chapter, codecs: Mapping[str, str]) -> Chapter:
    """The chapter of weights that rest so, by name; to a plan all bytes are the same."""
    uses = tuple(
        dataclasses.replace(use, codec=codecs.get(use.name, "raw"))
        for use in chapter.summary.arrays
    )
    return dataclasses.replace(chapter, summary=dataclasses.replace(chapter.summary, arrays=uses))


def renamed(program: Program, old: str, new: str) -> Program:
    """The program with another name for one array and for the step of that name."""

    def other(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(new if name == old else name for name in names)

    arrays = {
        (new if name == old else name): dataclasses.replace(spec, name=new if name == old else name)
        for name, spec in program.arrays.items()
    }
    steps = tuple(
        dataclasses.replace(
            step,
            name=new + step.name,
            reads=other(step.reads),
            writes=other(step.writes),
            updates=other(step.updates),
        )
        for step in program.steps
    )
    return Program(arrays, steps, other(program.outputs))
