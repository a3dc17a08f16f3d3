"""The command line of scripts/generate.py, in this process."""

import importlib.util
import io
import json
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tiny

pytestmark = pytest.mark.usefixtures("shared_traces")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "generate.py"
MODEL = str(tiny.DATA / "dense")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("generate_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate_script"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny checkpoint, greedy and with no end token: its answers have the length asked for."""
    folder = tmp_path_factory.mktemp("models") / "endless"
    shutil.copytree(tiny.DATA / "dense", folder)
    (folder / "generation_config.json").write_text('{"do_sample": false, "eos_token_id": []}')
    return str(folder)


@pytest.fixture(scope="module")
def model() -> Any:
    from qwen3vl_jax import Qwen3VL

    return Qwen3VL.from_pretrained(MODEL)


@pytest.fixture
def loaded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are read, and the steps compiled, once for all tests that ask for this."""
    from qwen3vl_jax import Qwen3VL

    monkeypatch.setattr(Qwen3VL, "from_pretrained", lambda *_, **__: model)


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def png() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


# ---- answers ----


def test_json_is_one_object_on_the_last_line_with_the_published_keys(
    script: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(png())
    arguments = ["--model", MODEL, "--image", str(picture), "-p", "What is it?", "--greedy"]
    assert script.main([*arguments, "-n", "5", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out.splitlines()[-1])
    assert set(report) >= {
        *("text", "tokens", "prompt_tokens", "seconds", "decode_tokens_per_s"),
        *("peak_bytes", "read_bytes"),
    }
    assert len(report["tokens"]) == 5
    assert set(report["seconds"]) == {"load", "vision", "prefill", "decode"}
    assert all(seconds > 0 for seconds in report["seconds"].values())
    # Weights alone are more than a megabyte, and this process holds at least them.
    assert report["read_bytes"] > 1_000_000
    assert report["peak_bytes"]["process"] > 50_000_000
    assert "Prompt: " in err

    assert script.main([*arguments, "--max-tokens", "5", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (report["text"] + "\n", "")


def test_a_prompt_that_comes_again_is_restored_and_both_predictions_are_said(
    script: Any, endless: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture, folder = tmp_path / "picture.png", tmp_path / "cache"
    picture.write_bytes(png())
    arguments = ["--model", endless, "--image", str(picture), "-p", "What is it?", "-n", "5"]
    reports, said = [], []
    for more in ([], *[["--prompt-cache", str(folder)]] * 2):
        assert script.main([*arguments, "--json", *more]) == 0
        out, err = capsys.readouterr()
        reports.append(json.loads(out.splitlines()[-1]))
        said.append([line for line in err.splitlines() if line.startswith("Prompt cache: ")])
    assert [report["tokens"] for report in reports[1:]] == [reports[0]["tokens"]] * 2
    assert reports[0]["prompt_cache"] is None
    kept, restored = (report["prompt_cache"]["parts"] for report in reports[1:])
    assert [part["restored"] for part in kept] == [False, False]
    assert all(part["stored_bytes"] > part["nbytes"] > 0 for part in kept)
    assert [(part["restored"], part["needed"]) for part in restored] == [
        (True, True),
        (False, False),
    ]
    assert all(0 < part["restoring_s"] < part["computing_s"] for part in restored)
    assert [len(lines) for lines in said] == [0, 1, 1]
    assert "0 of 2 parts restored, 0 not needed" in said[1][0]
    assert "1 of 2 parts restored" in said[2][0]


@pytest.mark.usefixtures("loaded")
def test_a_picture_a_file_and_stdin_give_the_same_answer(
    script: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same picture twice, once by path and once by stdin; the same prompt by all three ways."""
    picture, words = tmp_path / "picture.png", tmp_path / "words.txt"
    picture.write_bytes(png())
    words.write_text("näme it")
    common = ["--model", MODEL, "-q", "--temp", "0", "-n", "4", "--system", "be kind"]
    answers = []
    for content, more in (
        (b"", ["--image", str(picture), "--prompt-file", str(words)]),
        (png(), ["--image", "-", "-p", "näme it"]),
        ("näme it".encode(), ["--image", str(picture), "--prompt", "-"]),
    ):
        stdin(monkeypatch, content)
        assert script.main([*common, *more]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2]
    assert script.main([*common, "-p", "other", "--image", str(picture)]) == 0
    assert capsys.readouterr().out != answers[0]


@pytest.mark.usefixtures("loaded")
def test_max_pixels_shrink_a_picture(
    script: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "large.png"
    PIL.Image.new("RGB", (640, 640)).save(picture)
    counts = []
    for limit in ("65536", "16384"):
        arguments = [
            "--model",
            MODEL,
            "--image",
            str(picture),
            "-p",
            "x",
            "-n",
            "1",
            "--json",
            "-q",
        ]
        assert script.main([*arguments, "--max-pixels", limit]) == 0
        counts.append(json.loads(capsys.readouterr().out)["prompt_tokens"])
    # A token is 32 x 32 pixels: 64 of them, and 16.
    assert counts[0] - counts[1] == 48


@pytest.mark.usefixtures("loaded")
def test_the_same_seed_says_the_same_and_a_drawn_seed_is_told(
    script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", MODEL, "-p", "x", "-n", "8", "--json", "-q", "--temperature", "2"]
    reports = []
    for more in ([], ["--seed", "5"], ["--seed", "5", "--top-k", "1"]):
        assert script.main([*common, *more]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert script.main([*common, "--seed", str(reports[0]["seed"])]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == reports[0]["tokens"]
    assert reports[1]["seed"] == 5
    assert reports[1]["tokens"] != reports[2]["tokens"]


@pytest.mark.usefixtures("loaded")
def test_a_conversation_goes_on_until_quit(
    script: Any,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    endless: str,
) -> None:
    picture = tmp_path / "a picture.png"
    picture.write_bytes(png())
    lines = [
        "/stats",
        f"/image {picture}",
        "what is it?",
        "",
        "and now?",
        "/stats",
        "/image nowhere.png",
        "lost?",
        "/dance",
        "/clear",
        "/quit",
        "never read",
    ]
    stdin(monkeypatch, "\n".join(lines).encode())
    arguments = ["--model", endless, "--interactive", "-n", "3", "-q", "-p", "hello"]
    assert script.main(arguments) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) >= 3
    assert "hello" not in out
    complaints = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(complaints) == 1
    assert "nowhere.png" in complaints[0]
    assert "/dance cannot be done; there are /image PATH, /clear, /stats, /quit" in err
    assert err.count("Generation: 3 tokens") == 2
    # Three questions are told apart by what the cache holds; see test_chat for what is in it.
    cached = [int(line.split()[-5]) for line in err.splitlines() if line.endswith("in the cache")]
    assert cached[0] < cached[1]


def test_a_conversation_goes_on_after_a_picture_that_has_no_room(
    script: Any,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    endless: str,
) -> None:
    picture = tmp_path / "large.png"
    PIL.Image.new("RGB", (640, 640)).save(picture)
    lines = ["hello", f"/image {picture}", "what is it?", "and now?", "/stats"]
    stdin(monkeypatch, "\n".join(lines).encode())
    small = ["--device-memory", "1.2MB"]
    assert script.main(["--model", endless, "--interactive", "-n", "3", "-q", *small]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) >= 2
    (complaint,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "in tier 'device', which has 1,200,000 B" in complaint
    assert "Generation: 3 tokens" in err


# ---- plans ----


def test_a_plan_that_was_written_is_carried_out_and_reported(
    script: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plans, report, trace = (str(tmp_path / n) for n in ("p.json", "r.json", "r.perfetto.json"))
    common = ["--model", MODEL, "-p", "what?", "-n", "15", "--greedy", "-q"]
    assert script.main([*common, "--json"]) == 0
    wanted = json.loads(capsys.readouterr().out)["tokens"]
    small = ["--device-memory", "1.2MB"]
    assert script.main([*common, *small, "--dry-run", "--save-plan", plans]) == 0
    capsys.readouterr()
    assert script.main([*common, "--plan", plans, "--json", "--report", report]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == wanted
    assert found["peak_bytes"]["device"] <= 1_200_000
    assert set(found["predicted"]) == {
        *("seconds", "decode_tokens_per_s", "peak_bytes", "read_bytes", "written_bytes"),
    }
    assert found["predicted"]["peak_bytes"]["device"] == found["peak_bytes"]["device"]
    # What has no place is read for every token; the disk gives whole blocks. What is read ahead for
    # the next token may be under way at the end: one pass of 15.
    assert found["read_bytes"] >= found["predicted"]["read_bytes"] * 0.9 > 0
    assert len(wanted) == 15
    measured = json.loads(Path(report).read_text())["measured"]["decode"]
    lines = {line["what"]: line for line in measured}
    assert {"a pass", "compute busy", "read_bytes", "written_bytes"} <= set(lines)
    assert lines["written_bytes"]["measured"] == 0

    assert script.main([*common, "-n", "200", "--plan", plans]) == 2
    err = capsys.readouterr().err
    assert "has no plan for prefill with these shapes" in err
    assert err.count("\n") == 2
    assert script.main([*common, *small, "--report", trace, "--adapt"]) == 0
    assert "traceEvents" in Path(trace).read_text()


def test_the_store_that_a_level_makes_is_told_once_and_not_to_the_quiet(
    script: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    common = ["--model", MODEL, "-p", "what?", "-n", "2", "--greedy", "--level", "balanced"]
    told = []
    for place, more in (("a", []), ("a", []), ("b", ["-q"])):
        limits = ["--device-memory", "1.5MB", "--nvme-dir", str(tmp_path / place)]
        (tmp_path / place).mkdir(exist_ok=True)
        assert script.main([*common, *limits, *more]) == 0
        err = capsys.readouterr().err
        told.append([line for line in err.splitlines() if line.startswith("encoded ")])
    (store,) = (tmp_path / "a").glob("encoded-*")
    (line,) = told[0]
    assert line.endswith(f" in {store}")
    assert told[1:] == [[], []]
    assert list((tmp_path / "b").glob("encoded-*"))


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--report", "r.pdf"], 2, ".html"),
        (["--report", "/nowhere/r.json"], 5, "no such directory"),
        (["--plan", "nowhere.json"], 4, "nowhere.json"),
        (["--plan", "p.json", "--draft", "prompt-lookup"], 2, "drop --draft"),
        (["--plan", "p.json", "--dry-run"], 2, "drop one"),
        (["--plan", "p.json", "--adapt"], 2, "drop one"),
        (["--save-plan", "p.json"], 2, "add --dry-run"),
    ],
)
def test_files_of_plans_are_refused_before_anything_is_read(
    script: Any,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    assert script.main(["--model", "nowhere", "-p", "x", *arguments]) == code
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 2


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nothing is asked"),
        (["-p", "x", "--prompt-file", "y"], "not allowed with"),
        (["-p", "-", "--image", "-"], "stdin can be read once"),
        (["-p", "x", "--video", "-"], "a video cannot come from stdin"),
        (["-p", "x", "--fps", "2"], "are for videos"),
        (["-p", "x", "--max-pixels", "100"], "are for pictures"),
        (["-p", "x", "--max-pixels", "-1", "--image", "y"], "not a number over 0"),
        (["-p", "x", "--greedy", "--temperature", "1"], "not allowed with"),
        (["-p", "x", "--greedy", "--top-p", "0.5"], "greedy draws nothing"),
        (["-p", "x", "--temp", "0", "--top-k", "5"], "greedy draws nothing"),
        (["-p", "x", "--dtype", "int8"], "invalid choice"),
        (["-p", "x", "-n", "0"], "max_new_tokens must be"),
        (["-p", "x", "--temperature", "nan"], "temperature must be"),
        (["-p", "x", "--top-p", "1.5"], "top_p must be"),
        (["-p", "x", "--seed", "-1"], "seed must be"),
        (["-p", "x", "--stop", ""], "stop_strings must be"),
        (["-p", "x", "-n", "5000"], "lower max_new_tokens to 4,"),
        (["--interactive", "--json"], "drop --interactive"),
        (["--interactive", "-p", "-"], "reads from stdin"),
        (["-p", "x", "--gpu-memory", "4GB"], "unrecognized arguments"),
        (["-p", "x", "--prompt-cache", "y", "--dry-run"], "drop one of them"),
        (["-p", "x", "--prompt-cache-space", "1GB"], "give --prompt-cache DIR"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_code_2_and_two_lines(
    script: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert script.main(["--model", MODEL, "-q", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.startswith("error: ")
    assert err.count("\n") == 2


def test_bad_input_is_code_4_and_names_it(
    script: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(png()[:200])
    (tmp_path / "latin1.txt").write_bytes("ä".encode("latin-1"))
    stdin(monkeypatch, b"")
    # Long names are cut in messages, and directories of tests can be long.
    monkeypatch.chdir(tmp_path)
    for arguments, says in (
        (["--model", "nowhere", "-p", "x"], "nowhere"),
        (["--model", MODEL, "-p", "x", "--image", broken.name], "broken.png"),
        (["--model", MODEL, "-p", "x", "--image", str(tmp_path / "no.png")], "no.png"),
        (["--model", MODEL, "-p", "x", "--image", "-"], "bytes"),
        (["--model", MODEL, "--prompt-file", str(tmp_path / "latin1.txt")], "not UTF-8"),
        (["--model", MODEL, "--prompt-file", str(tmp_path)], "no such file"),
    ):
        assert script.main([*arguments, "-q"]) == 4, arguments
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 2)
        assert err.startswith("error: ")
        assert says in err


def test_a_failing_disk_is_code_5_and_a_mistake_of_ours_is_1(
    script: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen3vl_jax import Qwen3VL

    for error, code in (
        (OSError(5, "Input/output error"), 5),
        (MemoryError(), 3),
        (RuntimeError("RESOURCE_EXHAUSTED: 1 TB"), 3),
        (RuntimeError("a\nmistake"), 1),
        (KeyboardInterrupt(), 130),
    ):

        def fails(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(Qwen3VL, "from_pretrained", fails)
        assert script.main(["--model", MODEL, "-p", "x", "-q"]) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
    monkeypatch.undo()


def test_debug_adds_the_traceback(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", MODEL, "-p", "x", "--image", "no.png", "-q"]
    assert script.main([*arguments, "--debug"]) == 4
    assert "Traceback" in capsys.readouterr().err
