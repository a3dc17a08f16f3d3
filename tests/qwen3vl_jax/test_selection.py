"""Codecs that are chosen while a checkpoint is converted, by what they would change."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoint_factory as factory
import numpy as np
import pytest
import tiny
from converting import convert, files, nothing_left
from encoded_stores import HEAD, decoded, is_encoded

from memsched.codecs import parse_codec
from memsched.codecs.levels import Level
from qwen3vl_jax.checkpoints import selection as subject
from qwen3vl_jax.checkpoints import sensitivity
from qwen3vl_jax.checkpoints.conversion import to_store
from qwen3vl_jax.checkpoints.encodings import origin
from qwen3vl_jax.checkpoints.opening import described, open_checkpoint
from qwen3vl_jax.checkpoints.selection import Calibration, Selection
from qwen3vl_jax.checkpoints.work_directory import WorkDirectory
from qwen3vl_jax.config import load_config
from qwen3vl_jax.errors import WeightError
from qwen3vl_jax.progress import Silent

CODECS = ("int8", "int8:128", "int4:64", "int4:32", "int4:32:zero")
REPORT, TABLE = "encoding_report.json", "sensitivity.json"


def chosen_store(
    source: Path, destination: Path, budget: float, calibration: Calibration | None = None
) -> dict[str, Any]:
    """A store with chosen codecs; its report."""
    selection = Selection(Level("tried", budget, 0.1, CODECS), calibration)
    to_store(source, destination, dtype="keep", progress=Silent(), selection=selection)
    report = json.loads((destination / REPORT).read_text())
    assert isinstance(report, dict)
    return report


@pytest.fixture(params=["dense", "dense_tied", "moe"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    return tiny.checkpoint(request.param, tmp_path / "made")


def raw_matrices(source: Path, names: Iterator[str]) -> dict[str, np.ndarray]:
    config, wanted = load_config(source), set(names)
    with open_checkpoint(source, config) as checkpoint:
        entries = subject.matrices(config)
        return {e.path: checkpoint.read(origin(e, config)) for e in entries if e.path in wanted}


def test_what_is_chosen_has_the_errors_and_bytes_that_its_report_says(
    source: Path, tmp_path: Path
) -> None:
    report = chosen_store(source, tmp_path / "store", 0.04)
    rows, encodings = report["arrays"], described(tmp_path / "store")[1]
    raw = raw_matrices(source, rows)
    assert all(is_encoded(name, parse_codec("int8")) for name in rows)
    assert len({row["codec"] for row in rows.values()}) > 1
    for name, row in rows.items():
        codec = encodings[name].codec if name in encodings else "raw"
        assert (row["codec"], row["raw_bytes"]) == (codec, raw[name].nbytes)
        after = decoded(raw[name], codec)
        wanted = np.linalg.norm(after - raw[name]) / np.linalg.norm(raw[name])
        assert row["error"] == pytest.approx(wanted, rel=1e-4)  # float32 sums in the test
        packed = parse_codec(codec).encode(raw[name])
        assert row["nbytes"] == packed.nbytes
    total = math.sqrt(sum((r["error"] * r["sensitivity"]) ** 2 for r in rows.values()))
    assert report["predicted_error"] == pytest.approx(total)
    assert 0.03 < total <= 0.04
    assert report["bound_bytes"] <= report["nbytes"] == sum(r["nbytes"] for r in rows.values())


@pytest.mark.parametrize("arguments", [("--level", "minimal"), ("--error-budget", "0")])
def test_without_a_budget_no_bit_changes(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    factory.checkpoint(tmp_path / "hf", text={"num_hidden_layers": 1})
    assert convert(tmp_path / "hf", tmp_path / "raw") == 0
    assert convert(tmp_path / "hf", tmp_path / "store", "--codec", "auto", *arguments) == 0
    found, wanted = files(tmp_path / "store"), files(tmp_path / "raw")
    assert {row["codec"] for row in json.loads(found.pop(REPORT))["arrays"].values()} == {"raw"}
    del found["manifest.json"], wanted["manifest.json"]  # one of them names the report
    assert found == wanted
    assert convert(tmp_path / "store", "--verify") == 0


def test_a_larger_budget_makes_a_smaller_store(source: Path, tmp_path: Path) -> None:
    reports = [chosen_store(source, tmp_path / str(b), b) for b in (0.0, 0.01, 0.04, 5.0)]
    sizes = [report["nbytes"] for report in reports]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    smallest = {row["codec"] for row in reports[-1]["arrays"].values()}
    assert smallest <= {"int4:64", "int4:32"}  # what rows of 32 numbers are smallest in


def test_matrices_are_measured_in_the_dtype_that_they_get(tmp_path: Path) -> None:
    factory.checkpoint(tmp_path / "hf")
    wide, narrow = ((chosen_dtype(tmp_path, dtype), dtype) for dtype in ("float32", "bfloat16"))
    for name, row in wide[0].items():
        assert row["raw_bytes"] == 2 * narrow[0][name]["raw_bytes"]


def chosen_dtype(folder: Path, dtype: str) -> dict[str, Any]:
    arguments = ("--codec", "auto", "--dtype", dtype)
    assert convert(folder / "hf", folder / dtype, *arguments, "--verify") == 0
    rows = json.loads((folder / dtype / REPORT).read_text())["arrays"]
    assert isinstance(rows, dict)
    return rows


def test_a_matrix_that_a_codec_has_no_room_for_gets_another(tmp_path: Path) -> None:
    values = factory.config_values()
    tensors = factory.random_tensors(values)
    huge = "language_model.layers.0.self_attn.q_proj.weight"
    tensors[f"model.{huge}"][0, 0] = 1e30  # beyond what scales of float16 reach
    broken = "language_model.layers.0.self_attn.o_proj.weight"
    tensors[f"model.{broken}"][0, 0] = np.nan
    factory.save(tmp_path / "hf", values, tensors)
    rows = chosen_store(tmp_path / "hf", tmp_path / "store", 5.0)["arrays"]
    assert rows[huge]["codec"].startswith("int8")
    assert (rows[broken]["codec"], rows[broken]["reason"]) == (
        "raw",
        "raw: there is no codec for it",
    )


# ---- sensitivities ----


def calibration(config_of: Path, value: float, digest: str = "a") -> Calibration:
    config = load_config(config_of)
    names = sensitivity.classes((e.path for e in subject.matrices(config)), config)
    return Calibration(lambda: dict.fromkeys(names, value), digest)


def test_n_matrices_of_a_class_share_its_sensitivity_as_squares(
    source: Path, tmp_path: Path
) -> None:
    report = chosen_store(source, tmp_path / "store", 0.1, calibration(source, 3.0))
    config = load_config(source)
    sums: dict[str, float] = {}
    for name, row in report["arrays"].items():
        key = sensitivity.class_of(name, config)
        sums[key] = sums.get(key, 0.0) + row["sensitivity"] ** 2
    assert report["sensitivities"] == "measured"
    assert all(total == pytest.approx(9.0) for total in sums.values())


@pytest.mark.parametrize(
    ("layers", "parts"),
    [
        (1, ["0-0"]),
        (2, ["0-0", "1-1"]),
        (4, ["0-1", "2-2", "3-3"]),
        (28, ["0-9", "10-18", "19-27"]),
    ],
)
def test_layers_are_in_three_parts(layers: int, parts: list[str], tmp_path: Path) -> None:
    values = factory.config_values(text={"num_hidden_layers": layers})
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = load_config(tmp_path)
    names = [f"language_model.layers.{n}.mlp.up_proj.weight" for n in range(layers)]
    found = sensitivity.classes([*names, HEAD], config)
    assert list(found) == [*(f"up_proj:{part}" for part in parts), "head"]
    for part in parts:
        first, last = map(int, part.split("-"))
        assert found[f"up_proj:{part}"] == names[first : last + 1]


def test_every_role_has_a_default(source: Path) -> None:
    config = load_config(source)
    roles = {sensitivity.role_of(entry.path) for entry in subject.matrices(config)}
    assert roles <= sensitivity.DEFAULTS.keys()


def test_a_raw_store_keeps_what_was_measured_and_is_chosen_for_by_it(tmp_path: Path) -> None:
    factory.checkpoint(tmp_path / "hf")
    raw = tmp_path / "raw"
    level = Selection(Level("minimal", 0.0, 0.1, ()), calibration(tmp_path / "hf", 0.7))
    to_store(tmp_path / "hf", raw, dtype="keep", progress=Silent(), selection=level)
    report = chosen_store(raw, tmp_path / "small", 0.01)
    assert report["sensitivities"] == "measured"
    assert report == chosen_store(
        tmp_path / "hf", tmp_path / "again", 0.01, calibration(tmp_path / "hf", 0.7)
    )
    assert (tmp_path / "small" / TABLE).read_bytes() == (raw / TABLE).read_bytes()
    (raw / TABLE).write_text((raw / TABLE).read_text().replace("0.7", "0.1", 1))
    with pytest.raises(WeightError, match=f"{TABLE} is not the file that manifest.json knows"):
        chosen_store(raw, tmp_path / "damaged", 0.01)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[]", "sensitivity.json"),
        (b'{"format": "other", "version": 1, "classes": {}}', "malformed"),
        (b'{"format": "qwen3vl-sensitivity", "version": 1, "classes": []}', "malformed"),
        (b'{"format": "qwen3vl-sensitivity", "version": 2, "classes": {}}', "malformed"),
        (sensitivity.spelled({"head": -1.0}), "no number from 0"),
        (sensitivity.spelled({"head": math.nan}), "NaN"),
        (sensitivity.spelled({"foot": 1.0}), "'foot' is in one of model and file"),
        (sensitivity.spelled({}), "'head' is in one"),
    ],
)
def test_a_table_of_sensitivities_is_read_with_suspicion(content: bytes, says: str) -> None:
    with pytest.raises(WeightError, match=says) as refused:
        sensitivity.read(content, "sensitivity.json", ["head"])
    assert "\n" not in str(refused.value)


def test_a_table_of_sensitivities_comes_back() -> None:
    written = {"head": 1.5, "q_proj:0-3": 0.1}
    assert sensitivity.read(sensitivity.spelled(written), "s", written) == written


# ---- going on ----


class Killed(Exception):
    """In the place of a kill."""


def test_what_was_measured_before_a_kill_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory.checkpoint(tmp_path / "hf", "moe", tied=True)
    measured: list[str] = []

    def errors(values: np.ndarray, path: str, codecs: tuple[str, ...]) -> dict[str, float]:
        measured.append(path)
        if len(measured) == 20:
            raise Killed
        return real(values, path, codecs)

    real = subject._errors
    monkeypatch.setattr(subject, "_errors", errors)
    table = calibration(tmp_path / "hf", 0.6)
    with pytest.raises(Killed):
        chosen_store(tmp_path / "hf", tmp_path / "store", 0.02, table)
    again = Calibration(lambda: pytest.fail("measured twice"), table.digest)
    chosen_store(tmp_path / "hf", tmp_path / "store", 0.02, again)
    # Notes are made for sixteen matrices together.
    assert sorted(measured[:16]) == sorted(set(measured[:16]) - set(measured[20:]))
    monkeypatch.undo()
    chosen_store(tmp_path / "hf", tmp_path / "straight", 0.02, table)
    assert files(tmp_path / "store") == files(tmp_path / "straight")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("other", [{"budget": 0.03}, {"digest": "b"}])
def test_work_with_another_budget_or_other_prompts_starts_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    factory.checkpoint(tmp_path / "hf")
    given = {"budget": 0.02, "digest": "a"}

    def make(name: str, budget: float, digest: str) -> None:
        table = calibration(tmp_path / "hf", 0.5, digest)
        chosen_store(tmp_path / "hf", tmp_path / name, budget, table)

    with monkeypatch.context() as patch:
        patch.setattr(WorkDirectory, "publish", lambda work: work.note({"left": {}}))
        with pytest.raises(FileNotFoundError):  # it is not there yet
            make("store", **given)
    make("store", **(given | other))
    make("straight", **(given | other))
    assert files(tmp_path / "store") == files(tmp_path / "straight")
