"""A planned model with a cache in blocks: full ones rest on disk, and the bits stay the same."""

import functools
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import checkpoint_factory as factory
import numpy as np
import planned_models as helper
import pytest
import tiny

from memsched.errors import DoesNotFitError
from memsched.machine import DEVICE, NVME
from memsched.plan import Copy
from memsched.profiles import load_machine
from memsched.referee import verify
from qwen3vl_jax import Qwen3VL, long_cache
from qwen3vl_jax.config import load_config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.generation import Session
from qwen3vl_jax.generation_settings import GenerationSettings
from qwen3vl_jax.planned import runner as runner_module
from qwen3vl_jax.planned.forecast import Forecast, forecast
from qwen3vl_jax.planned.request import Request

pytestmark = pytest.mark.usefixtures("shared_traces")

BLOCK = 16
TOKENS = 20
SUBJECTS = (("dense", "batch_left", 2), ("dense_tied", "two_images", 3), ("moe", "image", 2))
LARGE = 5 << 20  # holds any of the checkpoints, and all else
CHILD = Path(__file__).with_name("long_child.py")
ROOT = Path(__file__).parents[2]
LONG = 2900  # tokens of a prompt, whose cache takes 24 MB
DEVICE_BYTES = 10_000_000
# Buffers of reads and writes, plans and spans of each chunk, pages of the allocator: 14 to 18 MB,
# and two buffers of 4 MB more. A cache in memory would be 25 MB more.
BESIDE_BYTES = 26_000_000
ROPE = {"mrope_interleaved": True, "mrope_section": [12, 10, 10], "rope_type": "default"}
SETTINGS: dict[str, Any] = {
    "text": {
        "head_dim": 64,
        "hidden_size": 256,
        "intermediate_size": 512,
        "max_position_embeddings": 4096,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "rope_parameters": ROPE | {"rope_theta": 5000000},
        "vocab_size": 1024,
    },
    "vision": {"out_hidden_size": 256},
}


@pytest.fixture
def opened(located: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[..., Qwen3VL]]:
    """`opened(checkpoint, tiers, **budgets)`: a planned model with a place on disk."""
    models = []

    def make(name: str, tiers: int = 2, **budgets: Any) -> Qwen3VL:
        given = {"nvme_dir": tmp_path / "spill"} | budgets
        machine = helper.machine_file(tmp_path, tiers)
        models.append(helper.planned(located(name), machine=machine, **given))
        return models[-1]

    yield make
    for model in models:
        model.close()
    assert helper.our_threads() == []
    assert not (tmp_path / "spill").exists() or list((tmp_path / "spill").iterdir()) == []


def answers(model: Qwen3VL, inputs: Mapping[str, np.ndarray], tokens: int = TOKENS) -> bytes:
    """Bits of the scores after the prompt and after each of some greedy tokens."""
    batch, length = inputs["input_ids"].shape
    cache = model.new_cache(batch=batch, capacity=length + tokens, block_slots=BLOCK)
    scores, cache = model.prefill(inputs, cache)
    found = [np.asarray(scores)]
    for _ in range(tokens):
        scores, cache = model.decode(found[-1].argmax(-1).astype(np.int32), cache)
        found.append(np.asarray(scores))
    assert cache.full is not None
    assert len(cache.full[0]) >= 2
    return np.stack(found).tobytes()


def least(run: Callable[[int], Any], refused: list[int]) -> int:
    """The smallest device budget with which a run is not refused, found by its refusals."""
    budget = 4096
    for _ in range(20):
        try:
            run(budget)
        except DoesNotFitError as refusal:
            refused.append(budget)
            budget = refusal.smallest[DEVICE]
        else:
            return budget
    raise AssertionError("each refusal was followed by another")


