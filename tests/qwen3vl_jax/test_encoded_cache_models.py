"""Models whose KV cache rests as int8: near the raw one, the same bits with and without a plan."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import planned_models as helper
import pytest
import tiny

from qwen3vl_jax import Qwen3VL
from qwen3vl_jax.config import load_config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.planned.dry_run import dry_run, dry_run_of
from qwen3vl_jax.planned.loading import Budgets
from qwen3vl_jax.planned.request import Request
from qwen3vl_jax.planned.saved import read_plans
from qwen3vl_jax.planned.saving import adopt, plans_text

pytestmark = pytest.mark.usefixtures("shared_traces")

TOKENS, BLOCK = 20, 16
SUBJECTS = (("dense", "batch_left"), ("dense_tied", "two_images"), ("moe", "image"))
LARGE = 5 << 20  # holds any of the checkpoints, and all else


Open = Callable[..., Qwen3VL]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """`opened(checkpoint, kv)`: a model without a plan, loaded once."""
    return functools.cache(
        lambda name, kv: Qwen3VL.from_pretrained(
            tiny.checkpoint(name, tmp_path_factory.mktemp("tiny")), kv=kv
        )
    )


def answers(model: Qwen3VL, inputs: Any, told: np.ndarray | None = None, **form: Any) -> np.ndarray:
    """Scores after the prompt and after each of some tokens: of those told, or greedy ones."""
    batch, length = inputs["input_ids"].shape
    cache = model.new_cache(batch=batch, capacity=length + TOKENS, **form)
    scores, cache = model.prefill(inputs, cache)
    found = [np.asarray(scores)]
    for step in range(TOKENS):
        token = found[-1].argmax(-1) if told is None else told[step]
        scores, cache = model.decode(token.astype(np.int32), cache)
        found.append(np.asarray(scores))
    return np.stack(found)


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of all rows, from the least on; what is equal for all tokens is left out."""
    one, other = (scores - scores.mean(axis=-1, keepdims=True) for scores in (one, other))
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return np.sort((one * other).sum(axis=-1) / lengths, axis=None)


@pytest.mark.parametrize(("name", "prompt"), SUBJECTS)
def test_scores_are_near_those_of_a_raw_cache_and_of_no_cache(
    name: str, prompt: str, opened: Open
) -> None:
    inputs = tiny.inputs(prompt)
    raw = answers(opened(name, "raw"), inputs)
    found = answers(opened(name, "int8"), inputs, told=raw.argmax(-1))
    assert not np.array_equal(found, raw)
    # A router on the edge chooses another expert, and one token in twenty is another then.
    assert cosines(found, raw)[2 if name == "moe" else 0] > 0.999
    # The prompt's last scores against a pass that keeps no keys at all.
    whole = np.asarray(opened(name, "int8")(**inputs))
    rows = np.arange(len(whole))
    mask = np.asarray(inputs.get("attention_mask", np.ones(inputs["input_ids"].shape)))
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    assert cosines(found[0], whole[rows, last])[0] > 0.999


@pytest.mark.parametrize(("name", "prompt"), SUBJECTS)
def test_blocks_give_the_scores_of_a_plain_cache(name: str, prompt: str, opened: Open) -> None:
    model, inputs = opened(name, "int8"), tiny.inputs(prompt)
    plain = answers(model, inputs)
    found = answers(model, inputs, plain.argmax(-1), block_slots=BLOCK)
    # Another order of sums may round a few numbers to the next code.
    assert cosines(found, plain)[2 if name == "moe" else 0] > 0.9999


def test_a_cache_that_grows_or_is_cut_short_goes_on_as_it_was(opened: Open) -> None:
    model, inputs = opened("dense", "int8"), tiny.inputs("text")
    length = inputs["input_ids"].shape[1]
    scores, cache = model.prefill(inputs, model.new_cache(batch=1, capacity=length + 1))
    cache = model.grown(cache, 200)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {np.dtype("uint8")}
    token = np.asarray(scores).argmax(-1).astype(np.int32)
    first, cache = model.decode(token, cache)
    second, cache = model.decode(token, model.forget(cache, 1))
    np.testing.assert_array_equal(first, second)
    _, wide = model.prefill(inputs, model.new_cache(batch=1, capacity=200))
    np.testing.assert_allclose(model.decode(token, wide)[0], first, atol=1e-4)


