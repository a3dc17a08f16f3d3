"""scripts/plan.py: what it prints, what it refuses, and with which exit code."""

import functools
import importlib.util
import json
import re
import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny
from quick import least_s, slowness

pytestmark = pytest.mark.usefixtures("shared_traces")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "plan.py"
MACHINE = ROOT / "configs" / "machines" / "i5-10210u-sm61-nvme.toml"
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
COMMON = (str(tiny.DATA / "dense"), "--machine", str(MACHINE), "--prompt-tokens", "20")
HAS_CUDA_COMPILER = importlib.util.find_spec("jax_cuda12_plugin") is not None
WITHOUT_COMPILER = pytest.mark.skipif(HAS_CUDA_COMPILER, reason="the extra aot is installed")


@functools.cache
def script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("plan_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_json_has_what_was_promised(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*COMMON, "--images", "64x64", "96x64", "--device-memory", "9MiB", "--json"]
    assert script().main(arguments) == 0
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    wanted = {
        *("fits", "smallest_workable", "phases", "gap", "prices", "baselines", "arrays"),
        *("dual_prices", "assumptions", "plan_seconds", "workspaces"),
    }
    assert wanted <= set(data)
    assert data["fits"] is True
    assert list(data["phases"]) == ["vision", "prefill", "decode"]
    for phase in data["phases"].values():
        assert {"seconds", "bound_seconds", "seconds_p90", "peak_bytes", "link_bytes"} == set(phase)
        assert set(phase["peak_bytes"]) == {"device", "host", "nvme"}
        assert {"nvme->host", "host->device"} <= set(phase["link_bytes"])
    assert {"name", "nbytes", "tier", "codec", "why"} == set(data["arrays"][0])
    assert data["assumptions"]["capacity_bytes"]["device"] == 9 << 20
    assert data["assumptions"]["request"]["images"] == [[64, 64], [96, 64]]


def test_text_and_report_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, data = tmp_path / "plan.txt", tmp_path / "plan.json"
    assert script().main([*COMMON, "--report", str(text), "--report", str(data)]) == 0
    printed = capsys.readouterr().out
    assert text.read_text() in printed
    said = re.search(r"^  ([\d.,]+) tokens/s$", printed, re.MULTILINE)
    assert said is not None
    rate = json.loads(data.read_text())["tokens_per_s"]
    assert float(said[1].replace(",", "")) == pytest.approx(rate, rel=0.005)


@pytest.mark.parametrize(("size", "nbytes"), [("9KB", "9,000"), ("0", "0")])
def test_what_does_not_fit_ends_with_3_and_a_budget_that_does(
    size: str, nbytes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script().main([*COMMON, "--device-memory", size, "--json"]) == 3
    output = capsys.readouterr()
    data = json.loads(output.out.splitlines()[-1])
    assert data["fits"] is False
    least = data["smallest_workable"]["device"]
    cause, advice = output.err.splitlines()
    needs = f"this request needs at least {least:,} B of device memory, not {nbytes} B"
    assert cause == f"error: {needs}"
    assert advice == "raise --device-memory"
    assert script().main([*COMMON, "--device-memory", str(least)]) == 0


def test_a_level_says_which_codec_each_array_gets_and_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = {}
    for level in ("minimal", "balanced", "aggressive"):
        arguments = [*COMMON, "--device-memory", "1500KB", "--level", level, "--json"]
        assert script().main(arguments) == 0
        found[level] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["codec"] for row in found["minimal"]["arrays"]} == {"raw"}
    seconds = [data["phases"]["decode"]["seconds"] for data in found.values()]
    assert seconds[0] > seconds[1] > seconds[2]
    for level, budget in (("balanced", 0.05), ("aggressive", 0.2)):
        data = found[level]
        assert 0 < data["predicted_error"] <= data["error_budget"] == budget
        codecs = {row["name"]: (row["codec"], row["why"]) for row in data["arrays"]}
        assert len({codec for codec, _ in codecs.values()}) > 1
        for name, (codec, why) in codecs.items():
            if name.endswith("_proj.weight") and "language_model" in name:
                assert f"; {codec}: " in why


def test_the_best_batch_is_planned_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*COMMON, "--device-memory", "1.5MB"]
    text, shown = tmp_path / "plan.txt", tmp_path / "plan.html"
    assert script().main([*arguments, "--batch", "auto", "--report", str(text)]) == 0
    assert text.read_text() in capsys.readouterr().out
    assert script().main([*arguments, "--batch", "auto", "--report", str(shown), "--json"]) == 0
    auto = json.loads(capsys.readouterr().out.splitlines()[-1])
    batches = auto["batches"]
    assert batches["binds"] == "memory"
    assert f"the best batch is {batches['chosen']}, memory binds" in text.read_text()
    assert f"the best batch is {batches['chosen']}, memory binds" in shown.read_text()
    assert auto["assumptions"]["request"]["batch"] == batches["chosen"] > 1
    assert script().main([*arguments, "--batch", str(batches["chosen"]), "--json"]) == 0
    given = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert given["tokens_per_s"] == auto["tokens_per_s"]
    rates = [one["tokens_per_s"] for one in batches["points"] if one["fits"]]
    assert max(rates) == auto["tokens_per_s"]


