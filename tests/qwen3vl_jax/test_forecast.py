"""Planning from a config.json alone: what is predicted agrees with counts made by hand."""

import dataclasses
import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from browser import Browser
from learned_costs import coefficients
from quick import least_s, slowness

from memsched.aot import Compiler, Workspace
from memsched.cost.learned import LearnedCost
from memsched.errors import DoesNotFitError
from memsched.machine import Machine
from memsched.plan import Run
from memsched.profiles import load_machine
from memsched.program import Program
from memsched.report.page import page
from memsched.tracing.function import Kernels
from qwen3vl_jax.config import Config, load_config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.network import abstract_network
from qwen3vl_jax.planned.chapters import forecast_chapters, forecast_cover
from qwen3vl_jax.planned.forecast import Forecast, forecast
from qwen3vl_jax.planned.forecast_data import assumptions, forecast_dict, refusal_dict
from qwen3vl_jax.planned.forecast_text import forecast_text
from qwen3vl_jax.planned.request import Request
from qwen3vl_jax.planned.skeleton import shape_network
from qwen3vl_jax.planned.works import traced_request, works_of

ROOT = Path(__file__).parents[2]
OFFICIAL = ROOT / "configs" / "models"
FLOAT32 = np.dtype("float32")
ROOMY = 1 << 30
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}


@functools.cache
def profile(name: str) -> Machine:
    return load_machine(ROOT / "configs" / "machines" / f"{name}.toml")


@functools.cache
def config(name: str) -> Config:
    return load_config(tiny.DATA / name)


@functools.cache
def planned(name: str, device_bytes: int, images: tuple[tuple[int, int], ...] = ()) -> Forecast:
    machine = profile("i5-10210u-sm61-nvme").with_capacities({"device": device_bytes})
    return forecast(config(name), machine, Request(20, 7, images), dtype=FLOAT32)


@functools.cache
def device_bytes(name: str = "dense") -> int:
    """Enough for all that decoding takes, but for half of its weights."""
    decode = planned(name, ROOMY).passes[-1]
    used = decode.summary.occupancy["device"].parts
    program = decode.traced.program
    read = {name for step in program.steps for name in step.reads} & {*program.of_kind("weight")}
    weights = sum(program.arrays[name].nbytes for name in read)
    return sum(used.values()) - used["weight"] + weights // 2


def found(name: str = "dense") -> Forecast:
    """Planned in so little that weights are streamed."""
    return planned(name, device_bytes(name))


@pytest.mark.parametrize("name", ["dense", "dense_tied", "moe", "moe_mixed"])
@pytest.mark.parametrize("rows", [None, 100])
def test_shapes_in_a_moment_are_those_of_the_network(name: str, rows: int | None) -> None:
    trees = [
        jax.tree_util.tree_flatten_with_path(make(config(name), dtype=FLOAT32, vocab_rows=rows))[0]
        for make in (abstract_network, shape_network)
    ]
    slow, quick = ([(jax.tree_util.keystr(p), x.shape, x.dtype) for p, x in t] for t in trees)
    assert len(slow) > 20
    assert quick == slow


def test_a_prompt_is_cut_like_the_model_cuts_it() -> None:
    whole = load_config(OFFICIAL / "qwen3-vl-2b-instruct.json")
    works = works_of(whole, Request(1100, 5, ((448, 448),) * 3, batch=2), np.dtype("bfloat16"))
    assert [(work.name, work.count) for work in works] == [
        ("vision", 1),
        ("vision 2", 1),
        ("prefill", 3),
        ("prefill 2", 1),
        ("scores", 1),
        ("decode", 5),
    ]
    # 448 x 448 pixels are 28 x 28 patches, 784, and 196 tokens: four frames, then two of the six.
    assert works[0].arrays[1].patches.shape == (4, 896, 1536)
    assert works[1].arrays[1].patches.shape == (2, 896, 1536)
    # 1,100 + 3 x (196 + 2) = 1,694 tokens: three times 512, and 158 that become 160.
    assert [work.arrays[0].shape[:2] for work in works[2:]] == [(2, 512), (2, 160), (2, 1), (2, 1)]
    # 1,176 features fill 1,280 rows, 1,699 slots become 1,792.
    assert works[2].arrays[3].tokens.shape == (1280, 2048)
    assert works[2].arrays[4][0].keys.shape == (16, 1792, 128)


