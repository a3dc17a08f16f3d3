"""scripts/convert.py when things go wrong: kills, full and failing disks, little memory, rivals."""

import errno
import filecmp
import itertools
import json
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoint_factory as factory
import pytest
from converting import ROOT, SCRIPT, convert, environment, files, nothing_left
from quick import least_s

from qwen3vl_jax.checkpoints.conversion import fingerprint
from qwen3vl_jax.checkpoints.work_directory import WorkDirectory
from qwen3vl_jax.config import load_config
from qwen3vl_jax.weights import table

SHIM = ROOT / "tests" / "data" / "fault_shim" / "fault_shim.c"
COMPILER = shutil.which("gcc") or shutil.which("cc")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with a small `hf` and its `store`."""
    factory.checkpoint(tmp_path / "hf", text={"num_hidden_layers": 1}, shards=2)
    assert convert(tmp_path / "hf", tmp_path / "store") == 0
    return tmp_path


def killer(
    source: Path, folder: Path, kills: int, number: int, *options: str
) -> list[dict[str, Any]]:
    """Trials of conversion_killer.py, each with `name`, `died`, `noted`, `again` and `answer_s`."""
    driver = Path(__file__).with_name("conversion_killer.py")
    command = [sys.executable, driver, source, folder, kills, int(number), *options]
    done = subprocess.run(
        list(map(str, command)), env=environment(), capture_output=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["heavy"] == [], "a conversion must not pay for jax, flax or transformers"
    trials = found["trials"]
    assert isinstance(trials, list)
    return trials


def test_killed_at_20_random_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    factory.checkpoint(tmp_path / "hf", "moe", layout="released", shards=3)
    trials = killer(tmp_path / "hf", tmp_path, 20, signal.SIGKILL)
    wanted = files(tmp_path / "undisturbed")
    assert {trial["died"] for trial in trials} == {-signal.SIGKILL}
    assert [trial["again"] for trial in trials] == [0] * 20
    # Some were killed in the middle: the journal had more than its first line.
    assert any(trial["noted"] > 1 for trial in trials)
    for trial in trials:
        assert files(tmp_path / trial["name"]) == wanted
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("options", [("int4",), ("auto", "--error-budget", "1")])
def test_killed_while_it_encodes_it_ends_with_the_same_bytes(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    factory.checkpoint(tmp_path / "hf", "moe", layout="released", shards=3, tied=True)
    trials = killer(tmp_path / "hf", tmp_path, 8, signal.SIGKILL, "--codec", *options)
    assert [trial["again"] for trial in trials] == [0] * 8
    wanted = files(tmp_path / "undisturbed")
    assert b'"int4:' in wanted["manifest.json"]
    assert any(trial["noted"] > 1 for trial in trials)
    for trial in trials:
        assert files(tmp_path / trial["name"]) == wanted


def test_work_with_another_codec_starts_afresh(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkDirectory, "publish", lambda work: work.note({"left": {}}))
    assert convert(made / "hf", made / "new", "--codec", "int8") == 0
    assert b'"left"' in (made / "new.partial" / "journal.jsonl").read_bytes()
    monkeypatch.undo()
    assert convert(made / "hf", made / "new", "--codec", "int4", "--verify") == 0
    assert convert(made / "hf", made / "straight", "--codec", "int4") == 0
    assert files(made / "new") == files(made / "straight")
    assert nothing_left(made)


@pytest.mark.alone
def test_ctrl_c_is_answered_within_a_second_and_the_work_goes_on(tmp_path: Path) -> None:
    factory.checkpoint(tmp_path / "hf", shards=2)
    attempts = itertools.count()

    def slowest_answer_s() -> float:
        folder = tmp_path / str(next(attempts))
        folder.mkdir()
        trials = killer(tmp_path / "hf", folder, 4, signal.SIGINT)
        assert {trial["died"] for trial in trials} == {130}
        for trial in trials:
            assert files(folder / trial["name"]) == files(folder / "undisturbed")
        return max(trial["answer_s"] for trial in trials)

    assert least_s(slowest_answer_s, 1.0, most_s=5.0) < 1.0


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that makes system calls fail."""
    if COMPILER is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, SHIM, "-ldl"], check=True)
    return library


