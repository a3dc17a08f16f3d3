"""scripts/calibrate.py, from measuring to a file that planning finds."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import shutil
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from memsched.calibration import descent
from memsched.calibration.requests import BLOCK_BYTES, QUEUE_DEPTHS
from memsched.calibration.scratch import Scratch
from memsched.calibration.trials import measure
from memsched.cost import Roofline, observation_file, observations, plan_seconds
from memsched.cost.coefficients_file import cost_beside, cost_file
from memsched.cost.learned import LearnedCost
from memsched.cost.observation_file import read, write
from memsched.cost.observations import RunObservation, observe
from memsched.cost.rates import rates_digest
from memsched.detection import calibrated as known
from memsched.detection.this_machine import detect
from memsched.errors import StoreError
from memsched.machine import Machine
from memsched.profiles import load_machine
from qwen3vl_jax.planned import learning, rehearsals
from qwen3vl_jax.planned.dry_run import dry_run
from qwen3vl_jax.planned.loading import Budgets, machine_and_cost
from qwen3vl_jax.planned.rehearsals import CALIBRATION, EVALUATION, Rehearsal, Shape, trial_of
from qwen3vl_jax.planned.request import Request
from scripts import calibrate, generate, plan

pytestmark = pytest.mark.usefixtures("shared_traces")

SMALL = Shape(256, 512, 2, 1, 2, 2048, tower=128, depth=3)
OTHER = Shape(384, 640, 3, 1, 2, 2048, tower=128, depth=3)
TESTED = Shape(320, 576, 2, 1, 2, 2048, tower=128, depth=3)


@dataclasses.dataclass(frozen=True)
class Done:
    """A calibration that ended well: settings it wrote to, where it measured, what it printed."""

    settings: Path
    disk: Path
    found: dict[str, Any]
    text: str


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    """Models that are measured in a moment."""
    # The first ones in their order, of which two are of one shape; but small.
    shapes = dict(
        zip(dict.fromkeys(one.shape for one in CALIBRATION), (SMALL, OTHER), strict=False)
    )
    few = tuple(
        dataclasses.replace(one, shape=shapes[one.shape], context=64) for one in CALIBRATION[:4]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsals, "CALIBRATION", few)
        tested = (Rehearsal(TESTED, "decode", 64), Rehearsal(TESTED, "decode", 64, codec="int8"))
        patch.setattr(rehearsals, "EVALUATION", tested)
        patch.setattr(calibrate, "MEASURE_S", 0.05)
        # Whatever is not needed comes too late.
        patch.setattr(calibrate, "PREPARING", 0.0)
        patch.setattr(descent, "STEPS", 200)
        yield patch


@pytest.fixture(scope="module")
def done(patch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """One calibration for all tests."""
    settings, disk = (tmp_path_factory.mktemp(name) for name in ("settings", "disk"))
    patch.setenv("XDG_CONFIG_HOME", str(settings))
    found, text = run("--minutes", "0.05", "--nvme-dir", str(disk), "--evaluate")
    return Done(settings, disk, found, text)


def run(*arguments: str) -> tuple[dict[str, Any], str]:
    """The last line of stdout as JSON, and all lines before it."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert calibrate.main([*arguments, "--json"]) == 0
    *lines, last = out.getvalue().splitlines()
    return json.loads(last), "\n".join(lines)


