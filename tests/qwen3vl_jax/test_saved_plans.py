"""Plans in a file are carried out as they are, and refused where they do not belong."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import planned_models as helper
import pytest
import tiny

from memsched.errors import DoesNotFitError, PlanError
from memsched.plan_json import to_json
from qwen3vl_jax import Qwen3VL
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.planned.dry_run import dry_run_of
from qwen3vl_jax.planned.saved import read_plans
from qwen3vl_jax.planned.saving import adopt, plans_text
from qwen3vl_jax.planned.tally import MOVING

pytestmark = pytest.mark.usefixtures("shared_traces")

TOKENS = 3
# Some weights are streamed; and what is too little for such plans.
BUDGET, LESS = 1_300_000, 1_200_000


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("machines")
    return {tiers: helper.machine_file(folder, tiers) for tiers in (2, 3)}


Save = Callable[[int, int], Path]


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory, machines: dict[int, Path]) -> Save:
    """`save(tiers, device_bytes)`: a file of plans for the picture's request."""

    @functools.cache
    def made(tiers: int, device_bytes: int) -> Path:
        budgets = {"machine": machines[tiers], "device_memory": device_bytes}
        dry = dry_run_of(tiny.DATA / "dense", None, tiny.inputs("image"), TOKENS, budgets)
        assert dry.found is not None
        file = tmp_path_factory.mktemp("plans") / "plans.json"
        file.write_text(plans_text(dry.found))
        return file

    return made


def opened(machine: Path, **budgets: Any) -> Qwen3VL:
    return helper.planned(tiny.DATA / "dense", machine=machine, **budgets)


@pytest.mark.parametrize("tiers", [2, 3])
def test_they_are_carried_out_and_the_answer_is_the_same(
    tiers: int, save: Save, machines: dict[int, Path]
) -> None:
    inputs = tiny.inputs("image")
    wanted = helper.told(Qwen3VL.from_pretrained(tiny.DATA / "dense"), inputs, tokens=TOKENS)
    file = save(tiers, BUDGET)
    saved = read_plans(file)
    # All the memory that the machine has: a plan made now would keep everything.
    model = opened(machines[tiers])
    adopt(model, saved, inputs, TOKENS)
    found = helper.told(model, inputs, tokens=TOKENS)
    runner = helper.runner_of(model)
    ran = {to_json(tally.plan) for tally in runner.tallies.values() if tally.phase != MOVING}
    assert ran == {to_json(plan) for plan in saved.plans.values()}
    assert runner.executor.ledger_peak_bytes["device"] <= BUDGET
    assert runner.executor.read_bytes > 0
    model.close()
    np.testing.assert_array_equal(found, wanted)


def test_another_request_is_refused_before_anything_runs(
    save: Save, machines: dict[int, Path]
) -> None:
    saved = read_plans(save(2, BUDGET))
    model = opened(machines[2])
    with pytest.raises(UsageError, match=r"no plan for .* it is for .* 3 new ones"):
        adopt(model, saved, tiny.inputs("text"), TOKENS)
    with pytest.raises(UsageError, match="no plan for"):
        adopt(model, saved, tiny.inputs("image"), TOKENS + 1000)
    model.close()


def test_what_is_not_in_the_file_is_not_planned(save: Save, machines: dict[int, Path]) -> None:
    model = opened(machines[2])
    adopt(model, read_plans(save(2, BUDGET)), tiny.inputs("image"), TOKENS)
    with pytest.raises(UsageError, match="no plan for forward"):
        model(**tiny.inputs("text"))
    model.close()


def test_another_model_is_refused(save: Save, machines: dict[int, Path], tmp_path: Path) -> None:
    model = helper.planned(tiny.checkpoint("dense_tied", tmp_path), machine=machines[2])
    with pytest.raises(UsageError):
        adopt(model, read_plans(save(2, BUDGET)), tiny.inputs("image"), TOKENS)
    model.close()


def test_a_smaller_machine_is_refused_with_what_would_do(
    save: Save, machines: dict[int, Path]
) -> None:
    model = opened(machines[2], device_memory=LESS)
    with pytest.raises(DoesNotFitError, match="not 1,200,000 B") as refused:
        adopt(model, read_plans(save(2, BUDGET)), tiny.inputs("image"), TOKENS)
    assert LESS < refused.value.smallest["device"] <= BUDGET
    model.close()


def test_a_machine_without_such_a_tier_is_refused(save: Save, machines: dict[int, Path]) -> None:
    model = opened(machines[2])
    with pytest.raises(UsageError, match="'host', which machine"):
        adopt(model, read_plans(save(3, BUDGET)), tiny.inputs("image"), TOKENS)
    model.close()


def broken(file: Path, change: Callable[[dict[str, Any]], object], folder: Path) -> Path:
    values = json.loads(file.read_text())
    change(values)
    made = folder / "broken.json"
    made.write_text(json.dumps(values))
    return made


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.update(version=1), "version"),
        (lambda v: v.update(forms={}), "chunk_tokens and block_slots"),
        (lambda v: v["forms"].update(chunk_tokens=True), "chunk_tokens and block_slots"),
        (lambda v: v["forms"].update(chunk_tokens=1 << 40), "chunk_tokens and block_slots"),
        (lambda v: v.update(more=1), "keys"),
        (lambda v: v.update(weights=[1]), "weights"),
        (lambda v: v.update(request="two\nlines"), "one line"),
        (lambda v: v["phases"].append(1), "phase, shapes and plan"),
        (lambda v: v["phases"][0].update(shapes=[[["x"], "int32"]]), "shapes must be"),
        (lambda v: v["phases"][0]["plan"]["actions"].append(["dance"]), "no action"),
    ],
)
def test_a_file_of_another_form_is_refused(
    change: Callable[[dict[str, Any]], object], says: str, save: Save, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=says) as refused:
        read_plans(broken(save(2, BUDGET), change, tmp_path))
    assert "\n" not in str(refused.value)


def test_a_plan_that_breaks_a_rule_is_refused(
    save: Save, machines: dict[int, Path], tmp_path: Path
) -> None:
    def forget(values: dict[str, Any]) -> None:
        lists = [phase["plan"]["actions"] for phase in values["phases"]]
        actions, copy = next((a, one) for a in lists for one in a if one[0] == "copy")
        actions.remove(copy)

    saved = read_plans(broken(save(2, BUDGET), forget, tmp_path))
    model = opened(machines[2])
    with pytest.raises(PlanError, match=r"broken\.json: \w+: "):
        adopt(model, saved, tiny.inputs("image"), TOKENS)
    model.close()


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", '{"a": 1, "a": 2}'])
def test_what_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(PlanError, match=r"x\.json"):
        read_plans(tmp_path / "x.json")
    with pytest.raises(PlanError, match="no JSON file"):
        read_plans(tmp_path / "nowhere.json")