def with_faults(shim: Path, *arguments: object, **faults: str) -> subprocess.CompletedProcess[str]:
    settings = {f"FAULT_{name.upper()}": value for name, value in faults.items()}
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env=environment(LD_PRELOAD=str(shim), **settings),
        capture_output=True,
        text=True,
        check=False,
    )


FULL, BROKEN = str(errno.ENOSPC), str(errno.EIO)


@pytest.mark.parametrize(
    ("function", "path", "number", "says"),
    [
        ("writev", "arrays", FULL, "No space left"),
        ("fsync", "arrays", BROKEN, "Input/output error"),
        ("fsync", "journal", FULL, "No space left"),
        ("rename", "content", BROKEN, "Input/output error"),
        ("pread", "model-", BROKEN, "Input/output error"),
        ("pread", "tokenizer.json", BROKEN, "Input/output error"),
    ],
)
def test_a_failing_system_call_is_one_line_and_exit_5_and_the_work_goes_on(
    shim: Path, tmp_path: Path, function: str, path: str, number: str, says: str
) -> None:
    factory.checkpoint(tmp_path / "hf", shards=2, text={"num_hidden_layers": 1})
    at = "1" if function == "rename" or path == "tokenizer.json" else "6"
    faults = {"fn": function, "path": path, "err": number, "at": f"{at}+"}
    done = with_faults(shim, tmp_path / "hf", tmp_path / "store", **faults)
    assert done.returncode == 5, done.stderr
    cause, advice = done.stderr.splitlines()
    assert cause.startswith("error: ")
    assert says in cause
    assert "again" in advice or "check" in advice
    assert not (tmp_path / "store").exists()
    assert convert(tmp_path / "hf", tmp_path / "store", "--verify") == 0
    assert convert(tmp_path / "hf", tmp_path / "other") == 0
    assert files(tmp_path / "store") == files(tmp_path / "other")


def test_an_export_that_ran_out_of_space_goes_on(shim: Path, tmp_path: Path) -> None:
    factory.checkpoint(tmp_path / "hf", shards=3)
    assert convert(tmp_path / "hf", tmp_path / "store") == 0
    faults = {"fn": "write", "path": "00002-of", "err": FULL, "at": "4+"}
    done = with_faults(shim, tmp_path / "store", tmp_path / "back", "--to-hf", **faults)
    assert done.returncode == 5
    assert "No space left" in done.stderr
    assert not (tmp_path / "back").exists()
    assert convert(tmp_path / "store", tmp_path / "back", "--to-hf") == 0
    assert files(tmp_path / "back") == files(tmp_path / "hf")


@pytest.mark.parametrize("function", ["pread", "write"])
def test_short_reads_and_writes_change_nothing(shim: Path, tmp_path: Path, function: str) -> None:
    factory.checkpoint(tmp_path / "hf", text={"num_hidden_layers": 1})
    assert convert(tmp_path / "hf", tmp_path / "wanted") == 0
    faults = {"fn": function, "path": str(tmp_path), "at": "1+", "mode": "short"}
    if function == "pread":
        done = with_faults(shim, tmp_path / "hf", tmp_path / "store", **faults)
        assert files(tmp_path / "store") == files(tmp_path / "wanted"), done.stderr
    else:
        done = with_faults(shim, tmp_path / "wanted", tmp_path / "back", "--to-hf", **faults)
        assert files(tmp_path / "back") == files(tmp_path / "hf"), done.stderr


def _big_checkpoint(folder: Path) -> int:
    """A model with one array of 300 MiB, all zeros and sparse on disk; returns its bytes."""
    text = {"vocab_size": 307_200, "hidden_size": 512, "num_hidden_layers": 1}
    values = factory.config_values(tied=True, text=text, vision={"out_hidden_size": 512})
    small = factory.config_values(
        tied=True, text=text | {"vocab_size": 40}, vision={"out_hidden_size": 512}
    )
    factory.save(folder, values, factory.random_tensors(small, dtype="bfloat16"))
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    name, size = "model.language_model.embed_tokens.weight", 307_200 * 512 * 2
    old = header.pop(name)["data_offsets"]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= old[1]:
            entry["data_offsets"] = [place - old[1] + old[0] for place in entry["data_offsets"]]
    data = whole[8 + length :]
    data = data[: old[0]] + data[old[1] :]
    places = [len(data), len(data) + size]
    header[name] = {"dtype": "BF16", "shape": [307_200, 512], "data_offsets": places}
    body = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(body)) + body + data)
        file.truncate(8 + len(body) + places[1])
    return size