def test_without_pictures_there_is_no_vision() -> None:
    works = works_of(config("dense"), Request(1, 1), FLOAT32)
    assert [work.name for work in works] == ["prefill", "scores", "decode"]
    assert works[0].arrays[0].shape == (1, 1, config("dense").text.hidden_size)
    assert works[0].arrays[3] is None


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request(100, 50, max_context=149), "149 is less than prompt and answer take, 150"),
        (Request(262_100, 50), "262,150 tokens is longer than the model takes, 262,144"),
    ],
)
def test_a_context_that_is_too_short_or_too_long_is_refused(request_: Request, says: str) -> None:
    whole = load_config(OFFICIAL / "qwen3-vl-2b-instruct.json")
    with pytest.raises(UsageError, match=says):
        request_.capacity(whole)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"images": ((1, 500),)}, {"images": ((0, 9),)}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Request(**wrong)


def test_what_a_token_moves_is_what_is_not_kept() -> None:
    decode = found().passes[-1]
    weights = {use.name: use for use in decode.summary.arrays if use.kind == "weight"}
    streamed = sum(use.nbytes for use in weights.values() if use.role == "streamed")
    read = {name for step in decode.traced.program.steps for name in step.reads} & set(weights)
    pinned = sum(use.nbytes for use in weights.values() if use.role == "pinned")
    assert streamed > 0
    assert decode.summary.link_bytes["host->device"] == streamed
    assert streamed == sum(weights[name].nbytes for name in read) - sum(
        use.nbytes for name, use in weights.items() if use.role == "pinned" and name in read
    )
    assert pinned <= device_bytes()


def test_phases_add_up() -> None:
    here = planned("dense", ROOMY, ((64, 64),))
    data, decode = forecast_dict(here), here.summaries["decode"]
    passes = {one["name"]: one for one in data["passes"]}
    prefill = data["phases"]["prefill"]
    assert prefill["seconds"] == pytest.approx(
        sum(passes[name]["seconds"] for name in ("prefill", "scores"))
    )
    assert data["phases"]["decode"]["seconds"] == decode.seconds
    assert data["tokens_per_s"] == pytest.approx(1 / decode.seconds)
    assert data["gap"] == pytest.approx(decode.seconds / decode.bound.seconds - 1, abs=1e-9)
    assert data["request_seconds"] == pytest.approx(
        sum(one["count"] * one["seconds"] + one["moving_seconds"] for one in passes.values())
    )
    # Everything is in files at first, and is on the device when the first pass begins.
    assert passes["vision"]["moving_seconds"] > 0
    for part in data["phases"].values():
        assert part["bound_seconds"] <= part["seconds"] * (1 + 1e-9)
        assert part["peak_bytes"]["device"] <= ROOMY


def test_the_plan_is_no_slower_than_the_plain_ways() -> None:
    ways = forecast_dict(found())["baselines"]
    assert ways["resident"] is None
    assert {"tail spill", "lru", "clock", "adaptive"} <= set(ways)
    seconds = found().summaries["decode"].seconds
    assert all(seconds <= way * 1.02 for way in ways.values() if way is not None)


def test_what_more_is_worth_is_said_of_slow_machines_too() -> None:
    machine = profile("i5-10210u-sm61-nvme").with_capacities({"device": device_bytes()})
    compute = dataclasses.replace(machine.compute, flops_per_s=1e6, bytes_per_s=1e6)
    links = tuple(dataclasses.replace(link, bytes_per_s=1e3) for link in machine.links)
    slow = dataclasses.replace(machine, compute=compute, links=links)
    here = forecast(config("dense"), slow, Request(20, 7), dtype=FLOAT32)
    gain = forecast_dict(here)["prices"]["bus"]
    assert 0 < gain < 0.005
    assert f"\n  a bus twice as fast: +{gain:.3g} tokens/s\n" in forecast_text(here)


def test_what_fits_stays() -> None:
    data = forecast_dict(planned("dense", ROOMY))
    assert data["phases"]["decode"]["link_bytes"]["host->device"] == 0
    assert list(data["baselines"]) == ["resident"]
    assert data["gap"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("calibrated", "says"),
    [
        (True, "learned from programs of 7 different shapes on this machine"),
        (False, "the profile's rates; nothing was measured, scripts/calibrate.py does that"),
    ],
)
def test_text_data_and_page_say_what_the_times_rest_on(calibrated: bool, says: str) -> None:
    machine = profile("laptop-cpu")
    cost = LearnedCost(coefficients(machine)) if calibrated else None
    here = forecast(config("dense"), machine, Request(20, 7), dtype=FLOAT32, cost=cost)
    assert forecast_dict(here)["assumptions"]["seconds"] == says
    assert forecast_cover(here).assumptions["seconds"] == says
    text = forecast_text(here)
    assert f"\n  times: {says}\n" in text
    # Only what was learned knows how copies and steps slow each other; the bound never counts it.
    assert ("contention aside: this one takes" in text) is calibrated


