"""The page in a real browser: its numbers are those of its data, and keys reach all of it."""

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import programs
import pytest
from browser import Browser
from report_pages import (
    COVER,
    HOSTILE,
    chapter_of,
    naive_chapter,
    renamed,
)

from memsched.report.page import page
from memsched.report.page_data import page_data

WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")
TABLES = "[...document.querySelectorAll('table')]"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A page of two plans, the second one measured, and its data."""
    chapters = [naive_chapter(host=1 << 20), naive_chapter(measured=True)]
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(chapters, COVER), "utf-8")
    return path, json.loads(json.dumps(page_data(chapters, COVER)))


def figure(opened: Browser, selector: str) -> float:
    """The exact value of a number that is shown."""
    shown = opened.value(f"document.querySelector({selector!r}).dataset.value")
    return float(shown)


def section(name: str) -> str:
    return f"document.querySelector('section[aria-label=\"{name}\"]')"


def column(opened: Browser, name: str, place: int) -> list[str]:
    """The values of a column of the table in a section, as they stand."""
    script = f"[...{section(name)}.querySelectorAll('tbody tr')]"
    values: list[str] = opened.value(f"{script}.map(row => row.cells[{place}].dataset.value)")
    return values


def test_the_numbers_on_the_page_are_those_of_its_data(
    opened: Browser, written: tuple[Path, dict[str, Any]]
) -> None:
    path, data = written
    opened.show(path)
    last = data["chapters"][-1]
    assert opened.value("document.title") == "A title"
    assert figure(opened, "#card-rate .figure") == pytest.approx(last["tokens"] / last["seconds"])
    assert figure(opened, "#card-first .figure") == data["first_token_s"]
    assert figure(opened, "#card-total .figure") == data["total_s"]
    assert figure(opened, "#card-gap .figure") == last["gap"]
    for tier in last["tiers"]:
        assert figure(opened, f'[data-tier="{tier["name"]}"] .figure') == tier["peak_bytes"]
    for lane in last["lanes"]:
        if lane["actions"]:
            share = figure(opened, f'[data-lane="{lane["name"]}"] .figure')
            assert share == pytest.approx(lane["busy_s"] / last["seconds"])
    assert column(opened, "Lanes", 0) == [lane["name"] for lane in last["lanes"]]
    assert [int(n) for n in column(opened, "Lanes", 2)] == [x["nbytes"] for x in last["lanes"]]
    lines = last["lines"]
    assert [float(n) for n in column(opened, "Predicted and measured", 1)] == [x[2] for x in lines]
    assert [float(n) for n in column(opened, "Predicted and measured", 2)] == [x[3] for x in lines]
    assert column(opened, "Other ways", 0) == ["this plan", "tail spill", "resident"]
    assert sorted(int(n) for n in column(opened, "All arrays", 1)) == sorted(
        last["arrays"]["nbytes"]
    )
    legend = opened.value(
        f"[...{section('Map of the arrays')}.querySelectorAll('.figure')]"
        ".reduce((sum, one) => sum + Number(one.dataset.value), 0)"
    )
    kinds = [data["texts"][number] for number in last["arrays"]["kind"]]
    mapped = zip(kinds, last["arrays"]["nbytes"], strict=True)
    assert legend == sum(n for kind, n in mapped if kind in ("weight", "cache", "feature"))
    words = opened.value("document.querySelector('#card-rate .figure').textContent")
    assert float(words.replace(",", "")) == pytest.approx(
        last["tokens"] / last["seconds"], rel=5e-3
    )
    assert opened.complaints == []


def test_what_a_solver_leaves_of_nothing_is_shown_as_nothing(
    opened: Browser, tmp_path: Path
) -> None:
    gains_s = {"disk": 3e-18, "compute": 0.0}
    chapter = dataclasses.replace(naive_chapter(), gains_s=gains_s)
    path = tmp_path / "report.html"
    path.write_text(page([chapter], COVER), "utf-8")
    opened.show(path)
    rows = f"[...{section('Prices')}.querySelectorAll('tbody tr')]"
    shown = opened.value(f"{rows}.map(row => row.cells[2].textContent)")
    assert shown == ["+0", "+0"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_its_window_and_has_its_picture_taken(
    opened: Browser,
    written: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    width: int,
    scheme: str,
) -> None:
    opened.show(written[0], width=width, scheme=scheme)
    assert opened.value("document.documentElement.scrollWidth") == width
    picture = base64.b64decode(opened.picture())
    (tmp_path / f"page-{width}-{scheme}.png").write_bytes(picture)
    assert picture.startswith(b"\x89PNG")
    assert int.from_bytes(picture[16:20]) == width
    drawn = opened.value(
        "[...document.querySelectorAll('canvas')].map(one => new Set(new Uint32Array("
        "one.getContext('2d').getImageData(0, 0, one.width, one.height).data.buffer)).size)"
    )
    assert len(drawn) >= 6
    assert min(drawn) >= 2, "a canvas with nothing on it"
    dark = opened.value("getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 24)"
    assert dark == (scheme == "dark")
    assert opened.complaints == []


def test_it_asks_for_nothing_but_itself(
    opened: Browser, written: tuple[Path, dict[str, Any]]
) -> None:
    opened.show(written[0])
    assert opened.requests == [written[0].as_uri()]


def test_tables_sort_by_click_and_by_key(
    opened: Browser, written: tuple[Path, dict[str, Any]]
) -> None:
    opened.show(written[0])
    buttons = f"{section('All arrays')}.querySelectorAll('th button')"
    sort = f"[...{section('All arrays')}.querySelectorAll('th')].map(th => th.ariaSort)"
    sizes = [int(n) for n in column(opened, "All arrays", 1)]
    assert sizes == sorted(sizes, reverse=True)
    assert opened.value(sort)[:2] == ["none", "descending"]
    opened.value(f"{buttons}[1].click()")
    assert [int(n) for n in column(opened, "All arrays", 1)] == sorted(sizes)
    assert opened.value(sort)[:2] == ["none", "ascending"]
    opened.value(f"{buttons}[0].focus()")
    opened.press("Enter")
    assert opened.value(sort)[:2] == ["ascending", "none"]
    names = column(opened, "All arrays", 0)
    assert names[:3] == ["h0", "h1", "h2"]
    assert len(names) == len(sizes)


def test_a_word_filters_arrays(opened: Browser, written: tuple[Path, dict[str, Any]]) -> None:
    opened.show(written[0])
    opened.value(
        "{const box = document.querySelector('.filter'); box.value = 'layer1 weight';"
        "box.dispatchEvent(new Event('input'))}"
    )
    assert set(column(opened, "All arrays", 0)) == {"layer1.weight", "layer1.scale"}


def test_the_keyboard_reaches_everything_and_leaves_it_again(
    opened: Browser, written: tuple[Path, dict[str, Any]]
) -> None:
    opened.show(written[0])
    seen = []
    for _ in range(80):
        opened.press("Tab")
        seen.append(
            opened.value(
                "(e => e === document.body ? 'body' : [e.tagName, e.id, e.className,"
                " e.getAttribute('aria-label') ?? e.textContent].join('|'))(document.activeElement)"
            )
        )
        if seen[-1] == "body":
            break
    assert seen[0].startswith("A||skip")
    kinds = [one.partition("|")[0] for one in seen]
    # An axis is no stop; two tiers less one that is empty, two lanes twice, and the map are.
    assert kinds.count("CANVAS") == 1 + 2 * 2 + 1
    assert any("tab-1" in one for one in seen)
    assert kinds.count("TR") == 1
    assert kinds.count("INPUT") == 1
    outline = opened.value(
        "(() => {const e = document.querySelector('th button'); e.focus({focusVisible: true});"
        "return getComputedStyle(e).outlineStyle})()"
    )
    assert outline == "solid"


def test_keys_walk_from_action_to_action_and_tell_what_they_find(
    opened: Browser, written: tuple[Path, dict[str, Any]]
) -> None:
    path, data = written
    opened.show(path)
    opened.value("[...document.querySelectorAll('canvas.lane')][0].focus()")
    opened.press("Home")
    opened.press("ArrowRight")
    last = data["chapters"][-1]
    compute = next(lane for lane in last["lanes"] if lane["name"] == "compute")
    step = data["texts"][compute["views"]["predicted"]["name"][1]]
    assert opened.value("document.querySelector('#tip strong').textContent") == step
    assert opened.value("document.getElementById('live').textContent").startswith(f"{step}: ")
    links = "[...document.querySelectorAll('canvas.lane')]"
    opened.value(f"{links}.find(c => c.ariaLabel.startsWith('nvme → device, predicted')).focus()")
    opened.press("Home")
    told = opened.value("document.getElementById('tip').innerText")
    for words in ("table", "400 B", "next use", "embed", "nothing keeps it"):
        assert words in told
    opened.press("Escape")
    assert opened.value("document.getElementById('tip').hidden")


def test_zoom_follows_keys_and_a_dragged_pointer(
    opened: Browser, written: tuple[Path, dict[str, Any]]
) -> None:
    opened.show(written[0])
    state = "document.querySelector('.tools [role=status]').textContent"
    whole = opened.value(state)
    assert whole.startswith("all ")
    opened.value("document.querySelector('canvas.lane').focus()")
    opened.press("+")
    assert " to " in opened.value(state)
    opened.press("0")
    assert opened.value(state) == whole
    opened.value("document.querySelector('canvas.lane').scrollIntoView({block: 'center'})")
    box = opened.value(
        "(b => [b.left, b.top + b.height / 2, b.width])"
        "(document.querySelector('canvas.lane').getBoundingClientRect())"
    )
    left, top, width = box
    places = [("mousePressed", 0.25), ("mouseMoved", 0.5), ("mouseReleased", 0.75)]
    for kind, share in places:
        x = left + share * width
        common = {"x": x, "y": top, "button": "left", "buttons": 1, "clickCount": 1}
        opened.ask("Input.dispatchMouseEvent", type=kind, **common)
    assert " to " in opened.value(state)


def test_tabs_choose_a_plan_and_views_choose_the_memory(
    opened: Browser, written: tuple[Path, dict[str, Any]]
) -> None:
    path, data = written
    opened.show(path)
    chosen = "[...document.querySelectorAll('[role=tab]')].map(t => t.ariaSelected)"
    assert opened.value(chosen) == ["false", "true"]
    opened.value("document.querySelector('[data-view=measured]').click()")
    assert opened.value("document.querySelector('[data-view=measured]').ariaPressed") == "true"
    opened.value("document.getElementById('tab-1').focus()")
    opened.press("ArrowLeft")
    assert opened.value(chosen) == ["true", "false"]
    assert opened.value("document.activeElement.id") == "tab-0"
    first = data["chapters"][0]
    for tier in first["tiers"]:
        assert figure(opened, f'[data-tier="{tier["name"]}"] .figure') == tier["peak_bytes"]
    assert opened.complaints == []


def test_a_hostile_name_is_shown_and_does_nothing(opened: Browser, tmp_path: Path) -> None:
    program, machine = renamed(programs.chain(), "w1", HOSTILE), programs.tiny_machine()
    plan = programs.naive_plan(program, machine)
    path = tmp_path / "hostile.html"
    path.write_text(page([chapter_of(plan, program, machine, name=HOSTILE)], COVER), "utf-8")
    opened.show(path)
    assert HOSTILE in column(opened, "All arrays", 0)
    assert opened.value("document.querySelector('[role=tab] b').textContent") == HOSTILE
    assert opened.value("document.querySelectorAll('img, script').length") == 2
    assert opened.complaints == []