# A process inherits the peak of the one that started it, so a small one must start it.
_MEASURE = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
print(status, usage.ru_maxrss * 1024)
"""


def peak_bytes(*arguments: object) -> int:
    """Largest resident memory of a run of the script, measured from outside."""
    command = [sys.executable, "-S", "-c", _MEASURE, sys.executable, SCRIPT, *arguments]
    done = subprocess.run(
        list(map(str, command)), env=environment(), capture_output=True, text=True, check=True
    )
    status, peak = done.stdout.split()
    assert status == "0", done.stderr
    return int(peak)


def test_memory_stays_below_twice_the_largest_array_and_400_mb(tmp_path: Path) -> None:
    largest = _big_checkpoint(tmp_path / "hf")
    bound = 2 * largest + 400 * 10**6
    there = peak_bytes(tmp_path / "hf", tmp_path / "store")
    back = peak_bytes(tmp_path / "store", tmp_path / "back", "--to-hf", "--verify")
    assert max(there, back) <= bound, f"{there:,} and {back:,} B of {bound:,} B"
    assert filecmp.cmp(
        tmp_path / "hf" / "model.safetensors",
        tmp_path / "back" / "model.safetensors",
        shallow=False,
    )


def test_a_second_process_is_told_that_the_first_is_at_work(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with WorkDirectory(made / "new", {"to": "store"}):
        assert convert(made / "hf", made / "new") == 5
    assert "in use by another process" in capsys.readouterr().err
    assert convert(made / "hf", made / "new") == 0


def test_work_on_something_else_is_thrown_away(made: Path) -> None:
    with WorkDirectory(made / "new", {"to": "something else"}) as work:
        (work.content / "stray").write_bytes(b"x")
        work.note({"visual.pos_embed.weight": {"sha256": "wrong"}})
    assert convert(made / "hf", made / "new") == 0
    assert files(made / "new") == files(made / "store")


def test_a_foreign_directory_in_the_way_is_left_alone(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (made / "new.partial").mkdir()
    (made / "new.partial" / "letters.txt").write_text("dear")
    assert convert(made / "hf", made / "new") == 2
    assert "not ours" in capsys.readouterr().err
    assert (made / "new.partial" / "letters.txt").read_text() == "dear"


def test_a_journal_that_a_kill_has_cut_is_continued_before_the_cut(tmp_path: Path) -> None:
    with WorkDirectory(tmp_path / "new", {"to": "x"}) as work:
        work.note({"a": {"n": 1}, "b": {"n": 2}})
    journal = tmp_path / "new.partial" / "journal.jsonl"
    whole = journal.read_bytes()
    for size in range(len(whole) + 1):
        journal.write_bytes(whole[:size])
        with WorkDirectory(tmp_path / "new", {"to": "x"}) as work:
            complete = whole[:size].count(b"\n")
            assert list(work.done) == ["a", "b"][: max(0, complete - 1)]
            work.note({"c": {"n": 3}})
        with WorkDirectory(tmp_path / "new", {"to": "x"}) as work:
            assert work.done["c"] == {"n": 3}


def test_an_array_that_vanished_from_unfinished_work_is_made_again(made: Path) -> None:
    config = load_config(made / "hf")
    task = {"to": "store", "dtype": "keep", "from": fingerprint(made / "hf")}
    records = json.loads((made / "store" / "manifest.json").read_text())["arrays"]
    with WorkDirectory(made / "new", task) as work:
        work.note(records)
    assert convert(made / "hf", made / "new") == 0
    assert files(made / "new") == files(made / "store")
    assert len(records) == len(table(config))
