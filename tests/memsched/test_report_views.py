"""Reports on a terminal and in files; what more would be worth; what differs between two."""

import errno
import io
import os
import re
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import programs
import pytest
from test_report import CHAIN, COST, PINNED, SMALL

from memsched.errors import DamagedError, StoreError
from memsched.report import summarize
from memsched.report.difference import Fact, Moved, Row, difference, rows_dict
from memsched.report.difference import view as difference_view
from memsched.report.line_plot import Curve, plot_svg
from memsched.report.rendering import WIDTH, columns, plain, show
from memsched.report.text import to_text, view
from memsched.report.what_if import gains_s
from memsched.whole_file import write_together, write_whole

SUMMARY = summarize(PINNED, CHAIN, SMALL, COST, {"lru": 1.0})


class Terminal(io.StringIO):
    """A file that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, file: io.StringIO, **environment: str) -> str:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)
    show(view({"decode": SUMMARY}), file)
    return file.getvalue()


def test_colours_are_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[" in shown(monkeypatch, Terminal(), COLUMNS="100")
    assert shown(monkeypatch, io.StringIO()) == to_text({"decode": SUMMARY})
    assert "\x1b" not in to_text({"decode": SUMMARY})


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, Terminal(), NO_COLOR="1", COLUMNS="100")
    # Bold stays; 30 to 49 would be colours.
    assert not any(f"\x1b[{code}" in text or f";{code}m" in text for code in range(30, 50))


@pytest.mark.parametrize("width", ["20", "80", "300"])
def test_a_terminal_of_any_width_shows_every_word_and_digit(
    width: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(monkeypatch, Terminal(), COLUMNS=width)
    assert re.sub(r"\x1b\[[\d;]*m", "", text) == to_text({"decode": SUMMARY})


def test_a_table_keeps_names_and_numbers_and_ends_no_line_in_blanks() -> None:
    text = plain(columns(("<name", ">number", "<note"), [("n" * 60, "1,000", "x" * 80)]))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "n" * 60 in text
    assert "1,000" in text
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_markup_in_names_is_only_text() -> None:
    assert "[red]w[/red]" in plain(columns(("<",), [("[red]w[/red]",)]))


def test_what_more_is_worth_is_what_the_bound_falls() -> None:
    # A step holds 512 B of values and its weight of 256 B, so of the two others half can stay: of
    # 768 B 384 are read at 2e4 B/s, and not beside a step, where there is no room for what comes.
    # Computing takes 3 ms.
    machine = programs.tiny_machine(device=1024, nvme_bytes_per_s=2e4)
    gains = gains_s(summarize(PINNED, CHAIN, machine, COST), PINNED, CHAIN, machine, COST)
    assert gains == {
        "device": pytest.approx(384 / 2e4),
        "disk": pytest.approx(384 / 2e4 / 2),
        "compute": pytest.approx(3e-3 / 2),
    }
    # With room for all, only computing counts.
    assert gains_s(summarize(PINNED, CHAIN, SMALL, COST), PINNED, CHAIN, SMALL, COST) == {
        "device": 0.0,
        "disk": 0.0,
        "compute": pytest.approx(1.5e-3),
    }


def report(**changed: Any) -> dict[str, Any]:
    phase = {
        "seconds": 1.0,
        "bound_seconds": 0.5,
        "link_bytes": {"nvme->device": 100},
        "peak_bytes": {"device": 10},
    }
    arrays = [
        {"name": "a", "nbytes": 5, "tier": "nvme", "codec": "raw", "why": "streamed: no room"},
        {"name": "b", "nbytes": 7, "tier": "nvme", "codec": "raw", "why": "streamed: no room"},
    ]
    return {"tokens_per_s": 2.0, "phases": {"decode": phase | changed}, "arrays": arrays}


def test_two_reports_differ_in_these_figures_and_arrays() -> None:
    other = report(seconds=0.75, link_bytes={"nvme->device": 40, "host->device": 8})
    other["arrays"][1] |= {"tier": "device", "why": "pinned: stays"}
    found = difference(report(), other)
    assert found.rows == (
        Row("decode seconds", "s", 1.0, 0.75),
        Row("decode over nvme->device", "B", 100.0, 40.0),
        Row("decode over host->device", "B", None, 8.0),
    )
    assert found.same == 3
    assert found.moved == (Moved("b", 7, "streamed (nvme)", "pinned (device)"),)
    assert found.unmoved == 1
    text = plain(difference_view(found))
    assert "-25.0%" in text
    assert "from streamed (nvme) to pinned (device): 1 arrays, 7 B" in text
    assert rows_dict(found)["moved"][0]["name"] == "b"
    assert difference(report(), report()).rows == ()


def test_reports_say_first_what_they_are_for() -> None:
    said = {"model": "a", "machine": "m", "request": {"batch": 1, "images": [[64, 64]]}}
    one = report() | {"fits": True, "assumptions": said}
    other = report() | {"fits": True, "assumptions": said | {"model": "b"}}
    other["assumptions"] |= {"request": {"batch": 4000, "images": [[64, 64]]}}
    found = difference(one, other)
    assert found.facts == (Fact("model", "a", "b"), Fact("request.batch", "1", "4,000"))
    assert found.alike == ("machine", "fits")
    text = plain(difference_view(found))
    assert "the same in both: machine, fits" in text
    assert text.index("request.batch") < text.index("figures are the same")
    unsaid = plain(difference_view(difference(report(), one)))
    assert "nothing of model, machine, dtype and request is known" in unsaid


def test_a_refusal_has_no_figures_to_compare() -> None:
    refusal = {"fits": False, "phases": {}, "gap": None, "arrays": []}
    found = difference(report() | {"fits": True}, refusal)
    assert found.facts == (Fact("fits", "yes", "no"),)
    assert (found.refused, found.rows, found.moved) == (("after",), (), ())
    text = plain(difference_view(found))
    assert "after is a refusal: no plan to compare" in text
    assert "where they were" not in text


def test_codecs_and_arrays_of_one_alone_are_told() -> None:
    one, other = report(), report()
    one["arrays"][0]["codec"] = "int8"
    other["arrays"][1]["name"] = "c"
    found = difference(one, other)
    assert found.moved == (
        Moved("b", 7, "streamed (nvme)", None),
        Moved("c", 7, None, "streamed (nvme)"),
        Moved("a", 5, "streamed (nvme, int8)", "streamed (nvme)"),
    )
    text = plain(difference_view(found))
    assert "only before: streamed (nvme): 1 arrays, 7 B" in text
    assert "only after: streamed (nvme): 1 arrays, 7 B" in text
    assert "where they were" not in text
    nothing = difference(report() | {"arrays": []}, report() | {"arrays": []})
    assert "there are no arrays to compare" in plain(difference_view(nothing))
    assert "2 arrays are where they were" in plain(difference_view(difference(report(), report())))


def test_what_solvers_leave_is_no_difference_but_one_byte_is() -> None:
    one, other = report() | {"gap": 0}, report(seconds=1.0 + 1e-12) | {"gap": 4.441e-16}
    assert difference(one, other).rows == ()
    assert difference(one, other).same == 6
    big = [report(link_bytes={"nvme->device": nbytes}) for nbytes in (10**12, 10**12 + 1)]
    assert [row.what for row in difference(*big).rows] == ["decode over nvme->device"]
    assert [row.what for row in difference(one, report() | {"gap": 1e-3}).rows] == ["gap"]


@pytest.mark.parametrize(
    "broken",
    [
        {"fits": "yes"},
        {"assumptions": 1},
        {"assumptions": {"flops_per_s": float("inf")}},
        {"tokens_per_s": 10**400},
        {"tokens_per_s": float("inf")},
        {"gap": float("nan")},
        {"first_token_seconds": -1},
        {"phases": {"decode": {"peak_bytes": {"device": -1}}}},
        {"arrays": [{"name": "a", "nbytes": -1, "tier": "nvme", "why": "streamed"}]},
        {"arrays": [{"name": "a", "nbytes": 10**400, "tier": "nvme", "why": "streamed"}]},
        {"arrays": [{"name": "a", "nbytes": 1, "tier": "nvme", "why": "streamed", "codec": 1}]},
        {"phases": 1},
        {"phases": {"decode": []}},
        {"tokens_per_s": "fast"},
        {"arrays": {}},
        {"arrays": [{"name": "a"}]},
        {"arrays": [1]},
        {"phases": {"decode": {"link_bytes": {"x": True}}}},
        {"phases": {"\x1b[2J": {"seconds": 1}}},
        {"assumptions": {"request": {"\x1b[2J": 1}}},
        {"arrays": [{"name": "\x1b[2J", "nbytes": 1, "tier": "nvme", "why": "streamed"}]},
    ],
)
def test_a_report_that_is_none_is_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(DamagedError, match=r"^two\.json: .*make the report anew") as caught:
        difference(report(), report() | broken, names=("one.json", "two.json"))
    assert str(caught.value).isprintable()
    with pytest.raises(DamagedError, match=r"^one\.json: "):
        difference(report() | broken, report(), names=("one.json", "two.json"))


def test_a_plot_has_its_points_where_they_belong() -> None:
    svg = plot_svg(Curve("a < b", (1.0, 10.0, 100.0), (0.0, 2.0, 1.0)), (10.0, 1e9), str)
    root = xml.etree.ElementTree.fromstring(svg)
    assert root.attrib["aria-label"] == "a < b"
    circles = [(float(one.attrib["cx"]), float(one.attrib["cy"])) for one in root.iter("circle")]
    # The axis is logarithmic: 10 lies in the middle of 1 and 100.
    assert circles[1][0] == pytest.approx((circles[0][0] + circles[2][0]) / 2, abs=0.11)
    assert circles[2][1] == pytest.approx((circles[0][1] + circles[1][1]) / 2, abs=0.11)
    dotted = [one for one in root.iter("line") if "stroke-dasharray" in one.attrib]
    assert [float(one.attrib["x1"]) for one in dotted] == [circles[1][0]]


def test_a_file_appears_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.txt", "text")
    write_whole(tmp_path / "a.txt", b"\x00bytes")
    assert (tmp_path / "a.txt").read_bytes() == b"\x00bytes"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(StoreError, match="nowhere"):
        write_whole(tmp_path / "nowhere" / "a.txt", "text")


@pytest.mark.parametrize("done_syncs", [0, 1])
def test_files_that_belong_together_stay_as_they_were_if_one_of_them_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, done_syncs: int
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_together({first: "old", second: "old"})
    syncs = iter([os.fsync] * done_syncs)
    monkeypatch.setattr(os, "fsync", lambda file: next(syncs, _no_room)(file))
    # The last one is written first: it is the first one that appears first.
    failing = ("second", "first")[done_syncs]
    with pytest.raises(
        StoreError, match=f"{failing}: No space left on device; nothing was written$"
    ):
        write_together({first: "new", second: "new"})
    assert [file.read_text() for file in sorted(tmp_path.iterdir())] == ["old", "old"]
    monkeypatch.undo()
    write_together({first: "new", second: "new"})
    assert [file.read_text() for file in sorted(tmp_path.iterdir())] == ["new", "new"]


def _no_room(file: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
