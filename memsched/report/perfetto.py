"""Plans and their runs in Chrome's trace event format, for Perfetto and chrome://tracing.

Predicted and measured are two processes, their lanes threads; both begin a chapter together.
Source: "Trace Event Format", Google, 2016.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from memsched.cost import Span
from memsched.machine import DEVICE
from memsched.plan import Copy, Plan, Run
from memsched.program import Program
from memsched.report.chapter import Chapter, check_chapters
from memsched.report.timeline import PARTS, lane_spans, levels, moments, time_range

PROCESSES = {"predicted": 1, "measured": 2}
CHAPTERS_THREAD = 0
Event = dict[str, Any]
_COMPACT: dict[str, Any] = {"separators": (",", ":"), "allow_nan": False}


def perfetto(chapters: Sequence[Chapter]) -> str:
    """JSON text with every action of every chapter, one chapter after another.

    Copies have array, bytes and codec as arguments, and an arrow to the first step that reads what
    they bring; what tiers hold are counters.

    Raises:
        ProgramError: no chapter, or spans that belong to another plan.
    """
    check_chapters(chapters)
    lanes = list(dict.fromkeys(lane for chapter in chapters for lane in chapter.summary.lanes))
    threads = {lane: number for number, lane in enumerate(lanes, start=CHAPTERS_THREAD + 1)}
    used = ["predicted", *(["measured"] if any(one.measured for one in chapters) else [])]
    events = [event for process in used for event in _names(process, threads)]
    begin_s, arrows = 0.0, 0
    for chapter in chapters:
        views = {"predicted": chapter.predicted, "measured": chapter.measured}
        start_s, end_s = time_range(views.values(), chapter.summary.seconds)
        for process in used:
            if spans := views[process]:
                events += _chapter(chapter, spans, process, threads, begin_s - start_s, arrows)
                arrows += len(chapter.plan.actions)
        begin_s += end_s - start_s
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, **_COMPACT) + "\n"


def _names(process: str, threads: dict[str, int]) -> Iterator[Event]:
    """Names and order of a process and its threads."""
    number = PROCESSES[process]
    yield _meta("process_name", number, CHAPTERS_THREAD, {"name": process})
    yield _meta("process_sort_index", number, CHAPTERS_THREAD, {"sort_index": number})
    for name, thread in {"plan": CHAPTERS_THREAD, **threads}.items():
        yield _meta("thread_name", number, thread, {"name": name})
        yield _meta("thread_sort_index", number, thread, {"sort_index": thread})


def _meta(name: str, process: int, thread: int, args: dict[str, Any]) -> Event:
    return {"ph": "M", "name": name, "pid": process, "tid": thread, "ts": 0, "args": args}


def _chapter(
    chapter: Chapter,
    spans: Sequence[Span],
    process: str,
    threads: dict[str, int],
    shift_s: float,
    arrows: int,
) -> Iterator[Event]:
    """One chapter in one process, `shift_s` later; numbers of its arrows begin with `arrows`."""
    number, plan = PROCESSES[process], chapter.plan
    start_s, end_s = time_range([spans], 0.0)
    whole = {"seconds": chapter.summary.seconds, "bound seconds": chapter.summary.bound.seconds}
    yield _slice(chapter.name, number, CHAPTERS_THREAD, (start_s + shift_s, end_s + shift_s), whole)
    found = lane_spans(plan, spans)
    for lane, busy in found.items():
        for span in busy:
            times = (span.start_s + shift_s, span.end_s + shift_s)
            name, args = _described(chapter, span.index)
            yield _slice(name, number, threads[lane], times, args)
    placed = {span.index: (threads[lane], span) for lane, busy in found.items() for span in busy}
    for source, target in _arrows(plan, chapter.program):
        (thread, span), (other, reader) = placed[source], placed[target]
        if reader.start_s < span.end_s:
            continue
        arrow = {"cat": "arrives", "name": "arrives", "id": arrows + source + 1, "pid": number}
        yield arrow | {"ph": "s", "tid": thread, "ts": _us(span.start_s + shift_s)}
        yield arrow | {"ph": "f", "bp": "e", "tid": other, "ts": _us(reader.start_s + shift_s)}
    yield from _counters(chapter, spans, number, start_s, shift_s)


def _slice(
    name: str, process: int, thread: int, times_s: tuple[float, float], args: dict[str, Any]
) -> Event:
    start, end = (_ns(seconds) for seconds in times_s)
    times = {"ts": start / 1000, "dur": (end - start) / 1000}
    return {"ph": "X", "name": name, "pid": process, "tid": thread} | times | {"args": args}


def _described(chapter: Chapter, index: int) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a Run or a Copy."""
    match chapter.plan.actions[index]:
        case Run(step=name):
            step = chapter.program.step(name)
            figures = {"flops": step.flops, "workspace bytes": step.workspace_bytes}
            return name, {"action": index, "kernel": step.kernel} | figures
        case Copy(array=name, codec=codec):
            nbytes = chapter.program.arrays[name].nbytes
            return name, {"action": index, "array": name, "bytes": nbytes, "codec": codec}
        case action:
            raise AssertionError(f"{action} is on no lane")


def _arrows(plan: Plan, program: Program) -> Iterator[tuple[int, int]]:
    """Copies to the device, each with the Run that is the first to read what it brings."""
    arriving: dict[str, int] = {}
    for index, action in enumerate(plan.actions):
        match action:
            case Copy(array=name, target=tier) if tier == DEVICE:
                arriving[name] = index
            case Run(step=step):
                for name in program.step(step).inputs:
                    if name in arriving:
                        yield arriving.pop(name), index


def _counters(
    chapter: Chapter, spans: Sequence[Span], process: int, start_s: float, shift_s: float
) -> Iterator[Event]:
    """What each tier holds: at each moment with a change, the fullest state of the moment."""
    times = moments(chapter.plan, spans, start_s)
    _, first = np.unique(times, return_index=True)
    for tier, nbytes in levels(chapter.plan, chapter.program, chapter.machine).items():
        used = [place for place in range(len(PARTS)) if nbytes[:, place].any()]
        total = nbytes.sum(axis=1)
        before: dict[str, int] | None = None
        for begin, end in itertools.pairwise([*first, len(times)]):
            row = begin + int(np.argmax(total[begin:end]))
            args = {PARTS[place]: int(nbytes[row, place]) for place in used}
            if args == before:
                continue
            before = args
            when = {"ts": _us(times[begin] + shift_s), "pid": process}
            yield {"ph": "C", "name": f"{tier} bytes"} | when | {"args": args}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _us(seconds: float) -> float:
    return _ns(seconds) / 1000
