"""Pages: what they show against the referee, the report and counts by hand; what they allow."""

import base64
import dataclasses
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import programs
import pytest
import random_plans
from report_pages import COST, COVER, HOSTILE, chapter_of, naive_chapter, renamed, twice

from memsched.cost import Span, plan_seconds
from memsched.errors import ProgramError
from memsched.machine import Machine
from memsched.plan import Copy, Free, Plan, Residence, Run
from memsched.program import Program
from memsched.referee import verify
from memsched.report import occupancy, summarize, to_dict, to_text
from memsched.report.chapter import Chapter
from memsched.report.page import page
from memsched.report.page_arrays import rows_of
from memsched.report.page_data import page_data
from memsched.report.reasons import of_many, of_one
from memsched.report.sentences import sentences
from memsched.report.stories import stories
from memsched.report.timeline import (
    IDLE,
    PARTS,
    PINNED,
    STREAMED,
    WORKSPACE,
    lane_blocks,
    lane_spans,
    levels,
    moments,
    stairs,
    usual_spans,
)

MOST_BYTES = 3_000_000
KINDS = {"weight": (PINNED, STREAMED), "cache": ("cache",), "feature": ("features",)}
KINDS |= {"activation": ("activations",), "workspace": (WORKSPACE,), IDLE: (IDLE,)}


def random_case(seed: int) -> tuple[Plan, Program, Machine]:
    rng = np.random.default_rng(seed)
    host = None if seed % 2 else 1 << 20
    program = programs.random_program(rng)
    machine = programs.tiny_machine(host=host)
    return random_plans.random_plan(rng, program, machine), program, machine