def test_text_data_and_page_say_what_the_process_takes_beside_the_plan() -> None:
    here = planned("dense", ROOMY)
    said = forecast_dict(here)["assumptions"]["process"]
    assert "Python, JAX, programs 0.35 to 0.5 GB, buffers 34 MB" in said
    assert f"\n  main memory beside it: {said}\n" in forecast_text(here)
    assert forecast_cover(here).assumptions["process"] == said


def test_a_refusal_says_what_times_would_have_rested_on() -> None:
    machine = profile("laptop-cpu")
    cost, asked = LearnedCost(coefficients(machine)), Request(20, 7)
    said = assumptions(config("dense"), machine, asked, "float32", cost, compiled=False)
    refused = refusal_dict({}, said)
    assert "from programs of 7 different shapes" in refused["assumptions"]["seconds"]


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_the_text_has_at_most_100_columns(name: str) -> None:
    lines = forecast_text(found(name)).splitlines()
    assert len(lines) > 50
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("name", ["dense", "moe"])
@pytest.mark.parametrize("machine", ["i5-10210u-sm61-nvme", "laptop-cpu"])
def test_a_refusal_names_budgets_that_work_and_are_the_least(name: str, machine: str) -> None:
    tight = profile(machine).with_capacities({"device": 4096})
    request = Request(20, 7, ((64, 64),))
    with pytest.raises(DoesNotFitError, match="raise --device-memory") as refused:
        forecast(config(name), tight, request, dtype=FLOAT32)
    least = refused.value.smallest
    assert set(least) == {tier.name for tier in tight.tiers}
    works = tight.with_capacities(least)
    assert (
        forecast(config(name), works, request, dtype=FLOAT32).smallest_bytes["device"]
        <= (least["device"])
    )
    less = works.with_capacities({"device": least["device"] * 9 // 10})
    with pytest.raises(DoesNotFitError):
        forecast(config(name), less, request, dtype=FLOAT32)


@pytest.mark.parametrize("batch", [4, 8, 16])
def test_caches_that_crowd_the_host_leave_a_plan_or_a_budget_that_works(batch: int) -> None:
    request = Request(20, 7, batch=batch)
    tracer = traced_request(config("dense"), request, FLOAT32)
    how: dict[str, Any] = {"dtype": FLOAT32, "tracers": lambda asked: tracer}
    for device, host in itertools.product((300_000, 1_000_000), (1_200_000, 1_600_000, 2_400_000)):
        machine = profile("i5-10210u-sm61-nvme").with_capacities({"device": device, "host": host})
        try:
            forecast(config("dense"), machine, request, **how)
        except DoesNotFitError as refused:
            larger = machine.with_capacities(refused.smallest)
            forecast(config("dense"), larger, request, **how)


def test_a_longer_context_takes_more() -> None:
    machine = profile("i5-10210u-sm61-nvme")
    short, long = (
        forecast(
            config("dense"),
            machine,
            Request(20, 7, max_context=tokens),
            dtype=FLOAT32,
        )
        for tokens in (64, 256)
    )
    text = config("dense").text
    more = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4 * (256 - 64)
    caches = [one.passes[-1].summary.occupancy["device"].parts["cache"] for one in (short, long)]
    assert caches[1] - caches[0] == more


def test_a_group_of_experts_changes_no_byte() -> None:
    decode = found("moe").passes[-1]
    names = {action.array for action in decode.plan.actions if not isinstance(action, Run)}
    assert names <= set(decode.traced.program.arrays)


@pytest.mark.parametrize(
    ("model", "machine", "most_s"),
    [("2b", "i5-10210u-sm61-nvme", 2.0), ("235b-a22b", "desktop-24gb", 30.0)],
    ids=["2b", "235b"],
)
def test_planning_without_a_weight_takes_seconds(model: str, machine: str, most_s: float) -> None:
    # In a process of its own: here every annotation is checked at every call. Seconds on a core of
    # 2.4 to 3 GHz; a busy machine takes up to half as much again, so it is tried again.
    command = [
        *(sys.executable, str(ROOT / "scripts" / "plan.py"), "--json", "--machine"),
        str(ROOT / "configs" / "machines" / f"{machine}.toml"),
        str(OFFICIAL / f"qwen3-vl-{model}-instruct.json"),
    ]

    def planned() -> float:
        done = subprocess.run(command, capture_output=True, check=True, env=ENVIRONMENT)
        return float(json.loads(done.stdout.splitlines()[-1])["plan_cpu_seconds"]) / slowness()

    assert least_s(planned, most_s) < most_s


class SaysAsMuch(Compiler):
    """Says the same of every kernel."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(jax.devices("cpu")[0])
        self.nbytes = nbytes
        self.estimated: dict[str, int] = {}

    def workspaces(self, program: Program, kernels: Kernels) -> tuple[Workspace, ...]:
        self.estimated |= {step.kernel: step.workspace_bytes for step in program.steps}
        return tuple(
            Workspace(name, self.estimated[name], self.nbytes)
            for name in dict.fromkeys(step.kernel for step in program.steps)
        )


@functools.cache
def compiled(nbytes: int) -> Forecast:
    machine = profile("i5-10210u-sm61-nvme").with_capacities({"device": ROOMY})
    return forecast(
        config("dense"),
        machine,
        Request(20, 7, ((64, 64),)),
        dtype=FLOAT32,
        compiler=SaysAsMuch(nbytes),
    )


def test_workspaces_of_a_compiler_replace_the_estimates() -> None:
    here, nbytes = compiled(5 << 20), 5 << 20
    decode = here.passes[-1].traced.program
    cache_bytes = sum(decode.arrays[name].nbytes for name in decode.of_kind("cache"))
    assert cache_bytes > 0
    for one in here.passes:
        # The cache lies beside a pass that does not know it.
        beside = 0 if one.traced.program.of_kind("cache") else cache_bytes
        wanted = {nbytes + beside}
        assert {step.workspace_bytes for step in one.traced.program.steps} == wanted
        assert one.summary.occupancy["device"].parts["workspace"] == nbytes + beside


def test_more_workspace_takes_more_memory() -> None:
    least = [compiled(size).smallest_bytes["device"] for size in (5 << 20, 9 << 20)]
    assert least[1] - least[0] == 4 << 20


def test_both_figures_are_in_the_text_and_in_the_data() -> None:
    here = compiled(5 << 20)
    rows = forecast_dict(here)["workspaces"]
    steps = {
        (one.work.name, step.kernel) for one in here.passes for step in one.traced.program.steps
    }
    assert {(row["pass"], row["step"]) for row in rows} == steps
    text = forecast_text(here)
    assert "compiled for CUDA compute capability 6.1" in text
    for row in rows:
        assert row["compiled_bytes"] == 5 << 20
        if row["estimated_bytes"]:
            assert row["ratio"] == (5 << 20) / row["estimated_bytes"]
        (said,) = [line for line in text.splitlines() if f" {row['pass']}: {row['step']} " in line]
        figures = said.split()[-2:] if row["ratio"] is None else said.split()[-3:-1]
        assert figures == [f"{row['estimated_bytes']:,}", "5,242,880"]


WORKSPACES = "document.querySelector('section[aria-label=Workspaces]')"


def shown(opened: Browser) -> list[list[str]]:
    """The exact values of the table of workspaces, row by row."""
    found: list[list[str]] = opened.value(
        f"[...{WORKSPACES}.querySelectorAll('tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.dataset.value))"
    )
    return found


def test_both_figures_are_in_a_table_of_the_page_that_sorts(
    opened: Browser, tmp_path: Path
) -> None:
    here, path = compiled(5 << 20), tmp_path / "report.html"
    path.write_text(page(forecast_chapters(here), forecast_cover(here)), "utf-8")
    opened.show(path)
    for place, one in reversed([*enumerate(here.passes)]):
        opened.value(f"document.getElementById('tab-{place}').click()")
        rows = [row for row in forecast_dict(here)["workspaces"] if row["pass"] == one.work.name]
        columns = ("step", "estimated_bytes", "compiled_bytes", "ratio")
        wanted = [["" if row[name] is None else str(row[name]) for name in columns] for row in rows]
        assert sorted(row[:3] for row in shown(opened)) == sorted(row[:3] for row in wanted)
        ratios = [sorted(float(row[3] or 0) for row in table) for table in (shown(opened), wanted)]
        assert ratios[0] == ratios[1]
        for click in range(2):
            opened.value(f"{WORKSPACES}.querySelectorAll('th button')[1].click()")
            estimates = [int(row[1]) for row in shown(opened)]
            assert estimates == sorted((row["estimated_bytes"] for row in rows), reverse=not click)
    assert opened.complaints == []


def test_without_a_compiler_the_page_has_no_such_table(opened: Browser, tmp_path: Path) -> None:
    here, path = planned("dense", ROOMY), tmp_path / "report.html"
    path.write_text(page(forecast_chapters(here), forecast_cover(here)), "utf-8")
    opened.show(path)
    assert opened.value(f"{WORKSPACES} === null")
    assert opened.value("document.querySelector('section[aria-label=Lanes]') !== null")


def test_without_a_compiler_workspaces_are_called_estimates() -> None:
    here = planned("dense", ROOMY)
    data = forecast_dict(here)
    assert data["workspaces"] == []
    assert "estimated" in data["assumptions"]["workspace"]
    assert f"workspace of steps: {data['assumptions']['workspace']}" in forecast_text(here)