@pytest.mark.parametrize("tiers", [2, 3])
@pytest.mark.parametrize(("name", "prompt"), SUBJECTS)
def test_a_plan_changes_no_bit(
    name: str, prompt: str, tiers: int, opened: Open, tmp_path: Path
) -> None:
    inputs = tiny.inputs(prompt)
    wanted = helper.answers(opened(name, "int8"), inputs)
    budgets = {"machine": helper.machine_file(tmp_path, tiers), "device_memory": LARGE}
    model = helper.planned(tiny.checkpoint(name, tmp_path), kv="int8", **budgets)
    found = helper.answers(model, inputs)
    model.close()
    assert [a.tobytes() for a in found] == [a.tobytes() for a in wanted]


def test_full_blocks_on_disk_change_no_bit(opened: Open, tmp_path: Path) -> None:
    inputs = tiny.inputs("batch_left")
    wanted = answers(opened("dense", "int8"), inputs, block_slots=BLOCK)
    model = helper.planned(
        tiny.DATA / "dense",
        kv="int8",
        machine=helper.machine_file(tmp_path, 2),
        device_memory=LARGE,
        nvme_dir=tmp_path / "spill",
    )
    found = answers(model, inputs, block_slots=BLOCK)
    assert helper.runner_of(model).executor.written_bytes > 0
    model.close()
    assert found.tobytes() == wanted.tobytes()


def cache_bytes(dry: Any) -> int:
    """Bytes of the cache among the arrays of a forecast's last pass."""
    program = dry.found.passes[-1].traced.program
    return sum(program.arrays[name].nbytes for name in program.of_kind("cache"))


def test_plans_count_the_bytes_that_the_cache_takes(tmp_path: Path) -> None:
    config = load_config(tiny.DATA / "dense")
    budgets = Budgets(machine=helper.machine_file(tmp_path, 2))
    raw, int8 = (
        dry_run(config, Request(20, 7, max_context=200, kv=kv), budgets, dtype=None)
        for kv in ("raw", "int8")
    )
    text = config.text
    rows = 2 * text.num_hidden_layers * text.num_key_value_heads * 224
    assert cache_bytes(raw) == rows * text.head_dim * 4
    assert cache_bytes(int8) == rows * (text.head_dim + 4)
    decode = [dry.data["phases"]["decode"]["peak_bytes"]["device"] for dry in (raw, int8)]
    assert decode[1] < decode[0] - (cache_bytes(raw) - cache_bytes(int8)) * 0.9
    assert int8.data["assumptions"]["request"]["kv"] == "int8"


def test_saved_plans_are_for_the_cache_that_they_were_made_for(
    opened: Open, tmp_path: Path
) -> None:
    inputs, machine = tiny.inputs("image"), helper.machine_file(tmp_path, 2)
    budgets = {"machine": machine, "device_memory": LARGE, "kv": "int8"}
    dry = dry_run_of(tiny.DATA / "dense", None, inputs, 3, budgets)
    (tmp_path / "plans.json").write_text(plans_text(dry.found))
    saved = read_plans(tmp_path / "plans.json")
    model = helper.planned(tiny.DATA / "dense", machine=machine, kv="int8")
    adopt(model, saved, inputs, 3)
    wanted = helper.told(opened("dense", "int8"), inputs)
    np.testing.assert_array_equal(helper.told(model, inputs), wanted)
    model.close()
    raw = helper.planned(tiny.DATA / "dense", machine=machine)
    with pytest.raises(UsageError, match="plan"):
        adopt(raw, saved, inputs, 3)
    raw.close()


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ({}, "float32"),
        ({"level": "balanced"}, "float32"),
        ({"level": "aggressive"}, "uint8"),
        ({"level": "aggressive", "kv": "raw"}, "float32"),
        ({"kv": "int8"}, "uint8"),
    ],
)
def test_a_level_says_how_caches_are_stored_unless_one_is_asked_for(
    given: dict[str, str], dtype: str
) -> None:
    model = Qwen3VL.from_pretrained(tiny.DATA / "dense", **given)
    cache = model.new_cache(batch=1, capacity=8)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {np.dtype(dtype)}


def test_a_cache_of_another_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="kv 'int4' is not one of raw, int8"):
        Qwen3VL.from_pretrained(tiny.DATA / "dense", kv="int4")
