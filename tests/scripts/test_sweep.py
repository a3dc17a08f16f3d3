"""scripts/plan.py --sweep and --compare: rows, knees, plots, and what differs."""

import dataclasses
import functools
import importlib.util
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from browser import Browser

from memsched.cost import Roofline
from memsched.errors import DoesNotFitError
from memsched.machine import Machine
from memsched.plan import Action
from memsched.profiles import load_machine
from memsched.program import Program
from qwen3vl_jax.config import load_config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.planned.forecast import forecast
from qwen3vl_jax.planned.knees import knees, value_text
from qwen3vl_jax.planned.request import Request
from qwen3vl_jax.planned.sweep import Point, Sweep, parse_sweep, run_sweep
from qwen3vl_jax.planned.sweep_report import Swept, write_sweep

pytestmark = pytest.mark.usefixtures("shared_traces")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "plan.py"
MACHINE = ROOT / "configs" / "machines" / "i5-10210u-sm61-nvme.toml"
COMMON = (str(tiny.DATA / "dense"), "--machine", str(MACHINE), "--prompt-tokens", "20")
CONFIG = load_config(tiny.DATA / "dense")
FLOAT32 = np.dtype("float32")
REQUEST = Request(20, 7)


@functools.cache
def script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("plan_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def swept(text: str, points: int = 4) -> tuple[Sweep, tuple[Point, ...]]:
    sweep = parse_sweep(text, points)
    machine = load_machine(MACHINE)
    return sweep, run_sweep(sweep, CONFIG, REQUEST, machine, FLOAT32, lambda _: None)


def test_points_are_geometric_and_within_the_range() -> None:
    assert parse_sweep("device-memory=1GB..8GB", 4).values == (
        10**9,
        2 * 10**9,
        4 * 10**9,
        8 * 10**9,
    )
    assert parse_sweep("disk-rate=1GB/s..4GB/s", 3).values == (10**9, 2 * 10**9, 4 * 10**9)
    # Counts that would be twice the same are there once.
    assert parse_sweep("batch=1..3", 9).values == (1, 2, 3)


@pytest.mark.parametrize(
    "text", ["luck=1..2", "batch", "batch=1", "batch=2..1", "batch=a..b", "device-memory=0..1GB"]
)
def test_a_sweep_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_sweep(text, 4)


def test_each_point_is_the_forecast_of_its_machine() -> None:
    _, points = swept("device-memory=100kB..4MB")
    assert not points[0].fits
    assert points[-1].fits
    for point in points:
        machine = load_machine(MACHINE).with_capacities({"device": point.value})
        if point.fits:
            found = forecast(CONFIG, machine, REQUEST, dtype=FLOAT32)
            assert point.tokens_per_s == pytest.approx(1 / found.summaries["decode"].seconds)
        else:
            with pytest.raises(DoesNotFitError) as refused:
                forecast(CONFIG, machine, REQUEST, dtype=FLOAT32)
            assert point.smallest_bytes == refused.value.smallest


def test_knees_name_what_is_too_little_and_what_is_enough() -> None:
    sweep, points = swept("device-memory=200kB..4MB", 6)
    found = {knee.what.split(" ")[0]: knee.value for knee in knees(sweep, points)}
    least, enough = found["below"], found["beyond"]
    rates = {point.value: point.tokens_per_s for point in points}
    best = max(rate for rate in rates.values() if rate is not None)
    assert rates[enough] == pytest.approx(best, rel=0.01)
    machine = load_machine(MACHINE)

    def fits(nbytes: int) -> bool:
        try:
            forecast(CONFIG, machine.with_capacities({"device": nbytes}), REQUEST, dtype=FLOAT32)
        except DoesNotFitError:
            return False
        return True

    assert fits(least)
    assert not fits(least * 9 // 10)


def point(value: int, rate: float | None, lane: str = "nvme->device", arriving: int = 1) -> Point:
    return Point(value, rate, 1.0, lane, value, 0, arriving, refused="" if rate else "too little")


def test_knees_of_a_curve_made_by_hand() -> None:
    sweep = Sweep("device-memory", (1, 2, 3, 4, 5))
    curve = [
        point(10**9, 1.0),
        point(2 * 10**9, 9.2),
        point(3 * 10**9, 10.0, "compute", 0),
        point(4 * 10**9, 10.0, "compute", 0),
    ]
    assert [knee.what for knee in knees(sweep, curve)] == [
        "2 GB has 92% of the best tokens/s",
        "beyond 3 GB no more tokens/s: all weights that a token reads fit",
        "between 2 GB and 3 GB the limit changes from nvme->device to compute",
    ]
    counts = Sweep("batch", (1, 2, 3))
    found = knees(counts, [point(1, 1.0), point(2, 2.0), point(3, None)])
    assert [knee.what for knee in found] == ["beyond 2 it is refused"]
    assert [knee.what for knee in knees(counts, [point(1, None)])] == ["all of them are refused"]
    rising = knees(counts, [point(1, 1.0), point(2, 2.0)])
    assert [knee.what for knee in rising] == [
        "up to 2 more of it gives more tokens/s: sweep further"
    ]
    flat = knees(counts, [point(1, 1.0), point(2, 1.0)])
    assert [knee.what for knee in flat] == ["more of it gives no more tokens/s"]


def test_one_point_that_fits_says_nothing_of_more() -> None:
    sweep = Sweep("device-memory", (10**9, 2 * 10**9))
    found = knees(sweep, [point(10**9, None), point(2 * 10**9, 5.0)])
    assert [knee.what for knee in found] == ["below 2 GB it is refused"]
    assert knees(sweep, [point(10**9, 5.0)]) == ()


def test_the_first_token_has_a_knee_where_it_still_comes_sooner() -> None:
    sweep = Sweep("device-memory", (1, 2, 3, 4))
    rates, seconds = (1.0, 2.0, 2.0, 2.0), (4.0, 3.0, 1.0, 1.0)
    curve = [
        dataclasses.replace(point(value * 10**9, rate), first_token_s=first_s)
        for value, rate, first_s in zip((1, 2, 3, 4), rates, seconds, strict=True)
    ]
    found = {knee.what: knee.value for knee in knees(sweep, curve)}
    assert found == {
        "beyond 2 GB no more tokens/s: nvme->device is the limit": 2 * 10**9,
        "up to 3 GB the first token comes sooner: from 3 s to 1 s": 3 * 10**9,
    }
    flat = [dataclasses.replace(one, tokens_per_s=1.0) for one in curve]
    assert [knee.what for knee in knees(sweep, flat)] == [
        "more of it gives no more tokens/s",
        "up to 3 GB the first token comes sooner: from 4 s to 1 s",
    ]
    # Where tokens/s rise as long, or the first token only comes later, there is no such knee.
    rising = [dataclasses.replace(one, tokens_per_s=one.value / 1e9) for one in curve]
    later = [dataclasses.replace(one, first_token_s=one.value / 1e9) for one in curve]
    for ones in (rising, later):
        assert not any("first token" in knee.what for knee in knees(sweep, ones))


def test_values_are_written_as_people_write_them() -> None:
    assert value_text(Sweep("device-memory", ()), 3.2e9) == "3.2 GB"
    assert value_text(Sweep("disk-rate", ()), 2.5e8) == "250 MB/s"
    assert value_text(Sweep("batch", ()), 12) == "12"


def test_other_axes_change_what_they_say() -> None:
    _, rates = swept("disk-rate=10MB..1GB", 3)
    firsts = [one.first_token_s for one in rates]
    # All weights come from the disk once: a hundred times the rate is sooner by far.
    assert firsts[0] is not None
    assert firsts[-1] is not None
    assert firsts[0] > 10 * firsts[-1]
    _, batches = swept("batch=1..4", 3)
    assert [one.value for one in batches] == [1, 2, 4]
    assert (batches[-1].tokens_per_s or 0) > (batches[0].tokens_per_s or 0)
    _, contexts = swept("context=5..64", 3)
    assert not contexts[0].fits
    assert "no more than answer" in contexts[0].refused
    assert contexts[-1].fits


def toml_with_arrays_of_at_most(largest_bytes: int, folder: Path) -> Path:
    """The machine's file, with another limit for one array of its device."""
    text, limit = MACHINE.read_text(), 'max_array_bytes = "512MiB"'
    assert text.count(limit) == 1
    path = folder / "machine.toml"
    path.write_text(text.replace(limit, f"max_array_bytes = {largest_bytes}"))
    return path


@pytest.mark.parametrize(
    ("arguments", "array"),
    [
        (("--sweep", "batch=1..4096"), "array 'x' "),
        (("--sweep", "context=256..2048", "--batch", "64"), "array 'cache.0.keys' "),
    ],
)
def test_a_point_with_an_array_too_large_for_a_tier_is_refused_and_the_others_stay(
    arguments: tuple[str, ...], array: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = toml_with_arrays_of_at_most(8 << 20, tmp_path)
    common = [COMMON[0], "--machine", str(machine), "--points", "2", "--json"]
    assert script().main([*common, *arguments]) == 0
    small, large = json.loads(capsys.readouterr().out.splitlines()[-1])["points"]
    assert small["fits"]
    assert not large["fits"]
    assert large["refused"].startswith(array)
    assert "takes at most 8,388,608 B in one array; lower the batch or" in large["refused"]


class TwiceAsLong:
    """A machine that was measured to take twice as long for everything."""

    def seconds(self, action: Action, program: Program, machine: Machine) -> float:
        return 2 * Roofline().seconds(action, program, machine)


def test_what_was_learned_of_the_machine_decides() -> None:
    sweep, nominal = swept("device-memory=100kB..4MB", 3)
    machine = load_machine(MACHINE)
    learned = run_sweep(
        sweep, CONFIG, REQUEST, machine, FLOAT32, lambda _: None, cost=TwiceAsLong()
    )
    pairs = list(zip(nominal, learned, strict=True))
    assert any(one.fits for one, _ in pairs)
    for one, other in pairs:
        assert one.fits == other.fits
        if one.tokens_per_s and other.tokens_per_s:
            assert other.tokens_per_s == pytest.approx(one.tokens_per_s / 2)


def test_the_script_prints_writes_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [*COMMON, "--sweep", "device-memory=100kB..4MB", "--points", "3"]
    reports = [f"--report={tmp_path / name}" for name in ("a.html", "a.png", "a.txt")]
    assert script().main([*common, *reports]) == 0
    out = capsys.readouterr().out
    assert "it is refused" in out
    assert max(map(len, out.splitlines())) <= 100
    assert (tmp_path / "a.txt").read_text() in out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "a.html").read_text()
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http-equiv", "")
    assert script().main([*common, "--json"]) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert data["axis"] == "device-memory"
    assert "nothing was measured" in data["cost_model"]
    assert f"times: {data['cost_model']}" in out
    assert [one["fits"] for one in data["points"]] == [False, True, True, True]
    assert page.count("<tr>") == 1 + len(data["points"])
    assert {knee["what"].split(" ")[0] for knee in data["knees"]} >= {"below", "beyond"}


@pytest.mark.parametrize("axis", ["disk-rate=200MB/s..12.5GB/s", "context=4096..262144"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_can_be_read_in_its_window(
    opened: Browser, tmp_path: Path, width: int, axis: str
) -> None:
    sweep, path = parse_sweep(axis, 5), tmp_path / "sweep.html"
    points = tuple(
        Point(value, 0.000123 * 7**place, 1234.5 / 7**place, "nvme->device")
        for place, value in enumerate(sweep.values)
    )
    title = "qwen3_vl_moe, bfloat16, on i5-10210u-sm61-nvme: " + sweep.axis
    write_sweep(path, Swept(title, "the machine's rates; nothing was measured", sweep, points))
    opened.show(path, width=width)
    assert opened.value("document.documentElement.scrollWidth") == width
    assert opened.value("document.querySelectorAll('svg').length") == 2
    heights = opened.value(
        "[...document.querySelectorAll('svg text')].map(text =>"
        "parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a)"
    )
    assert len(heights) == 2 * (1 + 5 + 5)
    assert all(10 <= height <= 20 for height in heights), heights
    boxes = "[...s.querySelectorAll('text')].map(text => text.getBoundingClientRect())"
    plots = f"[...document.querySelectorAll('svg')].map(s => [s.getBoundingClientRect(), {boxes}])"
    outside, overlapping = opened.value(
        "(all => [all.flatMap(([svg, texts]) => texts.filter(text => text.left < svg.left"
        "|| text.right > svg.right || text.bottom > svg.bottom)).length,"
        "all.flatMap(([, texts]) => texts.flatMap((a, n) => texts.slice(n + 1).filter(b =>"
        "a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom))).length])"
        f"({plots})"
    )
    assert (outside, overlapping) == (0, 0)
    assert opened.complaints == []


def test_two_plans_are_compared_from_either_kind_of_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, large = str(tmp_path / "small.json"), str(tmp_path / "large.json")
    assert script().main([*COMMON, "--device-memory", "600kB", "--report", small]) == 0
    assert script().main([*COMMON, "--device-memory", "9MB", "--save-plan", large]) == 0
    capsys.readouterr()
    assert script().main(["--compare", small, large, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    reports = [json.loads(Path(small).read_text()), json.loads(Path(large).read_text())["report"]]
    rows = {row["what"]: (row["before"], row["after"]) for row in found["rows"]}
    assert rows["tokens_per_s"] == tuple(one["tokens_per_s"] for one in reports)
    before, after = (
        {one["name"]: one["why"].split(":")[0] for one in report["arrays"]} for report in reports
    )
    kept = {name for name in before if (before[name], after[name]) == ("streamed", "pinned")}
    assert kept == {one["name"] for one in found["moved"] if one["after"] == "pinned (device)"}
    assert kept
    assert [one["what"] for one in found["facts"]] == ["capacity_bytes.device"]
    assert set(found["alike"]) >= {"model", "machine", "dtype", "request", "fits"}
    assert script().main(["--compare", small, large]) == 0
    assert "from streamed (host) to pinned (device)" in capsys.readouterr().out


def test_a_plan_and_a_refusal_of_another_model_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fits, refused = str(tmp_path / "fits.json"), str(tmp_path / "refused.json")
    assert script().main([*COMMON, "--report", fits]) == 0
    other = [str(tiny.DATA / "moe"), *COMMON[1:], "--device-memory", "9KB"]
    assert script().main([*other, "--report", refused]) == 3
    capsys.readouterr()
    assert script().main(["--compare", fits, refused, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"model", "capacity_bytes.device", "fits"} == {one["what"] for one in found["facts"]}
    assert (found["refused"], found["rows"]) == (["after"], [])


@pytest.mark.parametrize("number", ["1e400", "1" + "0" * 400])
def test_a_number_out_of_range_is_told_with_its_file(
    number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text('{"phases": {}}')
    bad.write_text(f'{{"phases": {{}}, "tokens_per_s": {number}}}')
    assert script().main(["--compare", str(good), str(bad), "--json"]) == 4
    out, error = capsys.readouterr()
    assert error.startswith(f"error: {bad}: tokens_per_s must be a number from 0 to 1e+30, found ")
    assert not out
