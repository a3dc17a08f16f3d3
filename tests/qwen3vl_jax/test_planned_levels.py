"""Levels with memory limits: a raw checkpoint becomes an encoded store of its own, once."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import planned_models as helper
import pytest
import tiny

from memsched.errors import DoesNotFitError
from memsched.machine import Compute
from memsched.profiles import load_machine, write_machine
from qwen3vl_jax import Qwen3VL
from qwen3vl_jax.checkpoints.array_writer import ArrayWriter
from qwen3vl_jax.checkpoints.conversion import to_store
from qwen3vl_jax.checkpoints.opening import described
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.parameters import kv_of
from qwen3vl_jax.planned import encoded_store
from qwen3vl_jax.planned.request import Request
from qwen3vl_jax.progress import Silent

pytestmark = pytest.mark.usefixtures("shared_traces")

REPORT = "encoding_report.json"
ROOM = "1500KB"  # of 3 to 5 MB of weights


def options(folder: Path, tiers: int = 2) -> dict[str, Any]:
    """A machine with little memory and a place on disk."""
    place = folder / "place"
    place.mkdir()
    machine = helper.machine_file(folder, tiers)
    return {"machine": machine, "nvme_dir": place, "device_memory": ROOM}


def answers(path: Path, given: dict[str, np.ndarray], **budgets: Any) -> list[np.ndarray]:
    model = Qwen3VL.from_pretrained(path, **budgets)
    try:
        return list(helper.answers(model, given))
    finally:
        if budgets:
            model.close()


def load(path: Path, **budgets: Any) -> None:
    """What is made of a checkpoint is made before it answers anything."""
    Qwen3VL.from_pretrained(path, **budgets).close()


def stores(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.startswith("encoded-"))


def codecs_of(store: Path) -> dict[str, str]:
    rows = json.loads((store / REPORT).read_text())["arrays"]
    return {name: row["codec"] for name, row in rows.items()}


@pytest.mark.parametrize(
    ("name", "level", "tiers"),
    [("dense_tied", "balanced", 3), ("moe", "aggressive", 2)],
)
def test_tokens_are_those_of_converting_first_with_the_same_choice(
    name: str, level: str, tiers: int, tmp_path: Path
) -> None:
    source, given = tiny.checkpoint(name, tmp_path), tiny.inputs("image")
    budgets = options(tmp_path, tiers)
    found = answers(source, given, level=level, **budgets)
    (store,) = stores(budgets["nvme_dir"])
    chosen = codecs_of(store)
    assert len(set(chosen.values())) > 1
    report = json.loads((store / REPORT).read_text())
    assert 0 < report["predicted_error"] <= report["error_budget"]
    to_store(source, tmp_path / "first", dtype="keep", progress=Silent(), codecs=chosen)
    kv = kv_of(None, level)
    first = answers(tmp_path / "first", given, kv=kv)
    for one, other in zip(found, first, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_store_is_made_once_for_each_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, given = tiny.DATA / "dense", tiny.inputs("text")
    budgets = options(tmp_path)
    first = answers(source, given, level="balanced", **budgets)
    (store,) = stores(budgets["nvme_dir"])
    before = (store / "manifest.json").stat()
    with monkeypatch.context() as patch:
        patch.setattr(encoded_store, "to_store", None)
        again = answers(source, given, level="balanced", **budgets)
    np.testing.assert_array_equal(first[0], again[0])
    assert (store / "manifest.json").stat() == before
    load(source, level="balanced", **budgets | {"device_memory": "4MB"})
    load(source, level="aggressive", **budgets)
    assert len(stores(budgets["nvme_dir"])) == 3
    load(store, level="aggressive", **budgets)  # what is encoded stays as it is
    assert len(stores(budgets["nvme_dir"])) == 3


class Watched:
    """Remembers what is shown: done and all bytes of each stage, and lines."""

    def __init__(self) -> None:
        self.stages: dict[str, list[int]] = {}
        self.lines: list[str] = []

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *_: object) -> None:
        self.stages["left"] = []

    def stage(self, name: str, total_bytes: int) -> None:
        self.stages[name] = [0, total_bytes]

    def advance(self, nbytes: int) -> None:
        list(self.stages.values())[-1][0] += nbytes

    def say(self, line: str) -> None:
        self.lines.append(line)


def test_who_watches_sees_each_stage_to_its_end_and_then_what_was_made_and_where(
    tmp_path: Path,
) -> None:
    source, budgets = tiny.DATA / "dense", options(tmp_path)
    seen, again = Watched(), Watched()
    load(source, level="balanced", display=seen, **budgets)
    (store,) = stores(budgets["nvme_dir"])
    assert list(seen.stages) == ["measuring", "converting", "left"]
    assert all(done == whole > 0 for done, whole in list(seen.stages.values())[:2])
    files = [path.stat().st_size for path in store.rglob("*") if path.parent != store]
    (line,) = seen.lines
    shown = re.fullmatch(r"encoded ([\d,]+) B of weights as ([\d,]+) B in (.*)", line)
    assert shown is not None
    raw_bytes, nbytes = (int(shown[number].replace(",", "")) for number in (1, 2))
    assert sum(files) <= nbytes < raw_bytes
    assert shown[3] == str(store)
    load(source, level="balanced", display=again, **budgets)
    assert (again.stages, again.lines) == ({}, [])


def test_who_does_not_watch_hears_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, given, budgets = tiny.DATA / "dense", tiny.inputs("text"), options(tmp_path)
    answers(source, given, level="balanced", **budgets)
    assert stores(budgets["nvme_dir"])
    assert capsys.readouterr() == ("", "")


def test_a_killed_attempt_goes_on_with_what_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, given, budgets = tiny.DATA / "dense", tiny.inputs("text"), options(tmp_path)
    put, left = ArrayWriter.put, [20]

    def killed(self: ArrayWriter, *arguments: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        put(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ArrayWriter, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            answers(source, given, level="balanced", **budgets)
    (partial,) = stores(budgets["nvme_dir"])
    assert partial.suffix == ".partial"
    monkeypatch.setattr(encoded_store, "_chooser", lambda work: None)  # which cannot be called
    found = answers(source, given, level="balanced", **budgets)
    (store,) = stores(budgets["nvme_dir"])
    assert store.suffix == ""
    for one, other in zip(found, answers(store, given), strict=True):
        np.testing.assert_array_equal(one, other)


def test_without_a_place_a_level_is_refused_in_one_line(tmp_path: Path) -> None:
    budgets = options(tmp_path) | {"nvme_dir": None}
    with pytest.raises(UsageError, match=r"add --nvme-dir, or make a store") as refused:
        Qwen3VL.from_pretrained(tiny.DATA / "dense", level="balanced", **budgets)
    assert "\n" not in str(refused.value)


def test_the_space_on_disk_is_kept(tmp_path: Path) -> None:
    source, given, budgets = tiny.DATA / "dense", tiny.inputs("text"), options(tmp_path)
    with pytest.raises(DoesNotFitError, match=r"--nvme-space allows 100,000 B") as refused:
        Qwen3VL.from_pretrained(source, level="balanced", nvme_space="100KB", **budgets)
    needed = refused.value.smallest["nvme"]
    answers(source, given, level="balanced", nvme_space=needed, **budgets)
    (store,) = [path for path in stores(budgets["nvme_dir"]) if not path.suffix]
    held = sum(
        -(-path.stat().st_size // 4096) * 4096
        for path in store.rglob("*")
        if path.is_file() and path.parent != store
    )
    assert 0.5 * needed < held <= needed


def test_where_nothing_is_gained_the_checkpoint_itself_is_loaded(tmp_path: Path) -> None:
    source, given, budgets = tiny.DATA / "dense", tiny.inputs("text"), options(tmp_path)
    store = helper.store_of(source, tmp_path / "raw")
    machine = load_machine(budgets["machine"])
    compute = Compute(1e9, 1e13)  # whatever it reads, computing takes longer
    write_machine(dataclasses.replace(machine, compute=compute), tmp_path / "slow.toml")
    budgets |= {"machine": tmp_path / "slow.toml", "device_memory": "500MB"}
    found = answers(store, given, level="balanced", **budgets)
    assert not stores(budgets["nvme_dir"])
    assert not described(store)[1]
    for one, other in zip(found, answers(store, given), strict=True):
        np.testing.assert_array_equal(one, other)


def test_forms_are_chosen_for_a_cache_that_may_be_cut_only_where_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def no_plan(*_: Any, **how: Any) -> None:
        raise DoesNotFitError("in one piece", {})

    def noted(config: Any, machine: Any, request: Request, **how: Any) -> None:
        asked.append(request.kv_blocks)
        if request.kv_blocks == "never":
            no_plan()

    # Where a plan is wanted in one piece, there is none.
    monkeypatch.setattr(encoded_store, "forecast", noted)
    monkeypatch.setattr(encoded_store, "smallest", lambda level: no_plan)
    budgets = options(tmp_path) | {"max_context": 1000}
    load(tiny.DATA / "dense", level="balanced", **budgets)
    assert (asked, len(stores(budgets["nvme_dir"]))) == (["needed"], 1)
    # Another choice is made for it, and another store: nothing of the first one is taken.
    with pytest.raises(DoesNotFitError, match="in one piece"):
        load(tiny.DATA / "dense", level="balanced", kv_blocks="never", **budgets)
    assert asked == ["needed", "never"]
