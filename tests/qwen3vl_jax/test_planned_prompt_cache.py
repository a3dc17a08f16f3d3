"""A planned model restores within its budgets, and gives the bits that it would have computed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import planned_models as helper
import pytest
import tiny
from prompt_caches import bits, keeping, kept, parts

from memsched.machine import DEVICE, rounded
from qwen3vl_jax import Qwen3VL
from qwen3vl_jax.planned.recalling import Forecaster
from qwen3vl_jax.planned.runner import PlannedRunner

pytestmark = pytest.mark.usefixtures("shared_traces")

BLOCK = CHUNK = 16
DEVICE_BYTES = 1_500_000  # the weights take 1.9 MB and more
SUBJECTS: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("dense", "image", 2, {}),
    ("dense", "two_images", 2, {"block_slots": BLOCK}),
    ("moe", "text", 3, {}),
)


@pytest.fixture
def opened(located: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[..., Qwen3VL]]:
    """`opened(checkpoint, tiers, **budgets)`: a planned model, with small chunks."""
    models = []

    def make(name: str, tiers: int, **budgets: Any) -> Qwen3VL:
        machine = helper.machine_file(tmp_path, tiers)
        given = {"nvme_dir": tmp_path / "spill", "device_memory": DEVICE_BYTES} | budgets
        model = helper.planned(located(name), machine=machine, **given)
        helper.runner_of(model).chunk_tokens = CHUNK
        models.append(model)
        return model

    yield make
    for model in models:
        model.close()


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every time that room is made, whether weights had to leave; the room is checked."""
    found: list[bool] = []
    make_room = Forecaster.make_room

    def checked(self: Forecaster, nbytes: int, beside: Any) -> bool:
        runner = self._model.runner
        assert isinstance(runner, PlannedRunner)
        before = runner.executor.held
        room = make_room(self, nbytes, beside)
        held = runner.executor.held
        found.append(len(held) < len(before))
        for tier in runner.machine.tiers[:-1]:
            sizes = [runner.specs[rest.array].nbytes for rest in held if rest.tier == tier.name]
            used = nbytes + sum(rounded(size, tier.alignment_bytes) for size in sizes)
            if tier.name == DEVICE:
                arrays = [a for a in jax.tree.leaves(beside) if isinstance(a, jax.Array)]
                used += runner.timetable.cache_bytes + sum(array.nbytes for array in arrays)
            assert used <= tier.capacity_bytes
        return room

    monkeypatch.setattr(Forecaster, "make_room", checked)
    return found


@pytest.mark.parametrize(("name", "case", "tiers", "form"), SUBJECTS)
def test_restored_bits_are_the_computed_ones_within_the_budgets(
    name: str,
    case: str,
    tiers: int,
    form: dict[str, Any],
    opened: Callable[..., Qwen3VL],
    located: Callable[[str], Path],
    rooms: list[bool],
    tmp_path: Path,
) -> None:
    inputs, path = tiny.inputs(case), located(name)
    model = opened(name, tiers)
    wanted = bits(model, inputs, **form)
    told = keeping(model, tmp_path / "cache", path)
    assert bits(model, inputs, **form) == wanted
    assert all(item.stored_bytes for items in parts(model) for item in items)
    another = opened(name, tiers)
    told += keeping(another, tmp_path / "cache", path)
    assert bits(another, inputs, **form) == wanted
    assert all(item.restored for item in parts(another)[0])
    # Without the last chunk, its pictures and what is before it are restored.
    kept(another).entries.forget(parts(another)[0][-1].key)
    assert bits(another, inputs, **form) == wanted
    assert [item.restored for item in parts(another)[0]][:-1] == [True] * (
        len(parts(another)[0]) - 1
    )
    for each in (model, another):
        peaks = helper.runner_of(each).executor.ledger_peak_bytes
        assert peaks[DEVICE] <= DEVICE_BYTES
    assert told == []
    assert rooms


def test_weights_leave_where_they_fill_the_memory(
    opened: Callable[..., Qwen3VL],
    located: Callable[[str], Path],
    rooms: list[bool],
    tmp_path: Path,
) -> None:
    model, inputs = opened("dense", 2), tiny.inputs("image")
    wanted = bits(model, inputs)
    assert sum(rest.tier == DEVICE for rest in helper.runner_of(model).executor.held) > 1
    keeping(model, tmp_path / "cache", located("dense"))
    kept(model).estimates.make_room(DEVICE_BYTES // 2, ())
    assert rooms == [True]
    assert bits(model, inputs) == wanted


def test_what_no_budget_allows_is_said_and_computed(
    opened: Callable[..., Qwen3VL],
    located: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    model, inputs = opened("dense", 2), tiny.inputs("image")
    wanted = bits(model, inputs)
    told = keeping(model, tmp_path / "cache", located("dense"))
    bits(model, inputs)
    assert not kept(model).estimates.make_room(DEVICE_BYTES + 1, ())
    monkeypatch.setattr(Forecaster, "make_room", lambda *_: False)
    assert bits(model, inputs) == wanted
    assert not any(item.restored for items in parts(model) for item in items)
    assert all("not within the budgets" in line for line in told)
    assert len(told) == len(parts(model)[0]) + 1


def test_weights_that_must_be_read_are_part_of_computing(
    opened: Callable[..., Qwen3VL], located: Callable[[str], Path], tmp_path: Path
) -> None:
    model, inputs = opened("dense", 2), tiny.inputs("text")
    keeping(model, tmp_path / "cache", located("dense"))
    for _ in range(2):
        bits(model, inputs)
    (item, *_), _ = parts(model)
    read_bytes = sum(
        weight.nbytes
        for name, weight in helper.runner_of(model).specs.items()
        if name.startswith("language_model.layers")
    )
    assert item.restoring_s == pytest.approx(1e-4 + item.nbytes / 1e9)
    assert item.computing_s is not None
    # At most all layers are read anew; at least those for which there is no room.
    assert (read_bytes - DEVICE_BYTES) / 1e9 <= item.computing_s <= read_bytes / 1e9


def test_the_report_of_a_plan_says_what_was_restored(
    opened: Callable[..., Qwen3VL], located: Callable[[str], Path], tmp_path: Path
) -> None:
    model, inputs = opened("dense", 2), tiny.inputs("image")
    keeping(model, tmp_path / "cache", located("dense"))
    for _ in range(2):
        bits(model, inputs)
    assert "Prompt cache: 2 of 3 parts restored" in model.plan.report()
    assert "Prompt cache: 2 of 3 parts restored" in model.plan.html()
    data = model.plan.to_dict()["prompt_cache"]
    assert [part["restored"] for part in data["parts"]] == [True, True, False]
