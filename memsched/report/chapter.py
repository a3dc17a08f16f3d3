"""What a page or a trace shows: plans with their predictions, and what was measured of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from memsched.cost import Span
from memsched.errors import ProgramError
from memsched.machine import Machine
from memsched.plan import Plan
from memsched.program import Program
from memsched.report.comparison import Line
from memsched.report.summary import Summary


@dataclasses.dataclass(frozen=True, slots=True)
class Chapter:
    """One plan and what is known of it.

    `predicted` are spans as of `timeline.usual_spans`; `measured` those of a run, empty before it,
    and `lines` how the two compare. The plan is carried out `count` times, each for `tokens`
    tokens (0: that means nothing here), after weights have moved for `moving_s` once. `gains_s` is
    by how much the bound falls with more of something, as of `what_if.gains_s`. `workspaces` are
    rows of `step`, `estimated_bytes`, `compiled_bytes` (XLA's) and `ratio`, if it was compiled.
    """

    name: str
    plan: Plan
    program: Program
    machine: Machine
    summary: Summary
    predicted: Sequence[Span]
    measured: Sequence[Span] = ()
    lines: Sequence[Line] = ()
    count: int = 1
    tokens: int = 0
    moving_s: float = 0.0
    gains_s: Mapping[str, float] = dataclasses.field(default_factory=dict)
    workspaces: Sequence[Mapping[str, Any]] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Cover:
    """What is said once, above all chapters.

    `lines` say what was asked for. `first_token_s` and `total_s` are of the whole request, None if
    nobody knows. `smallest_bytes` are budgets that would just do. `assumptions` are words by name.
    """

    title: str
    lines: Sequence[str] = ()
    first_token_s: float | None = None
    total_s: float | None = None
    smallest_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    assumptions: Mapping[str, str] = dataclasses.field(default_factory=dict)


def check_chapters(chapters: Sequence[Chapter]) -> None:
    """Raises ProgramError if there is none, or one whose spans are not those of its actions."""
    if not chapters:
        raise ProgramError("a report of no plans says nothing; give it one chapter at least")
    for chapter in chapters:
        wanted = len(chapter.plan.actions)
        for spans in (chapter.predicted, *([chapter.measured] if chapter.measured else [])):
            if [span.index for span in spans] != list(range(wanted)):
                raise ProgramError(
                    f"chapter {chapter.name!r} has {len(spans)} spans, its plan {wanted} actions; "
                    "give one span for each action, in their order"
                )