def test_what_was_measured_is_found_by_planning(
    done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = known.user_profile()
    assert profile == done.settings / "memsched" / "machine.toml"
    assert Path(done.found["cost_model"]) == cost_file(profile)
    assert cost_file(profile).stat().st_size < 8000
    # Three files are left, and nothing where it measured.
    assert len(list(profile.parent.iterdir())) == 3
    assert list(done.disk.iterdir()) == []
    machine = load_machine(profile)
    assert isinstance(cost_beside(profile, machine), LearnedCost)
    assert set(done.found["links"]) == {"nvme->device", "device->nvme"}
    reading = machine.link("nvme", "device")
    assert reading is not None
    assert reading.block_bytes in BLOCK_BYTES
    assert reading.queue_depth in QUEUE_DEPTHS

    # Planning takes the measured rates and what is free now, and measures nothing again.
    monkeypatch.setattr("memsched.detection.this_machine.measure_disk", pytest.fail)
    here, cost = machine_and_cost(Budgets(nvme_dir=done.disk))
    assert (here.compute, here.links) == (machine.compute, machine.links)
    assert isinstance(cost, LearnedCost)
    trial = trial_of(Rehearsal(TESTED, "decode", 64), here)
    assert 1e-5 < plan_seconds(trial.plan, trial.program, trial.machine, cost) < 1.0
    asked = Request(prompt_tokens=16, new_tokens=4)
    told = dry_run(
        rehearsals.config_of(TESTED), asked, Budgets(nvme_dir=done.disk), dtype="bfloat16"
    ).data
    decode = told["phases"]["decode"]
    assert decode["seconds"] <= decode["seconds_p90"] < 1.0
    assert (
        told["assumptions"]["seconds"]
        == "learned from programs of 2 different shapes on this machine"
    )


def test_a_model_that_does_not_fit_is_left_out(
    done: Done, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = load_machine(known.user_profile())
    large = dataclasses.replace(SMALL, hidden=1024, inner=4096)
    with pytest.MonkeyPatch.context() as more:
        more.setattr(
            rehearsals,
            "CALIBRATION",
            (*rehearsals.CALIBRATION, Rehearsal(large, "decode", 64)),
        )
        more.setattr(calibrate, "PREPARING", 0.6)
        trials, _ = calibrate._trials(
            machine.with_capacities({"device": 16 << 20}), 60.0, evaluate=False
        )
    assert [trial.case for trial in trials] == 2 * ["256x512"] + 2 * ["384x640"]
    assert "left out decode 1024x4096" in capsys.readouterr().err


def test_the_evaluation_is_of_models_that_nothing_was_fitted_to(done: Done) -> None:
    held_out = {one["what"] for one in done.found["held_out"]}
    assert held_out >= {"steps", "whole passes", "moved out"}
    assert done.found["cases"] == 2
    (peak,) = done.found["peaks"]
    assert peak["name"].startswith("decode 320x576")
    assert peak["ledger_bytes"] == peak["predicted_bytes"] < peak["process_bytes"]
    assert "below p90" in done.text


@pytest.mark.parametrize("evaluate", [False, True])
def test_however_little_time_there_is_two_shapes_are_measured_and_one_to_test_with(
    done: Done, monkeypatch: pytest.MonkeyPatch, *, evaluate: bool
) -> None:
    def named(one: Rehearsal, machine: Machine) -> SimpleNamespace:
        return SimpleNamespace(name=one.name, case=one.shape.name)

    monkeypatch.setattr(rehearsals, "trial_of", named)
    monkeypatch.setattr(rehearsals, "CALIBRATION", CALIBRATION)
    monkeypatch.setattr(rehearsals, "EVALUATION", EVALUATION)
    monkeypatch.setattr("memsched.calibration.trials.measure", lambda *_, **__: None)
    machine = load_machine(known.user_profile())
    trials, tested = calibrate._trials(machine, 0.0, evaluate=evaluate)
    rounds = calibrate._rounds(trials, tested, None, 0.0)
    assert [trial.name for trial in trials] == list(rounds)
    # The first two are of one shape, so it takes a third; what is tested takes its turn before.
    wanted = [CALIBRATION[0], CALIBRATION[1], *EVALUATION[: int(evaluate)], CALIBRATION[2]]
    assert list(rounds) == [one.name for one in wanted]
    assert CALIBRATION[0].shape == CALIBRATION[1].shape != CALIBRATION[2].shape


def test_what_streams_has_the_steps_that_machines_stream_with_and_a_twin_in_memory() -> None:
    assert all(one.split for one in (*CALIBRATION, *EVALUATION) if one.share < 1.0)
    streaming = [one for one in CALIBRATION if one.share < 1.0]
    twins = [one for one in streaming if dataclasses.replace(one, share=1.0) in CALIBRATION]
    assert {one.phase for one in twins} == {one.phase for one in streaming}


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the end of every step were seen at once, however busy the machine is."""
    monkeypatch.setattr(observations, "UNSURE_S", 1e3)


@pytest.mark.usefixtures("idle")
def test_runs_can_be_learnt_from(done: Done, tmp_path: Path) -> None:
    profile = copied(done, tmp_path)
    file, machine = known.observation_file(profile), load_machine(profile)
    before = read(file, rates_digest(machine))
    trial = trial_of(Rehearsal(TESTED, "decode", 64), machine)
    with Scratch(tmp_path) as scratch:
        spans = measure(trial, scratch, passes=1).spans[0]
    assert (
        write(file, rates_digest(machine), observe(trial.plan, trial.program, machine, spans)) > 0
    )
    after = read(file, rates_digest(machine))
    assert after[: len(before)] == before
    found, _ = run("--from-runs", "--out", str(profile))
    assert found["cases"] == 3


LEARNING = ("--prompt", "hi", "--greedy", "--learn", "--dtype", "bfloat16", "-q")


def copied(done: Done, folder: Path) -> Path:
    """The profile of a copy of the calibration."""
    return Path(shutil.copytree(done.settings, folder / "copy")) / "memsched/machine.toml"


@pytest.mark.usefixtures("idle")
def test_an_answer_adds_what_it_measured(
    done: Done, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file, machine = known.observation_file(known.user_profile()), load_machine(known.user_profile())
    before = read(file, rates_digest(machine))
    assert generate.main((*LEARNING, "-n", "3")) == 0
    after = read(file, rates_digest(machine))
    added = after[len(before) :]
    assert after[: len(before)] == before
    # The second token's pass: that of the prompt and the first token's were cold.
    assert f"learned {len(added)} observations" in capsys.readouterr().err
    (_,) = {one.case for one in added if isinstance(one, RunObservation)}

    # A pass that is the first of its plan says nothing, and nobody is warned of it.
    assert generate.main((*LEARNING, "-n", "1")) == 0
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("learned nothing: no plan was carried out twice")
    assert read(file, rates_digest(machine)) == after


@pytest.mark.usefixtures("idle")
def test_a_file_without_room_is_said_to_be_full(
    done: Done,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    profile = copied(done, tmp_path)
    size = known.observation_file(profile).stat().st_size
    monkeypatch.setattr(observation_file, "MOST_BYTES", size + 10)
    assert generate.main((*LEARNING, "-n", "3", "--machine", str(profile))) == 0
    assert "machine.observations.jsonl has no room for" in capsys.readouterr().err
    assert known.observation_file(profile).stat().st_size == size
    run("--from-runs", "--out", str(profile))
    assert known.observation_file(profile).stat().st_size <= size // 2 + 5


def test_nothing_can_be_learnt_without_a_calibration(
    done: Done, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    machine = str(tmp_path / "none.toml")
    assert generate.main((*LEARNING, "--machine", machine)) == 2
    assert "run scripts/calibrate.py first" in capsys.readouterr().err
    profile = copied(done, tmp_path)
    cost_file(profile).unlink()
    assert generate.main((*LEARNING, "--machine", str(profile))) == 2
    assert "has no cost model beside it in machine.cost.json" in capsys.readouterr().err


def test_what_was_measured_elsewhere_takes_nothing_of_this_machine(
    done: Done,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    profile = copied(done, tmp_path)
    file = known.observation_file(profile)
    before = file.read_bytes(), cost_file(profile).read_bytes()
    monkeypatch.setattr(known, "hardware_identity", lambda: "f" * 16)
    for machine in (("--machine", str(profile)), ()):
        assert generate.main((*LEARNING, *machine)) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert f"and this is {'f' * 16}: another processor" in err
    assert calibrate.main(("--from-runs", "--out", str(profile))) == 2
    assert f"{profile} was calibrated on hardware" in capsys.readouterr().err
    assert (file.read_bytes(), cost_file(profile).read_bytes()) == before


def test_a_calibration_of_another_platform_takes_nothing_of_this_machine(
    done: Done, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = copied(done, tmp_path)
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(platform="tpu")])
    assert generate.main((*LEARNING, "--machine", str(profile))) == 2
    assert "is of platform 'cpu', and JAX computes on 'tpu'" in capsys.readouterr().err


def test_whatever_stops_learning_is_said_before_the_answer(
    done: Done, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    profile = copied(done, tmp_path)
    known.observation_file(profile).unlink()
    known.observation_file(profile).mkdir()
    assert generate.main((*LEARNING, "--machine", str(profile))) == 5
    out, err = capsys.readouterr()
    assert out == ""
    assert "machine.observations.jsonl: Is a directory" in err
    cost_file(profile).write_text("{")
    assert generate.main((*LEARNING, "--machine", str(profile))) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert "machine.cost.json: not JSON" in err


def test_reports_are_written_though_learning_fails(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise StoreError("observations: No space left on device; give another place")

    monkeypatch.setattr(learning, "write", full)
    report = tmp_path / "report.json"
    assert generate.main((*LEARNING, "-n", "2", "--report", str(report))) == 5
    assert "decode" in json.loads(report.read_text())["phases"]


def test_a_profile_of_other_hardware_or_a_damaged_one_is_passed_over(
    done: Done, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = detect(tmp_path, measure_s=0.0)
    assert isinstance(known.calibrated(machine)[1], LearnedCost)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(known, "hardware_identity", lambda: "f" * 16)
        same, cost = known.calibrated(machine)
        assert same is machine
        assert isinstance(cost, Roofline)
    profile = copied(done, tmp_path)
    cost_file(profile).write_text("{")
    assert known.calibrated(machine, profile)[0] is machine


def test_who_has_a_damaged_calibration_is_told_that_it_was_ignored(
    done: Done, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = ("--prompt", "hi", "-n", "1", "-q")
    assert generate.main(question) == 0
    assert capsys.readouterr().err == ""
    cost_file(copied(done, tmp_path)).write_text("{")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "copy"))
    for work in (
        lambda: generate.main(question),
        lambda: generate.main((*question, "--dry-run")),
        lambda: plan.main((str(generate.SHIPPED_CHECKPOINT),)),
    ):
        assert work() == 0
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("ignored what was learned of this machine: cost model ")
        assert "machine.cost.json: not JSON" in said


@pytest.mark.parametrize("taken", ["laptop.toml", "laptop.cost.json", "laptop.observations.jsonl"])
def test_what_cannot_be_written_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, taken: str
) -> None:
    (tmp_path / taken).mkdir()
    monkeypatch.setattr("memsched.detection.this_machine.detect", pytest.fail)
    assert calibrate.main(("--out", str(tmp_path / "laptop.toml"))) == 5
    said = capsys.readouterr().err
    assert f"{taken} is not a regular file" in said
    assert "measuring" not in said


@pytest.mark.parametrize("place", ["/proc/laptop.toml", "missing/deep/laptop.toml"])
def test_a_place_that_takes_no_file_is_refused_before_anything_is_measured_and_not_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, place: str
) -> None:
    monkeypatch.setattr("memsched.detection.this_machine.detect", pytest.fail)
    assert calibrate.main(("--out", str(tmp_path / place))) == 5
    said = capsys.readouterr().err
    assert "name another" in said
    assert "measuring" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("done_files", "found"), [(0, "old"), (1, "none"), (2, "new"), (3, "new")])
def test_whenever_writing_ends_there_is_the_old_pair_or_the_new_one_or_a_line_says_why_not(
    done: Done, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, done_files: int, found: str
) -> None:
    profile = Path(shutil.copytree(done.settings, tmp_path / "copy")) / "memsched/machine.toml"
    old = load_machine(profile)
    compute = dataclasses.replace(old.compute, flops_per_s=2 * old.compute.flops_per_s)
    new, here = dataclasses.replace(old, compute=compute), detect(tmp_path, measure_s=0.0)
    cost = known.calibrated(here, profile)[1]
    assert isinstance(cost, LearnedCost)
    coefficients = dataclasses.replace(cost.coefficients, machine=rates_digest(new))
    with monkeypatch.context() as failing:
        replacements = iter([os.replace] * done_files)
        failing.setattr(os, "replace", lambda *paths: next(replacements, _no_room)(*paths))
        with contextlib.nullcontext() if done_files == 3 else pytest.raises(StoreError):
            calibrate._write(profile, new, coefficients, ())
    machine, cost = known.calibrated(here, profile)
    assert isinstance(cost, Roofline if found == "none" else LearnedCost)
    assert machine.compute == {"old": old, "none": here, "new": new}[found].compute
    assert ("fitted for rates" in str(known.damage(profile))) is (found == "none")
    assert len(list(profile.parent.iterdir())) == 3


def _no_room(*paths: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--minutes", "0"), 2, "not from 0.05"),
        (("--minutes", "soon"), 2, "soon is not a number"),
        (("--nvme-dir", "/nowhere"), 5, "/nowhere"),
        (("--from-runs", "--out", "/nowhere/a.toml"), 2, "/nowhere/a.toml"),
        (("--from-runs", "--evaluate"), 2, "leave out --evaluate"),
        (("--from-runs", "--minutes", "2"), 2, "leave out --minutes"),
        (("--from-runs", "--nvme-dir", "/tmp"), 2, "leave out --nvme-dir"),
    ],
)
def test_what_makes_no_sense_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, says: str
) -> None:
    assert calibrate.main(arguments) == code
    assert says in capsys.readouterr().err