def told(text: str) -> dict[str, Any]:
    """The JSON value in a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    value: dict[str, Any] = json.loads(found[1])
    return value


# ---- over time ----


@pytest.mark.parametrize("seed", range(12))
def test_levels_are_fullest_where_referee_and_report_say_and_with_the_same(seed: int) -> None:
    plan, program, machine = random_case(seed)
    found = levels(plan, program, machine)
    peaks = verify(plan, program, machine)
    assert {tier: int(nbytes.sum(axis=1).max()) for tier, nbytes in found.items()} == peaks
    for tier, fullest in occupancy(plan, program, machine).items():
        row = dict(zip(PARTS, found[tier][fullest.index + 1].tolist(), strict=True))
        assert sum(row.values()) == fullest.peak_bytes
        for kind, parts in KINDS.items():
            assert sum(row[part] for part in parts) == fullest.parts.get(kind, 0)
        given = fullest.parts.get("input", 0) + fullest.parts.get("embedding", 0)
        assert row["inputs"] == given


def test_a_level_by_hand() -> None:
    program, machine = programs.chain(layers=2), programs.tiny_machine(device=1024)
    rests = (Residence("w0", "nvme"), Residence("w1", "nvme"))
    kept = Residence("w0", "device", offset=0)
    actions = (
        Copy("w1", "nvme", "device"),
        Run("layer0"),
        Free("x", "device"),
        Run("layer1"),
        Free("h0", "device"),
        Free("w1", "device"),
    )
    entry = (*rests, kept, Residence("x", "device"))
    left = (*rests, kept, Residence("h1", "device"))
    plan = Plan(program.digest, machine.digest, entry, actions, left, {0: 256})
    verify(plan, program, machine)
    columns = [PARTS.index(part) for part in (PINNED, STREAMED, IDLE, "inputs", "activations")]
    assert levels(plan, program, machine)["device"][:, columns].tolist() == [
        [256, 0, 256, 256, 0],
        [256, 256, 0, 256, 0],
        [256, 256, 0, 256, 256],
        [256, 256, 0, 0, 256],
        [256, 256, 0, 0, 512],
        [256, 256, 0, 0, 256],
        [256, 0, 256, 0, 256],
    ]
    spans = (
        Span(0, 0.0, 3.0),
        Span(1, 1.0, 2.0),
        Span(2, 2.0, 2.0),
        Span(3, 3.0, 4.0),
        Span(4, 4.0, 4.0),
        Span(5, 3.5, 3.5),
    )
    assert moments(plan, spans, -1.0).tolist() == [-1.0, -1.0, 1.0, 2.0, 3.0, 4.0, 4.0]


@pytest.mark.parametrize("seed", range(6))
def test_stairs_show_the_fullest_moment_of_every_column(seed: int) -> None:
    rng = np.random.default_rng(seed)
    nbytes = rng.integers(0, 100, (40, len(PARTS)))
    times = np.sort(rng.integers(0, 30, 40)).astype(float)
    times[0] = 0.0
    found = stairs(nbytes, times, (0.0, 30.0), 15)
    shown = found.nbytes[np.searchsorted(found.starts, np.arange(15), side="right") - 1]
    totals = nbytes.sum(axis=1)
    for column in range(15):
        begin, end = 2.0 * column, 2.0 * column + 2.0
        inside = [row for row in range(40) if begin <= times[row] < end]
        before = [row for row in range(40) if times[row] < begin]
        inside += before[-1:]
        assert shown[column].sum() == max(totals[row] for row in inside)
    assert (np.diff(found.starts) > 0).all()
    assert all((a != b).any() for a, b in itertools.pairwise(found.nbytes))


def test_a_plan_that_follows_itself_is_shown_in_its_usual_round() -> None:
    program, machine = programs.decode(), programs.tiny_machine(device=8192)
    plan = programs.naive_plan(program, machine)
    spans = usual_spans(plan, program, machine, COST)
    last = max(i for i, action in enumerate(plan.actions) if isinstance(action, Run))
    assert spans[last].end_s == pytest.approx(plan_seconds(plan, program, machine, COST), rel=1e-12)


@pytest.mark.parametrize("most", [1, 3, 1000])
def test_blocks_leave_nothing_out_and_never_overlap(most: int) -> None:
    plan, program, machine = random_case(3)
    spans = usual_spans(plan, program, machine, COST)
    found = lane_blocks(plan, program, spans, most)
    summary = summarize(plan, program, machine, COST)
    assert found.keys() == {lane for lane, use in summary.lanes.items() if use.actions}
    for lane, blocks in found.items():
        use = summary.lanes[lane]
        assert sum(block.count for block in blocks) == use.actions
        assert sum(block.nbytes for block in blocks) == use.nbytes
        assert sum(block.busy_s for block in blocks) == pytest.approx(use.busy_s)
        assert len(blocks) <= max(most, 1)
        assert all(one.end_s <= after.start_s for one, after in itertools.pairwise(blocks))


def test_spans_that_were_measured_over_each_other_are_laid_side_by_side() -> None:
    plan = Plan("", "", (), (Run("a"), Run("b"), Free("c", "device")), ())
    spans = [Span(0, 0.0, 2.0), Span(1, 1.0, 3.0), Span(2, 0.0, 9.0)]
    assert lane_spans(plan, spans) == {"compute": [Span(0, 0.0, 2.0), Span(1, 2.0, 3.0)]}


# ---- arrays ----


def test_arrays_have_rows_of_their_own_while_there_is_room() -> None:
    chapter = naive_chapter()
    rows, places = rows_of(
        chapter.plan, chapter.program, chapter.predicted, chapter.summary.arrays, 1000
    )
    assert [row.name for row in rows] == list(chapter.program.arrays)
    assert places == {name: place for place, name in enumerate(chapter.program.arrays)}
    table = rows[places["table"]]
    reads = [i for i, a in enumerate(chapter.plan.actions) if a in (Run("embed"), Run("head"))]
    assert table.read_count == 2
    assert table.first_read == (reads[0], chapter.predicted[reads[0]].start_s)


def test_arrays_that_differ_in_a_number_share_a_row_where_there_is_none() -> None:
    chapter = naive_chapter()
    rows, places = rows_of(
        chapter.plan, chapter.program, chapter.predicted, chapter.summary.arrays, 8
    )
    layers = next(row for row in rows if row.name == "layer*.weight")
    assert (layers.count, layers.nbytes, layers.read_count) == (3, 400 + 440 + 480, 3)
    assert sum(row.count for row in rows) == len(chapter.program.arrays) == len(places)
    total = sum(spec.nbytes for spec in chapter.program.arrays.values())
    assert sum(row.nbytes for row in rows) == total
    assert rows[places["layer2.weight"]] is layers
    first = chapter.plan.actions.index(Run("layer0"))
    assert layers.first_read == (first, chapter.predicted[first].start_s)


def told_of(plan: Plan, program: Program, machine: Machine) -> dict[str, str]:
    """What a page says of each array."""
    return stories(plan, program, summarize(plan, program, machine, COST).arrays)


def test_reasons_follow_from_the_plan() -> None:
    machine = programs.tiny_machine(device=4096)
    program = programs.decode()
    plan = programs.naive_plan(program, machine)
    why = told_of(plan, program, machine)
    assert why["layer1.weight"] == (
        "Comes over nvme->device: nothing keeps it, though all weights that are read would fit; "
        "step layer1 reads it."
    )
    assert why["layer0.cache"] == "Given, and stays: what comes next needs it."
    assert why["h1"] == (
        "Made by step layer0, last read by step layer1, then freed: others get its room."
    )
    # Of 1,756 B of weights a plan has to do without some where others take 1,000 B of 1,500 B.
    tight = told_of(plan, program, machine.with_capacities({"device": 1500}))
    assert tight["table"] == (
        "Comes over nvme->device: there is no room to keep it; 2 steps read it, the first is embed."
    )


def test_room_that_the_next_plan_needs_is_the_reason_in_text_data_and_page() -> None:
    # Two layers of 256 B and two values of 256 B are 1,024 B: all of it would fit, but for
    # 256 B that only another plan reads.
    chain = programs.chain(layers=2)
    other = dataclasses.replace(chain.arrays["w0"], name="other")
    program = Program({**chain.arrays, "other": other}, chain.steps, chain.outputs)
    machine = programs.tiny_machine(device=1024)
    home = tuple(Residence(name, "nvme") for name in ("w0", "w1", "other"))
    kept = Residence("other", "device", offset=0)
    actions = (
        *(Copy("w0", "nvme", "device"), Run("layer0"), Free("x", "device"), Free("w0", "device")),
        *(Copy("w1", "nvme", "device"), Run("layer1"), Free("h0", "device"), Free("w1", "device")),
    )
    plan = Plan(
        program.digest,
        machine.digest,
        (*home, kept, Residence("x", "device")),
        actions,
        (*home, kept, Residence("h1", "device")),
        {0: 256, 4: 256},
    )
    verify(plan, program, machine)
    summary = summarize(plan, program, machine, COST)
    assert (
        "  streamed from nvme: 2 arrays, 512 B\n    their room is kept for the next plan\n"
        in to_text({"first": summary})
    )
    assert "  stay on the device: 1 arrays, 256 B\n    another plan reads them\n" in to_text(
        {"first": summary}
    )
    said = {one["name"]: one["why"] for one in to_dict({"first": summary})["arrays"]}
    assert said["w1"] == "streamed: its room is kept for the next plan; comes from nvme"
    assert said["other"] == "pinned: another plan reads it"
    why = stories(plan, program, summary.arrays)
    assert why["w1"] == (
        "Comes over nvme->device: its room is kept for the next plan; step layer1 reads it."
    )
    assert why["other"] == (
        "Stays on the device: another plan reads it; no step of this plan reads it."
    )
    # 256 B more hold both.
    roomy = told_of(plan, program, machine.with_capacities({"device": 1280}))
    assert "nothing keeps it, though all weights that are read would fit" in roomy["w1"]


def test_reasons_of_what_stays_leaves_or_is_not_read() -> None:
    program = programs.chain(layers=2)
    machine = programs.tiny_machine(device=4096)
    spare = dataclasses.replace(program.arrays["w0"], name="spare")
    other = dataclasses.replace(program.arrays["w0"], name="other")
    program = Program({**program.arrays, "spare": spare, "other": other}, program.steps, ("h1",))
    names = ("w0", "w1", "spare", "other")
    rests = tuple(Residence(name, "nvme") for name in names)
    kept = tuple(
        Residence(n, "device", offset=512 * i) for i, n in enumerate(("w0", "w1", "other"))
    )
    actions = (
        Run("layer0"),
        Free("x", "device"),
        Copy("h0", "device", "nvme"),
        Free("h0", "device"),
        Copy("h0", "nvme", "device"),
        Free("h0", "nvme"),
        Run("layer1"),
        Free("h0", "device"),
    )
    entry = (*rests, *kept, Residence("x", "device"))
    left = (*rests, *kept, Residence("h1", "device"))
    plan = Plan(program.digest, machine.digest, entry, actions, left)
    verify(plan, program, machine)
    why = told_of(plan, program, machine)
    assert why["w0"] == "Stays on the device: every pass reads it; step layer0 reads it."
    assert why["other"].startswith("Stays on the device: another plan reads it")
    assert why["spare"] == "Stays in its file: no step of this plan reads it."
    assert why["h0"] == (
        "Leaves after step layer0, is back before step layer1: others need its room meanwhile."
    )
    assert why["x"] == "Given, last read by step layer0, then freed: others get its room."
    assert why["h1"] == "Made by step layer1, and stays: what comes next needs it."


@pytest.mark.parametrize("seed", range(8))
def test_every_array_of_any_plan_has_one_reason_in_text_data_and_page(seed: int) -> None:
    plan, program, machine = random_case(seed)
    summary = summarize(plan, program, machine, COST)
    text, why = to_text({"it": summary}), stories(plan, program, summary.arrays)
    assert why.keys() == program.arrays.keys()
    for use in summary.arrays:
        assert f": {of_one(use.reason)}" in why[use.name]
        assert f"{use.role}: {of_one(use.reason)}" in use.why
        if use.role in ("pinned", "streamed", "spilled"):
            assert f"    {of_many(use.reason)}\n" in text


def test_sentences_say_what_stays_what_moves_and_what_sets_the_pace() -> None:
    stays, moves, pace, others = sentences(naive_chapter())
    # The table is read twice; the disk takes 1 us for a byte, a step up to 2 ms.
    assert (
        stays == "0 B of the 1.71 KiB of weights that are read stay on the device: 0 of 7 arrays."
    )
    assert moves == "What moves in every pass: 2.11 KiB over nvme->device."
    assert pace.startswith("compute is busy for 3.51 ms of ")
    assert others.startswith("The best plain way, 'tail spill', would take ")


def test_where_a_plain_way_is_as_fast_a_sentence_says_so() -> None:
    chapter = naive_chapter()
    as_fast = {"tail spill": chapter.summary.seconds, "lru": 2 * chapter.summary.seconds}
    summary = dataclasses.replace(chapter.summary, baselines=as_fast)
    *_, others = sentences(dataclasses.replace(chapter, summary=summary))
    assert others == "Nothing faster than the plain way 'tail spill' was found."


# ---- the page ----


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("host", [None, 1 << 20])
def test_the_numbers_of_a_page_are_those_of_the_plan(host: int | None, measured: bool) -> None:
    chapter = naive_chapter(measured=measured, host=host)
    data = told(page([chapter], COVER))
    assert data == json.loads(json.dumps(page_data([chapter], COVER)))
    assert (data["title"], data["first_token_s"], data["total_s"]) == ("A title", 1.5, 9.25)
    (shown,) = data["chapters"]
    plan, program, machine = chapter.plan, chapter.program, chapter.machine
    assert shown["seconds"] == plan_seconds(plan, program, machine, COST)
    assert shown["bound_s"] == chapter.summary.bound.seconds
    assert shown["gap"] == chapter.summary.gap
    assert [shown[name] for name in ("count", "tokens", "moving_s")] == [3, 2, 0.5]
    peaks = verify(plan, program, machine)
    assert {tier["name"]: tier["peak_bytes"] for tier in shown["tiers"]} == peaks
    views = ["predicted", *(["measured"] if measured else [])]
    for tier in shown["tiers"]:
        assert tier["capacity_bytes"] == machine.tier(tier["name"]).capacity_bytes
        for view in views:
            columns = tier["views"][view]["parts"]
            many = len(tier["views"][view]["starts"])
            full = [col if isinstance(col, list) else [col] * many for col in columns]
            assert max(map(sum, zip(*full, strict=True))) == tier["peak_bytes"]
    moved = {lane["name"]: lane["nbytes"] for lane in shown["lanes"]}
    for link in machine.links:
        sizes = [
            program.arrays[one.array].nbytes
            for one in plan.actions
            if isinstance(one, Copy) and (one.source, one.target) == (link.source, link.target)
        ]
        assert moved[f"{link.source}->{link.target}"] == sum(sizes)
    for lane in shown["lanes"]:
        assert list(lane["views"]) == views
        for view in views:
            assert sum(lane["views"][view]["nbytes"]) == lane["nbytes"]
            assert sum(lane["views"][view]["count"]) == lane["actions"]
    arrays = shown["arrays"]
    names = [data["texts"][number] for number in arrays["name"]]
    sizes = {name: spec.nbytes for name, spec in program.arrays.items()}
    assert dict(zip(names, arrays["nbytes"], strict=True)) == sizes
    assert shown["baselines"] == [["resident", None], ["tail spill", 2.5]]
    assert shown["lines"] == (
        [["a pass", "s", 1.0, 2.0], ["device peak", "B", 4096.0, 5000.0]] if measured else []
    )


class Elements(HTMLParser):
    """All elements of a page with their attributes, and the text in script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self._within = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._within = tag

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within in self.raw:
            self.raw[self._within].append(data)