def test_where_no_batch_fits_the_refusal_is_that_of_one_row(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = []
    for batch in ("1", "auto"):
        assert script().main([*COMMON, "--device-memory", "100kB", "--batch", batch]) == 3
        said.append([row for row in capsys.readouterr().err.splitlines() if "planning" not in row])
    assert said[0] == said[1]
    assert len(said[0]) == 2


def test_a_trace_and_a_plan_are_written(tmp_path: Path) -> None:
    trace, plans = tmp_path / "plan.perfetto.json", tmp_path / "plans.json"
    assert script().main([*COMMON, "--report", str(trace), "--save-plan", str(plans)]) == 0
    saved = json.loads(plans.read_text())
    actions = sum(len(phase["plan"]["actions"]) for phase in saved["phases"])
    assert len(json.loads(trace.read_text())["traceEvents"]) > actions > 20
    assert [phase["phase"] for phase in saved["phases"]] == ["prefill", "scores", "decode"]
    assert saved["report"]["fits"] is True


def test_of_a_refusal_only_json_is_written_and_it_says_what_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("a.html", "a.perfetto.json", "a.json", "a.txt")
    reports = [f"--report={tmp_path / name}" for name in names]
    saved = tmp_path / "plans.json"
    (tmp_path / "a.html").write_text("an older one")
    arguments = [*COMMON, "--device-memory", "9KB", *reports, f"--save-plan={saved}"]
    assert script().main(arguments) == 3
    said, cause, _ = capsys.readouterr().err.splitlines()
    left = [saved, *(tmp_path / name for name in names if name != "a.json")]
    assert said.endswith(f"a refused request has no plan to show: {', '.join(map(str, left))}")
    assert cause.startswith("error: this request needs at least")
    assert json.loads((tmp_path / "a.json").read_text())["fits"] is False
    assert {path.name for path in tmp_path.iterdir()} == {"a.html", "a.json"}
    assert (tmp_path / "a.html").read_text() == "an older one"


def test_a_refusal_has_all_keys_too(capsys: pytest.CaptureFixture[str]) -> None:
    keys = []
    for size in ("9KB", "9MB"):
        script().main([*COMMON, "--device-memory", size, "--json"])
        keys.append(set(json.loads(capsys.readouterr().out.splitlines()[-1])))
    wanted = {
        *("fits", "smallest_workable", "phases", "gap", "prices", "baselines", "arrays"),
        *("dual_prices", "assumptions", "plan_seconds", "workspaces"),
    }
    assert keys[0] == wanted
    assert wanted <= keys[1]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((), 2, "MODEL"),
        ((*COMMON, "--images", "64"), 2, "448x448"),
        ((*COMMON, "--images", "1x900"), 2, "aspect ratio"),
        ((*COMMON, "--batch", "0"), 2, "less than 1"),
        ((*COMMON, "--batch", "many"), 2, "many: a count or auto is wanted"),
        ((*COMMON, "--batch", "auto", "--sweep", "batch=1..2"), 2, "drop --aot and --sweep"),
        ((*COMMON, "--batch", "auto", "--max-context", "30"), 2, "max_context 30 is less"),
        ((*COMMON, "--report", "plan.pdf"), 2, ".json, .txt, .html"),
        ((*COMMON, "--report", "plan"), 2, "no file without an ending is written here"),
        ((*COMMON, "--sweep", "batch=1..2", "--report", "a.perfetto.json"), 2, "no .perfetto.json"),
        ((*COMMON, "--sweep", "luck=1..2"), 2, "device-memory, host-memory"),
        ((*COMMON, "--sweep", "batch=1..2", "--level", "balanced"), 2, "drop --level"),
        ((*COMMON, "--compare", "a.json", "b.json"), 2, "nothing else"),
        (("--compare", "nowhere.json", "b.json"), 4, "nowhere.json"),
        ((COMMON[0], "--aot"), 2, "add --machine"),
        ((*COMMON, "--aot", "--sweep", "batch=1..2"), 2, "drop --sweep"),
        ((*COMMON, "--aot", "--save-plan", "plan.json"), 2, "drop --sweep and --save-plan"),
        ((COMMON[0], "--aot", "--machine", str(MACHINE.with_stem("laptop-cpu"))), 2, "on a cpu"),
        ((COMMON[0], "--aot", "--machine", str(MACHINE.with_stem("tpu-v5e-host"))), 2, "on a tpu"),
        pytest.param((*COMMON, "--aot"), 2, "extra 'aot'", marks=WITHOUT_COMPILER),
        ((*COMMON, "--device-memory", "much"), 2, "'much'"),
        ((*COMMON, "--plan-seconds", "-1"), 2, "-1 is not a number of seconds"),
        ((*COMMON, "--max-context", "30"), 2, "max_context 30 is less"),
        (("nowhere", "--machine", str(MACHINE)), 4, "nowhere"),
        ((str(tiny.DATA / "dense"), "--machine", "nowhere.toml"), 2, "nowhere.toml"),
        ((*COMMON, "--report", "/nowhere/plan.txt"), 5, "/nowhere/plan.txt"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    arguments: tuple[str, ...], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script().main(arguments) == code
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 2
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            (*COMMON, "--sweep", "batch=1..12345678901"),
            "'12345678901' is no count of at most 1,000,",
        ),
        ((*COMMON, "--sweep", "batch=1..2000000"), "'2000000' is no count of at most 1,000,000"),
        ((*COMMON, "--sweep", "batch=1..4", "--batch", "64"), "drop --batch"),
        ((*COMMON, "--sweep", "batch=1..4", "--batch", "1"), "drop --batch"),
        ((*COMMON, "--sweep", "context=300..400"), "drop --prompt-tokens"),
        ((COMMON[0], "--sweep", "context=300..400", "--max-context", "9"), "drop --max-context"),
        (
            (*COMMON, "--sweep=device-memory=1MB..2MB", "--device-memory=1MB"),
            "drop --device-memory",
        ),
        (
            (*COMMON, "--sweep", "host-memory=1MB..2MB", "--host-memory", "1MB"),
            "drop --host-memory",
        ),
        ((*COMMON, "--sweep", "device-memory=1GB/s..2GB/s"), "size '1GB/s' is none"),
        ((*COMMON, "--points", "9"), "add --sweep"),
        (("--compare", "a.json", "b.json", "--batch", "1"), "drop --batch"),
        (("--compare", "a.json", "b.json", "--points", "9"), "drop --points"),
        (("--compare", "a.json", "b.json", "--kv", "raw", "--aot"), "drop --kv, --aot"),
        (("--compare", "a.json", "b.json", "--report", "c.txt"), "drop --report"),
        ((COMMON[0], "--prompt-tokens", "abc"), "--prompt-tokens: abc: a count is wanted"),
        ((COMMON[0], "--new-tokens", "9" * 5000), "a count is wanted"),
        ((*COMMON, "--plan-seconds", "abc"), "abc is not a number of seconds"),
        (
            (*COMMON, "--batch", "3000000000"),
            "batch must be at most 1,000,000, found 3,000,000,000",
        ),
    ],
)
def test_no_option_is_ignored_or_cut(
    arguments: tuple[str, ...], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert script().main(arguments) == 2
    out, error = capfd.readouterr()
    cause, advice = error.splitlines()
    assert says in f"{cause}; {advice}"
    assert not out


def test_less_time_for_planning_tries_less_and_finds_a_plan(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = []
    for more in ((), ("--plan-seconds", "0")):
        assert script().main([*COMMON, "--device-memory", "600KB", "--json", *more]) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    usual, hasty = (one["phases"]["decode"]["seconds"] for one in found)
    assert usual < hasty
    assert hasty <= min(s for s in found[1]["baselines"].values() if s) * (1 + 1e-9)


def test_help_takes_less_than_half_a_second_of_a_core(tmp_path: Path) -> None:
    def answered() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, SCRIPT, "--help"],
            cwd=tmp_path,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert (done.returncode, done.stderr) == (0, "")
        assert "--max-context" in done.stdout
        taken_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return taken_s / slowness()

    assert least_s(answered, 0.5) < 0.5


def test_no_weight_is_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes((tiny.DATA / "dense" / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_text("no weights at all")
    assert script().main([str(tmp_path), *COMMON[1:]]) == 0
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.skipif(not HAS_CUDA_COMPILER, reason="needs the extra aot")
def test_text_and_json_say_what_xla_takes_on_a_card_that_is_not_there(tmp_path: Path) -> None:
    report = tmp_path / "plan.json"
    arguments = [*COMMON, "--prompt-tokens", "600", "--images", "640x640", "--aot"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments, "--report", report],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "compiling" not in done.stderr  # no terminal
    assert "XLA's own, of every step compiled for CUDA compute capability 6.1" in done.stdout
    data = json.loads(report.read_text())
    assert "6.1" in data["assumptions"]["workspace"]
    assert {row["pass"] for row in data["workspaces"]} == {one["name"] for one in data["passes"]}
    largest = data["workspaces"][0]
    assert largest["compiled_bytes"] > 1 << 20
    assert f"{largest['compiled_bytes']:,}" in done.stdout


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (("--chunk", "0"), "0 is no count from 1 to 1,048,576 tokens, and not auto"),
        (("--chunk", "some"), "some is no count from 1 to 1,048,576 tokens"),
        (("--kv-blocks", "often"), "invalid choice: 'often'"),
    ],
)
def test_forms_that_do_not_exist_are_refused(
    wrong: tuple[str, str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script().main([*COMMON, *wrong]) == 2
    assert says in capsys.readouterr().err


def test_blocks_on_this_machine_need_a_place_as_in_a_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for more in ((), ("--sweep", "batch=1..2")):
        assert script().main([COMMON[0], "--kv-blocks", "faster", *more]) == 2
        said = capsys.readouterr().err.splitlines()
        assert said[0].startswith(
            "error: --kv-blocks faster keeps full blocks of KV caches on disk"
        )


def test_text_and_data_say_which_form_and_which_chunk(capsys: pytest.CaptureFixture[str]) -> None:
    forms = ("--kv-blocks", "faster", "--chunk", "auto")
    assert script().main([*COMMON, *forms]) == 0
    said = "KV cache in one piece, prompts in chunks of 512 tokens"
    assert f"\n  {said}\n" in capsys.readouterr().out
    assert script().main([*COMMON, "--chunk", "64", "--json"]) == 0
    assumed = json.loads(capsys.readouterr().out.splitlines()[-1])["assumptions"]
    assert assumed["chunk_tokens"] == 64
    assert assumed["kv_form"] == said.replace("512", "64")
