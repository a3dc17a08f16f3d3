"""The page under a pointer, in a real browser: what it says of the place that is pointed at."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import programs
import pytest
from browser import Browser
from report_pages import COVER, chapter_of, encoded, naive_chapter

from memsched.report import page_data as pages
from memsched.report.chapter import Chapter
from memsched.report.page import page
from memsched.report.page_data import page_data

SCHEMES = ("light", "dark")


def area(opened: Browser, selector: str) -> tuple[float, float, int, int]:
    """Left, top, width and height of an element, brought into the middle of the window."""
    find = f"document.querySelector({selector!r})"
    # What is said is gone as soon as the page scrolls: with the frame after it.
    opened.value(
        f"{find}.scrollIntoView({{block: 'center'}});"
        "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )
    left, top, width, height = opened.value(
        f"(b => [b.left, b.top, b.width, b.height])({find}.getBoundingClientRect())"
    )
    return left, top, int(width), int(height)


def squares(opened: Browser) -> dict[str, tuple[int, int]]:
    """A place on the map for each array that is large enough to hold a square of 16 pixels."""
    left, top, width, height = area(opened, "canvas.map")
    places = {}
    for x, y in itertools.product(range(8, width - 16, 40), range(8, height - 16, 40)):
        told = []
        for beyond in (0, 15):
            opened.hover(left + x + beyond, top + y + beyond)
            told.append(opened.value("tip.hidden ? '' : tip.querySelector('strong').textContent"))
        if told[0] == told[1] != "":
            places[told[0]] = (x, y)
    return places


def pixels(opened: Browser, selector: str, x: int, y: int) -> list[int]:
    """The colours of a square of 8 pixels, row by row."""
    found: list[int] = opened.value(
        f"[...new Uint32Array(document.querySelector({selector!r}).getContext('2d')"
        f".getImageData({x}, {y}, 8, 8).data.buffer)]"
    )
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_codec_has_a_pattern_of_its_own_on_the_map_and_in_the_legend(
    opened: Browser, tmp_path: Path, scheme: str
) -> None:
    codecs = {"layer1.weight": "int8", "layer2.weight": "int4:32"}
    path = tmp_path / "report.html"
    path.write_text(page([encoded(naive_chapter(), codecs)], COVER), "utf-8")
    opened.show(path, scheme=scheme)
    assert opened.complaints == []
    places = squares(opened)
    # Patterns repeat after 8 pixels, so squares that begin at multiples of 8 are alike.
    seen = {
        name: pixels(opened, "canvas.map", *places[name]) for name in ("layer0.weight", *codecs)
    }
    assert len(set(seen["layer0.weight"])) == 1, "raw is plain"
    plain = seen["layer0.weight"][0]
    drawn = {name: [colour != plain for colour in seen[name]] for name in codecs}
    assert any(drawn["layer1.weight"])
    assert any(drawn["layer2.weight"])
    assert drawn["layer1.weight"] != drawn["layer2.weight"]
    for name, codec in codecs.items():
        assert plain in seen[name], "its colour still shows where it comes from"
        assert pixels(opened, f'.legend [data-codec="{codec}"]', 8, 0) == seen[name]
    assert opened.value("document.querySelectorAll('.legend .pattern').length") == 2


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> Chapter:
    """A chain of so many layers that neither all arrays nor all actions are shown one by one. One
    weight is ten times as large as the others.
    """
    monkeypatch.setattr(pages, "ALL_ROWS", 0)
    monkeypatch.setattr(pages, "ALL_BLOCKS", 0)
    program, machine = programs.chain(layers=300), programs.tiny_machine(device=16384)
    large = dataclasses.replace(program.arrays["w150"], shape=(640,))
    program = dataclasses.replace(program, arrays={**program.arrays, "w150": large})
    return chapter_of(programs.naive_plan(program, machine), program, machine)


def told(opened: Browser, lane: str, start_s: float, end_s: float, data: dict[str, Any]) -> str:
    """What is said of the middle of a block, pointed at."""
    first_s, last_s = data["chapters"][0]["range_s"]
    selector = f'canvas[aria-label^="{lane.replace("->", " → ")}, predicted"]'
    left, top, width, height = area(opened, selector)
    share = ((start_s + end_s) / 2 - first_s) / (last_s - first_s)
    opened.hover(left + share * width, top + height / 2)
    return str(opened.value("tip.hidden ? '' : tip.innerText"))


def test_one_copy_of_many_arrays_in_a_row_is_told_as_itself(
    opened: Browser, tmp_path: Path, many: Chapter
) -> None:
    data = page_data([many], COVER)
    path = tmp_path / "report.html"
    path.write_text(page([many], COVER), "utf-8")
    opened.show(path)
    copy = next(i for i, one in enumerate(many.plan.actions) if getattr(one, "array", "") == "w150")
    span = many.predicted[copy]
    words = told(opened, "nvme->device", span.start_s, span.end_s, data)
    assert words.startswith("w150\n")
    assert "2,560 B" in words
    assert "layer150, at " in words
    assert "Of w0, the first of 300: " in words
    assert "*" not in words
    assert opened.complaints == []


@pytest.mark.parametrize(("lane", "stem"), [("nvme->device", "w"), ("compute", "layer")])
def test_a_block_of_many_actions_says_from_which_to_which(
    opened: Browser, tmp_path: Path, many: Chapter, lane: str, stem: str
) -> None:
    data = page_data([many], COVER)
    path = tmp_path / "report.html"
    path.write_text(page([many], COVER), "utf-8")
    opened.show(path)
    (blocks,) = (x["views"]["predicted"] for x in data["chapters"][0]["lanes"] if x["name"] == lane)
    ends = itertools.accumulate(blocks["count"])
    # Layers go by in order: so many before a block, and its own.
    place, end = next((n, end) for n, end in enumerate(ends) if n > 20 and blocks["count"][n] > 1)
    count = blocks["count"][place]
    words = told(opened, lane, blocks["start_s"][place], blocks["end_s"][place], data)
    assert words.startswith(f"The first of {count} actions: {stem}{end - count}\n")
    assert f"the last\n{stem}{end - 1}\n" in words
