"""Traces, read as Perfetto reads them: known phases, lanes without overlap, microseconds."""

import dataclasses
import itertools
import json
from collections import defaultdict
from typing import Any

import numpy as np
import programs
import pytest
import random_plans
from report_pages import HOSTILE, chapter_of, naive_chapter, renamed

from memsched.errors import ProgramError
from memsched.plan import Copy, Run
from memsched.referee import verify
from memsched.report.chapter import Chapter
from memsched.report.perfetto import perfetto
from memsched.report.timeline import PARTS

Event = dict[str, Any]
# What each phase must have, by the format's description, and nothing else is written here.
FIELDS = {
    "M": {"name", "pid", "tid", "ts", "args"},
    "X": {"name", "pid", "tid", "ts", "dur", "args"},
    "C": {"name", "pid", "ts", "args"},
    "s": {"name", "cat", "id", "pid", "tid", "ts"},
    "f": {"name", "cat", "id", "pid", "tid", "ts", "bp"},
}


def events_of(*chapters: Chapter) -> list[Event]:
    found = json.loads(perfetto(chapters))
    assert found.keys() == {"traceEvents", "displayTimeUnit"}
    events: list[Event] = found["traceEvents"]
    return events


def ns(microseconds: float) -> int:
    return round(microseconds * 1000)


def check(events: list[Event]) -> None:
    """What must hold of any trace."""
    lanes: dict[tuple[int, int], list[Event]] = defaultdict(list)
    arrows: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        assert event.keys() - {"ph"} == FIELDS[event["ph"]]
        assert isinstance(event["name"], str)
        assert event["ts"] >= 0
        match event["ph"]:
            case "X":
                assert event["dur"] >= 0
                lanes[event["pid"], event["tid"]].append(event)
            case "C":
                assert event["args"].keys() <= set(PARTS)
                assert all(isinstance(n, int) and n >= 0 for n in event["args"].values())
            case "s" | "f":
                arrows[event["id"]].append(event)
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert lanes.keys() <= named
    for found in lanes.values():
        found.sort(key=lambda event: (event["ts"], event["dur"]))
        for one, after in itertools.pairwise(found):
            assert ns(one["ts"]) + ns(one["dur"]) <= ns(after["ts"])
    for pair in arrows.values():
        assert [event["ph"] for event in pair] == ["s", "f"]
        start, end = pair
        assert start["ts"] <= end["ts"]
        for event in pair:
            lane = lanes[event["pid"], event["tid"]]
            assert any(one["ts"] == event["ts"] for one in lane), "an arrow hangs on nothing"


def random_chapter(seed: int) -> Chapter:
    rng = np.random.default_rng(seed)
    program = programs.random_program(rng)
    machine = programs.tiny_machine(host=None if seed % 2 else 1 << 20)
    plan = random_plans.random_plan(rng, program, machine)
    return chapter_of(plan, program, machine, name=f"plan {seed}", measured=seed % 3 == 0)


@pytest.mark.parametrize("seed", range(6))
def test_a_trace_is_well_formed(seed: int) -> None:
    check(events_of(random_chapter(seed), random_chapter(seed + 1), naive_chapter()))


def test_every_action_is_there_in_its_lane_at_its_time() -> None:
    chapter = dataclasses.replace(naive_chapter(), moving_s=0.0)
    events = events_of(chapter)
    shift = -min(0.0, *(span.start_s for span in chapter.predicted))
    threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    shown = {
        event["args"]["action"]: event
        for event in events
        if event["ph"] == "X" and "action" in event["args"]
    }
    busy = {i for i, one in enumerate(chapter.plan.actions) if isinstance(one, Run | Copy)}
    assert shown.keys() == busy
    for index, event in shown.items():
        action, span = chapter.plan.actions[index], chapter.predicted[index]
        assert event["ts"] == pytest.approx((span.start_s + shift) * 1e6, abs=1e-3)
        assert event["dur"] == pytest.approx((span.end_s - span.start_s) * 1e6, abs=2e-3)
        if isinstance(action, Copy):
            assert threads[event["tid"]] == f"{action.source}->{action.target}"
            assert event["args"]["array"] == action.array == event["name"]
            assert event["args"]["bytes"] == chapter.program.arrays[action.array].nbytes
        elif isinstance(action, Run):
            assert (threads[event["tid"]], event["name"]) == ("compute", action.step)


def test_predicted_and_measured_are_two_processes_that_begin_together() -> None:
    first, second = naive_chapter(measured=True), naive_chapter()
    events = events_of(first, second)
    check(events)
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {1: "predicted", 2: "measured"}
    runs: dict[int, list[float]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X" and event["name"] == "decode":
            runs[event["pid"]].append(event["ts"])
    # The second chapter has no measurement, and begins when the slower run of the first has ended.
    assert len(runs[1]) == 2
    assert len(runs[2]) == 1
    longest = max(span.end_s for span in first.measured)
    earliest = min(0.0, *(span.start_s for span in (*first.predicted, *first.measured)))
    assert max(runs[1]) >= (longest - earliest) * 1e6 - 1e-3


@pytest.mark.parametrize("host", [None, 1 << 20])
def test_counters_reach_the_peak_that_the_referee_finds(host: int | None) -> None:
    chapter = naive_chapter(host=host)
    peaks: dict[str, int] = defaultdict(int)
    for event in events_of(chapter):
        if event["ph"] == "C":
            peaks[event["name"]] = max(peaks[event["name"]], sum(event["args"].values()))
    found = verify(chapter.plan, chapter.program, chapter.machine)
    assert peaks == {f"{tier} bytes": nbytes for tier, nbytes in found.items()}


def test_an_arrow_leads_from_what_arrives_to_the_step_that_reads_it_first() -> None:
    chapter = naive_chapter()
    events = events_of(chapter)
    slices = {(e["tid"], e["ts"]): e for e in events if e["ph"] == "X"}
    arrows = [e for e in events if e["ph"] in "sf"]
    led = [
        (slices[s["tid"], s["ts"]]["name"], slices[f["tid"], f["ts"]]["name"])
        for s, f in zip(arrows[::2], arrows[1::2], strict=True)
    ]
    assert ("layer1.weight", "layer1") in led
    assert ("table", "embed") in led
    assert ("table", "head") in led
    assert len(led) == sum(isinstance(action, Copy) for action in chapter.plan.actions)


def test_names_stay_as_they_are_and_a_trace_of_nothing_is_refused() -> None:
    program, machine = renamed(programs.chain(), "w1", HOSTILE), programs.tiny_machine()
    chapter = chapter_of(programs.naive_plan(program, machine), program, machine)
    events = events_of(chapter)
    check(events)
    assert HOSTILE in {event["name"] for event in events}
    with pytest.raises(ProgramError, match="no plans"):
        perfetto([])
    assert perfetto([chapter]) == perfetto([chapter])
