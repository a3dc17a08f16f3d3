"""The rows of a page's list of arrays: one each, or one for many that differ by a number only."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from memsched.cost import Span
from memsched.plan import Plan, Run
from memsched.program import Program
from memsched.report.summary import ArrayUse

# What stands for a number in the name of many arrays.
ANY = "*"
_LAST_NUMBER = re.compile(r"\d+(?=\D*\Z)")
_NUMBER = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """`count` arrays of one kind and part. `nbytes` is of all of them; `use` is the first one.

    `first_read` are action and start of the first Run that takes any of them, of `read_count`.
    """

    name: str
    count: int
    nbytes: int
    use: ArrayUse
    first_read: tuple[int, float] | None
    read_count: int


def rows_of(
    plan: Plan, program: Program, spans: Sequence[Span], uses: Sequence[ArrayUse], most: int
) -> tuple[list[Row], dict[str, int]]:
    """The rows, in the order of the program, and the number of each array's row.

    Only where there are more arrays than `most` are those put together whose names differ in the
    last number, and if that is not enough, in any number.
    """
    key_of = _names(uses, most)
    members: dict[tuple[str, str, str, str, str], list[ArrayUse]] = {}
    for use in uses:
        key = (key_of[use.name], use.kind, use.tier, use.codec, use.role)
        members.setdefault(key, []).append(use)
    reads = reads_of(plan, program)
    rows: list[Row] = []
    places: dict[str, int] = {}
    for (name, *_), found in members.items():
        for use in found:
            places[use.name] = len(rows)
        runs = [(index, spans[index].start_s) for use in found for index in reads[use.name]]
        first = min(runs, key=lambda one: one[1], default=None)
        shown = name if len(found) > 1 else found[0].name
        nbytes = sum(use.nbytes for use in found)
        rows.append(Row(shown, len(found), nbytes, found[0], first, len(runs)))
    return rows, places


def _names(uses: Sequence[ArrayUse], most: int) -> Mapping[str, str]:
    names = {use.name: use.name for use in uses}
    for number in (_LAST_NUMBER, _NUMBER):
        if len({(names[use.name], use.kind, use.tier, use.role) for use in uses}) <= most:
            break
        names = {name: number.sub(ANY, name) for name in names}
    return names


def reads_of(plan: Plan, program: Program) -> dict[str, list[int]]:
    """The Runs that take each array, by their places in the plan."""
    reads: dict[str, list[int]] = {name: [] for name in program.arrays}
    for index, action in enumerate(plan.actions):
        if isinstance(action, Run):
            for name in program.step(action.step).inputs:
                reads[name].append(index)
    return reads