@pytest.mark.parametrize(("name", "prompt", "tiers"), SUBJECTS)
def test_bits_are_those_of_the_unplanned_cache_in_blocks(
    name: str,
    prompt: str,
    tiers: int,
    opened: Callable[..., Qwen3VL],
    located: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, ran = tiny.inputs(prompt), helper.recorded(monkeypatch)
    wanted = answers(Qwen3VL.from_pretrained(located(name)), inputs)
    others = {"host_memory": LARGE} if tiers == 3 else {}

    def run(device_bytes: int) -> None:
        ran.clear()
        model = opened(name, tiers, device_memory=device_bytes, **others)
        assert answers(model, inputs) == wanted
        runner = helper.runner_of(model)
        peaks = [verify(plan, program, runner.machine) for plan, program in ran]
        for tier, peak in runner.executor.ledger_peak_bytes.items():
            assert peak == max(found[tier] for found in peaks), tier
        assert runner.executor.ledger_peak_bytes[DEVICE] <= device_bytes
        model.close()

    refused: list[int] = []
    smallest = least(run, refused)
    assert refused
    moved = {a.array for plan, _ in ran for a in plan.actions if isinstance(a, Copy)}
    assert any("blocks" in array for array in moved)
    random = np.random.default_rng(tiers)
    run(int(smallest + random.random() * (LARGE - smallest)))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of 16 slots a block are what a model makes by itself."""
    monkeypatch.setattr(long_cache, "SMALLEST_BLOCK", BLOCK)
    monkeypatch.setattr(long_cache, "BLOCK_BYTES", 1)


def told(model: Qwen3VL, tokens: int = 40) -> list[int]:
    return helper.told(model, tiny.inputs("text"), tokens=tokens)[0].tolist()


@pytest.mark.usefixtures("small_blocks")
def test_a_cache_that_does_not_fit_is_made_in_blocks(
    opened: Callable[..., Qwen3VL], located: Callable[[str], Path]
) -> None:
    asked = {"device_memory": 1_250_000, "max_context": 640}
    with pytest.raises(DoesNotFitError, match="with --nvme-dir the KV cache of 640 tokens") as why:
        told(opened("dense", **asked, nvme_dir=None))
    assert why.value.smallest[DEVICE] > asked["device_memory"]
    model = opened("dense", **asked)
    assert told(model) == told(Qwen3VL.from_pretrained(located("dense")))
    executor = helper.runner_of(model).executor
    assert executor.ledger_peak_bytes[DEVICE] <= asked["device_memory"]
    assert executor.written_bytes > 0
    assert opened("dense", device_memory=20 << 20).new_cache(batch=1, capacity=640).full is None


@pytest.mark.usefixtures("small_blocks")
def test_a_forecast_makes_the_same_choice(located: Callable[[str], Path], tmp_path: Path) -> None:
    config = load_config(located("dense"))
    whole = load_machine(helper.machine_file(tmp_path, 2))
    request = Request(200, 100, max_context=640)

    def planned(device_bytes: int, nvme_bytes: int = LARGE) -> Forecast:
        machine = whole.with_capacities({DEVICE: device_bytes, NVME: nvme_bytes})
        return forecast(config, machine, request, dtype=np.dtype("float32"))

    assert planned(20 << 20).request.block_slots is None
    found = planned(1_250_000)
    assert found.request.block_slots == BLOCK
    decode = found.summaries["decode"]
    blocks = [name for name in found.passes[-1].traced.program.arrays if "blocks" in name]
    assert len(blocks) == config.text.num_hidden_layers * (640 // BLOCK - 1)
    assert decode.occupancy[DEVICE].peak_bytes <= 1_250_000
    with pytest.raises(DoesNotFitError):
        planned(1_250_000, nvme_bytes=100_000)


@pytest.mark.usefixtures("small_blocks")
def test_space_on_disk_is_refused_before_anything_is_computed(
    opened: Callable[..., Qwen3VL],
) -> None:
    model = opened("dense", device_memory=1_250_000, nvme_space=100_000, max_context=640)
    with pytest.raises(DoesNotFitError, match="have to be moved out to disk") as why:
        told(model)
    assert why.value.smallest[NVME] > 100_000
    assert helper.runner_of(model).executor.read_bytes == 0


def prompted(made: Session, first: int) -> list[int]:
    """Prompts a session with other tokens, and takes an answer."""
    ids = np.arange(first, first + 20)[None]
    made.prompt({"input_ids": ids}, capacity=made.length + 28)
    return [int(step.tokens[0]) for step in made.answer(GenerationSettings(max_new_tokens=8))]


def test_two_caches_take_turns_and_what_is_dropped_is_forgotten(
    opened: Callable[..., Qwen3VL],
    located: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    direct = Qwen3VL.from_pretrained(located("dense"))
    budget = 1_600_000
    model = opened("dense", device_memory=budget)
    runner = helper.runner_of(model)
    for each in (direct, model):
        make = each.new_cache
        blocks = functools.partial(make, block_slots=BLOCK)
        monkeypatch.setattr(each, "new_cache", blocks)
    found, used = [], []
    for each in (direct, model):
        sessions = [Session(each, batch=1, capacity=48) for _ in range(2)]
        found.append([prompted(one, first) for first in (5, 90) for one in sessions])
    while sessions:
        used.append(runner.executor.spilled_bytes)
        del sessions[0]
        gc.collect()  # the hook that checks annotations in tests leaves cycles
        model.new_cache(batch=1, capacity=1)
    used.append(runner.executor.spilled_bytes)
    assert found[0] == found[1]
    assert used[0] == 2 * used[1] > used[2] == 0
    assert runner.executor.ledger_peak_bytes[DEVICE] <= budget


def test_max_context_is_reserved_and_more_is_refused(
    opened: Callable[..., Qwen3VL], located: Callable[[str], Path]
) -> None:
    model = opened("dense", device_memory=LARGE, max_context=100)
    assert model.new_cache(batch=1, capacity=20).capacity >= 100
    assert told(model, 80) == told(Qwen3VL.from_pretrained(located("dense")), 80)
    with pytest.raises(UsageError, match="116 tokens is more than max_context, 100") as why:
        told(model, 100)
    assert why.value.exit_code == 2
    with pytest.raises(UsageError, match="max_context 0 is not between 1 and"):
        opened("dense", device_memory=LARGE, max_context=0)


def test_memory_holds_no_cache_that_is_larger_than_it(tmp_path: Path) -> None:
    factory.checkpoint(tmp_path / "hf", dtype="float32", **SETTINGS)
    asked = {
        "model": str(tmp_path / "hf"),
        "machine": str(helper.machine_file(tmp_path, 2)),
        "device_memory": DEVICE_BYTES,
        "nvme_dir": str(tmp_path / "spill"),
        "tokens": LONG,
    }
    done = subprocess.run(
        [sys.executable, str(CHILD), json.dumps(asked)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cache_bytes"] > 2 * DEVICE_BYTES
    assert found["ledger_peak_bytes"][DEVICE] <= DEVICE_BYTES
    assert found["taken_bytes"] <= DEVICE_BYTES + BESIDE_BYTES
    assert found["spilled_bytes"] == [found["sealed_bytes"], 0]
    assert list((tmp_path / "spill").iterdir()) == []


@pytest.mark.usefixtures("small_blocks")
def test_a_plain_cache_that_outgrows_its_budget_goes_on_in_blocks(
    opened: Callable[..., Qwen3VL], located: Callable[[str], Path]
) -> None:
    budget = 1_400_000
    model = opened("dense", device_memory=budget)
    found = []
    for each in (Qwen3VL.from_pretrained(located("dense")), model):
        made = Session(each, batch=1, capacity=60)
        tokens = []
        for capacity in (60, 120, 800):
            made.prompt({"input_ids": np.arange(5, 25)[None]}, capacity=capacity)
            answer = made.answer(GenerationSettings(max_new_tokens=30))
            tokens += [int(step.tokens[0]) for step in answer]
        assert made.capacity >= 800
        found.append(tokens)
    assert found[0] == found[1]
    executor = helper.runner_of(model).executor
    assert executor.written_bytes > 0
    assert executor.ledger_peak_bytes[DEVICE] <= budget


def test_large_image_features_rest_on_disk(
    opened: Callable[..., Qwen3VL],
    located: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner_module, "FEATURE_SHARE", 1 << 20)
    inputs = tiny.inputs("two_images")
    wanted = helper.answers(Qwen3VL.from_pretrained(located("dense")), inputs)
    model = opened("dense", device_memory=2_500_000)
    found = helper.answers(model, inputs)
    assert [a.tobytes() for a in found] == [a.tobytes() for a in wanted]
    executor = helper.runner_of(model).executor
    assert executor.written_bytes > 0
    gc.collect()
    told(model, 2)
    assert executor.spilled_bytes == 0
