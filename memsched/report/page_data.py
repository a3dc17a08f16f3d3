"""What a page shows, as one JSON value: its script computes nothing that is not in here."""

import bisect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memsched.cost import Span
from memsched.plan import Run
from memsched.report.chapter import Chapter, Cover, check_chapters
from memsched.report.page_arrays import Row, reads_of, rows_of
from memsched.report.sentences import sentences
from memsched.report.stories import stories
from memsched.report.timeline import (
    PARTS,
    Block,
    lane_blocks,
    levels,
    moments,
    stairs,
    time_range,
)
from memsched.sizes import LARGEST_BYTES

# Together these keep the page of any plan below 3 MB.
MOST_COLUMNS = 1000
ALL_COLUMNS = 12_000
ALL_BLOCKS = 16_000
ALL_ROWS = 9_000


class _Texts:
    """Every text once, by number."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self._places.setdefault(text, len(self._places))

    def all(self) -> list[str]:
        return list(self._places)


def page_data(chapters: Sequence[Chapter], cover: Cover) -> dict[str, Any]:
    """All numbers of a page. Seconds and bytes as they are; texts that recur are numbered.

    Raises:
        ProgramError: no chapter, or spans that belong to another plan.
    """
    check_chapters(chapters)
    texts = _Texts()
    told = [_chapter(chapter, texts, len(chapters)) for chapter in chapters]
    return {
        "title": cover.title,
        "lines": list(cover.lines),
        "first_token_s": cover.first_token_s,
        "total_s": cover.total_s,
        "smallest_bytes": dict(cover.smallest_bytes),
        "assumptions": dict(cover.assumptions),
        "parts": list(PARTS),
        "chapters": told,
        "texts": texts.all(),
    }


def _chapter(chapter: Chapter, texts: _Texts, chapters: int) -> dict[str, Any]:
    summary, plan, program = chapter.summary, chapter.plan, chapter.program
    views = {"predicted": chapter.predicted} | (
        {"measured": chapter.measured} if chapter.measured else {}
    )
    range_s = time_range(views.values(), summary.seconds)
    rows, places = rows_of(
        plan, program, chapter.predicted, summary.arrays, max(400, ALL_ROWS // chapters)
    )
    lanes = sum(1 for use in summary.lanes.values() if use.actions)
    most = max(200, ALL_BLOCKS // (chapters * len(views) * max(1, lanes)))
    return {
        "name": chapter.name,
        "count": chapter.count,
        "tokens": chapter.tokens,
        "moving_s": chapter.moving_s,
        "repeated": summary.repeated,
        "seconds": summary.seconds,
        "bound_s": summary.bound.seconds,
        "bound_by": summary.bound.lane,
        "gap": summary.gap,
        "contended": summary.contended,
        "steps": summary.steps,
        "runs": summary.runs,
        "actions": summary.actions,
        "range_s": list(range_s),
        "sentences": sentences(chapter),
        "tiers": _tiers(chapter, views, range_s, chapters),
        "lanes": _lanes(chapter, views, places, most, texts),
        "arrays": _arrays(chapter, rows, texts),
        "baselines": [[name, seconds] for name, seconds in summary.baselines.items()],
        "prices_s_per_gb": dict(summary.prices.with_gb_more_s) if summary.prices else {},
        "gains_s": dict(chapter.gains_s),
        "workspaces": [
            [row["step"], row["estimated_bytes"], row["compiled_bytes"], row["ratio"]]
            for row in chapter.workspaces
        ],
        "lines": [[one.what, one.unit, one.predicted, one.measured] for one in chapter.lines],
    }


def _tiers(
    chapter: Chapter, views: Mapping[str, Any], range_s: tuple[float, float], chapters: int
) -> list[dict[str, Any]]:
    found = levels(chapter.plan, chapter.program, chapter.machine)
    columns = min(MOST_COLUMNS, ALL_COLUMNS // (chapters * len(views) * len(found)))
    times = {view: moments(chapter.plan, spans, range_s[0]) for view, spans in views.items()}
    tiers = []
    for name, use in chapter.summary.occupancy.items():
        shown = {view: stairs(found[name], when, range_s, columns) for view, when in times.items()}
        limit = use.capacity_bytes if use.capacity_bytes < LARGEST_BYTES else None
        tiers.append(
            {
                "name": name,
                "capacity_bytes": limit,
                "peak_bytes": use.peak_bytes,
                "peak_parts": dict(use.parts),
                "peak_s": {view: float(when[use.index + 1]) for view, when in times.items()},
                "columns": columns,
                "views": {
                    view: {
                        "starts": steps.starts.tolist(),
                        "parts": [_column(steps.nbytes[:, place]) for place in range(len(PARTS))],
                    }
                    for view, steps in shown.items()
                },
            }
        )
    return tiers


def _column(nbytes: NDArray[np.int64]) -> int | list[int]:
    """A number instead of a list of equal ones."""
    return int(nbytes[0]) if (nbytes == nbytes[0]).all() else nbytes.tolist()


def _lanes(
    chapter: Chapter,
    views: Mapping[str, Sequence[Span]],
    places: Mapping[str, int],
    most: int,
    texts: _Texts,
) -> list[dict[str, Any]]:
    plan, program = chapter.plan, chapter.program
    reads = reads_of(plan, program)
    blocks = {view: lane_blocks(plan, program, spans, most) for view, spans in views.items()}
    return [
        {
            "name": name,
            "actions": use.actions,
            "nbytes": use.nbytes,
            "busy_s": use.busy_s,
            "views": {
                view: _blocks(chapter, spans, blocks[view].get(name, ()), places, reads, texts)
                for view, spans in views.items()
            },
        }
        for name, use in chapter.summary.lanes.items()
    ]


def _blocks(
    chapter: Chapter,
    spans: Sequence[Span],
    blocks: Iterable[Block],
    places: Mapping[str, int],
    reads: Mapping[str, Sequence[int]],
    texts: _Texts,
) -> dict[str, list[Any]]:
    """Columns of equal length. `name` and `last` are steps or arrays of the first and the last
    action, `row` is the first one's row of an array, and `next` who reads an array that is alone.
    """
    found = list(blocks)
    actions = chapter.plan.actions

    def name(index: int) -> str:
        match actions[index]:
            case Run(step=step):
                return step
            case action:
                return action.array

    def next_use(block: Block) -> list[Any] | None:
        if block.count > 1 or isinstance(actions[block.first], Run):
            return None
        return _next_use(chapter, spans, reads[name(block.first)], block.first, texts)

    return {
        "start_s": [_short(block.start_s) for block in found],
        "end_s": [_short(block.end_s) for block in found],
        "busy_s": [_short(block.busy_s) for block in found],
        "first": [block.first for block in found],
        "count": [block.count for block in found],
        "nbytes": [block.nbytes for block in found],
        "name": [texts(name(block.first)) for block in found],
        "last": [texts(name(block.last)) for block in found],
        "row": [places.get(name(block.first)) for block in found],
        "next": [next_use(block) for block in found],
    }


def _next_use(
    chapter: Chapter, spans: Sequence[Span], reads: Sequence[int], copy: int, texts: _Texts
) -> list[Any] | None:
    """Step and start of the first Run behind a Copy that reads its array. The start is None where
    that is in the next pass; nothing where no step reads it any more.
    """
    if (place := bisect.bisect(reads, copy)) < len(reads):
        return [texts(_step(chapter, reads[place])), _short(spans[reads[place]].start_s)]
    if reads and chapter.summary.repeated:
        return [texts(_step(chapter, reads[0])), None]
    return None


def _step(chapter: Chapter, index: int) -> str:
    """The step of an action that is a Run."""
    action = chapter.plan.actions[index]
    assert isinstance(action, Run)
    return action.step


def _arrays(chapter: Chapter, rows: Sequence[Row], texts: _Texts) -> dict[str, list[Any]]:
    why = stories(chapter.plan, chapter.program, chapter.summary.arrays)

    def first_use(row: Row) -> list[Any] | None:
        if row.first_read is None:
            return None
        index, start_s = row.first_read
        return [texts(_step(chapter, index)), _short(start_s)]

    return {
        "name": [texts(row.name) for row in rows],
        "first": [texts(row.use.name) for row in rows],
        "count": [row.count for row in rows],
        "nbytes": [row.nbytes for row in rows],
        "kind": [texts(row.use.kind) for row in rows],
        "tier": [texts(row.use.tier) for row in rows],
        "codec": [texts(row.use.codec) for row in rows],
        "role": [texts(row.use.role) for row in rows],
        "why": [texts(why[row.use.name]) for row in rows],
        "first_use": [first_use(row) for row in rows],
        "read_count": [row.read_count for row in rows],
    }


def _short(seconds: float) -> float:
    """To nine digits: a picture has no more, and a page of them stays small."""
    return float(f"{seconds:.9g}")