def hostile_chapter() -> Chapter:
    program = renamed(programs.chain(), "w1", HOSTILE)
    machine = programs.tiny_machine()
    return chapter_of(programs.naive_plan(program, machine), program, machine, name=HOSTILE)


def test_no_name_becomes_markup() -> None:
    cover = dataclasses.replace(COVER, title=HOSTILE, lines=(HOSTILE,), assumptions={"a": HOSTILE})
    text = page([hostile_chapter()], cover)
    tame = Elements(page([naive_chapter()], COVER))
    wild = Elements(text)
    assert [tag for tag, _ in wild.found] == [tag for tag, _ in tame.found]
    assert "<img" not in text
    data = told(text)
    assert data["title"] == HOSTILE == data["chapters"][0]["name"]
    assert HOSTILE in data["texts"]


def test_a_page_loads_nothing_and_runs_only_its_own_script() -> None:
    text = page([naive_chapter()], COVER)
    elements = Elements(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bfetch\(|XMLHttp|import\(|eval\(", text)
    for tag, attributes in elements.found:
        assert not {"src", "action", "onload", "onclick", "style"} & attributes.keys(), tag
        assert attributes.get("href", "#main") == "#main"
    policy = next(
        attributes["content"] or ""
        for _, attributes in elements.found
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; ")
    digests = [
        base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        for body in (elements.raw["style"][0], elements.raw["script"][-1])
    ]
    assert re.findall(r"sha256-([^']+)", policy) == digests
    assert "unsafe" not in policy


def test_the_same_plans_give_the_same_page() -> None:
    assert page([naive_chapter()], COVER) == page([naive_chapter()], COVER)


def test_a_page_of_many_actions_stays_small() -> None:
    program, machine = programs.chain(layers=2500), programs.tiny_machine(device=8192)
    one = chapter_of(programs.naive_plan(program, machine), program, machine, measured=True)
    assert len(one.plan.actions) == 10_000
    text = page([one, dataclasses.replace(one, name="again")], COVER)
    assert len(text.encode()) < MOST_BYTES
    first, _ = told(text)["chapters"]
    assert sum(first["arrays"]["count"]) == len(program.arrays)
    assert all(sum(one["views"]["measured"]["count"]) == one["actions"] for one in first["lanes"])


def test_a_page_of_nothing_or_of_another_plan_is_refused() -> None:
    with pytest.raises(ProgramError, match="no plans"):
        page([], COVER)
    chapter = naive_chapter()
    wrong = dataclasses.replace(chapter, measured=twice(chapter.predicted)[1:])
    with pytest.raises(ProgramError, match=r"'decode' has \d+ spans, its plan \d+ actions"):
        page([wrong], COVER)
