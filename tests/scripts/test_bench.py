"""scripts/bench.py at tiny sizes: its report agrees with itself and with counts made by hand."""

import importlib.util
import inspect
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from qwen3vl_jax import Qwen3VL, kernels, load_config
from qwen3vl_jax.benchmark import checkpoint, machine, peer, turns, variants, work

ROOT = Path(__file__).parents[2]
OFFICIAL = ROOT / "configs" / "models"
DENSE = ROOT / "tests" / "data" / "tiny" / "dense" / "config.json"
MOE = ROOT / "tests" / "data" / "tiny" / "moe" / "config.json"
SHORT = ("--image", "64x32", "--prompt-tokens", "9", "--new-tokens", "3", "--repeats", "1")


def script(name: str) -> types.ModuleType:
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench() -> types.ModuleType:
    """scripts/bench.py."""
    return script("bench")


@pytest.fixture(autouse=True)
def _small_machine_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the functions themselves: defaults of the wrapper that checks annotations change nothing.
    for function, size in ((machine.reader, 1 << 20), (machine.multiplier, (32, 32, 32))):
        monkeypatch.setattr(inspect.unwrap(function), "__defaults__", (size,))
    monkeypatch.setattr(turns, "LEAST_BYTES", 1)


def test_the_report_is_complete_and_its_numbers_agree(
    bench: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["--size", str(DENSE), "--layers", "2", "--dtype", "float32", *SHORT]) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert "SHRUNK to 2 of 4 layers" in lines[0]
    found = json.loads(lines[-1])
    assert (found["layers"], found["layers_of_the_model"]) == (2, 4)
    # 4 x 2 patches are 2 tokens, with a mark on either side.
    assert found["prompt_tokens"] == 9 + 2 + 2
    assert list(found["phases"]) == ["vision", "prefill", "prompt", "decode"]
    for phase in found["phases"].values():
        slowest = max(
            phase["read_bytes"] / found["read_bytes_per_s"], phase["flops"] / found["flops_per_s"]
        )
        assert phase["bound_s"] == pytest.approx(slowest)
        assert phase["fraction"] == pytest.approx(phase["bound_s"] / phase["seconds"])
        assert phase["least_s"] <= phase["seconds"] <= phase["most_s"]
        assert phase["transformers_s"] is phase["times_as_fast"] is None
    parts = [found["phases"][name] for name in ("vision", "prefill", "prompt")]
    assert parts[0]["seconds"] + parts[1]["seconds"] == pytest.approx(parts[2]["seconds"])
    assert parts[0]["flops"] + parts[1]["flops"] == parts[2]["flops"]
    assert found["decode_tokens_per_s"] == pytest.approx(1 / found["phases"]["decode"]["seconds"])
    assert found["tokens_agree"] is None
    assert found["variants"] == {}
    assert found["load_s"] is None
    assert found["made_s"] > 0


def test_codecs_run_in_turn_and_their_scores_are_compared(
    bench: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    codecs = ("--codec", "int8", "--codec", "int4", "--kv", "int8")
    arguments = ["--size", str(DENSE), "--layers", "2", "--dtype", "float32", *SHORT, *codecs]
    assert bench.main(arguments) == 0
    output = capsys.readouterr().out
    found = json.loads(output.splitlines()[-1])
    others = found["variants"]
    assert list(others) == ["int8", "int4", "kv int8"]
    assert all(name in output for name in others)
    nbytes = [found["weight_bytes"], *(one["weight_bytes"] for one in others.values())]
    assert nbytes[0] == nbytes[3] > nbytes[1] > nbytes[2]
    assert 1 > others["int8"]["cosine"] > others["int4"]["cosine"] > 0.9
    assert 1 > others["kv int8"]["cosine"] > 0.999
    assert 0 < others["int8"]["kl"] < others["int4"]["kl"]
    for phase in ("prefill", "decode"):
        taken = found["phases"][phase]["seconds"]
        for one in others.values():
            # One round: a median of one.
            assert one[phase]["times_as_fast"] == pytest.approx(taken / one[phase]["seconds"])


def test_the_distance_of_scores_is_that_of_its_definition() -> None:
    # Of shares 1/2, 1/2 from 3/4, 1/4; what is added to all scores changes nothing.
    raw, other = np.log([[0.75, 0.25]]), np.log([[0.5, 0.5]]) + 7
    found = variants.distance(
        raw.astype(np.float32), (other + np.array([[1e-3, 0]])).astype(np.float32)
    )
    assert found.kl == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), abs=1e-3)
    assert found.cosine == pytest.approx(1.0)
    turned = variants.distance(np.array([[1.0, -1, 0, 0]]), np.array([[0, 0, 1.0, -1]]))
    assert turned.cosine == pytest.approx(0.0)
    same = variants.distance(raw, raw)
    assert (same.cosine, same.kl) == (pytest.approx(1.0), pytest.approx(0.0))


def test_a_prompt_without_a_picture_has_no_vision(
    bench: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--size", str(DENSE), "--layers", "1", *SHORT, "--image", "none"]
    assert bench.main(arguments) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    vision = found["phases"]["vision"]
    assert (vision["read_bytes"], vision["flops"]) == (0, 0)
    assert found["prompt_tokens"] == 9


@pytest.mark.parametrize("config_file", [DENSE, MOE], ids=["dense", "moe"])
def test_transformers_chooses_the_same_tokens(
    config_file: Path, bench: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    arguments = ["--size", str(config_file), "--dtype", "float32", "--against", "transformers"]
    assert bench.main([*arguments, *SHORT]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    # The first token and three more: the comparison times equal work.
    assert found["tokens_agree"] == 4
    for phase in found["phases"].values():
        assert phase["times_as_fast"] == pytest.approx(phase["transformers_s"] / phase["seconds"])


def test_a_comparison_without_torch_is_refused_at_once(
    bench: types.ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: None)
    assert bench.main(["--size", str(DENSE), "--against", "transformers"]) == 2
    assert "torch is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--size", "3b"], "--size 3b: not a part of exactly one of qwen3-vl-235b-a22b-instruct"),
        (["--size", str(DENSE), "--layers", "5"], "--layers 5: this model has 1 to 4"),
        (["--size", str(DENSE), "--image", "50x64"], "--image 50x64: both must be multiples of 32"),
        (["--image", "50"], "50: a size like 448x448, or none, is wanted"),
        (["--repeats", "0"], "0 is less than 1"),
        (["--size", str(DENSE), "--codec", "int5"], "codec 'int5' is unknown"),
    ],
    ids=["size", "layers", "picture", "no picture", "repeats", "codec"],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, bench: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(arguments) == 2
    assert says in capsys.readouterr().err


def test_a_scratch_checkpoint_is_written_once_and_then_loaded(
    bench: types.ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--size", str(DENSE), "--layers", "1", "--scratch", str(tmp_path), *SHORT]
    reports = []
    for _ in range(2):
        assert bench.main(arguments) == 0
        reports.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert reports[0]["made_s"] > 0
    assert reports[1]["made_s"] is None
    assert all(report["load_s"] > 0 for report in reports)


@pytest.mark.parametrize(
    ("config_file", "dtype"), [(DENSE, "bfloat16"), (MOE, "float16")], ids=["dense", "moe"]
)
def test_the_written_checkpoint_holds_the_weights(
    config_file: Path, dtype: str, tmp_path: Path
) -> None:
    config = work.shrunk(load_config(config_file), 2)
    model = Qwen3VL.random(config, dtype=dtype)
    values = checkpoint.shrunk_values(json.loads(config_file.read_text()), config, dtype)
    checkpoint.write(tmp_path, values, config, model.parameters)
    read = Qwen3VL.from_pretrained(tmp_path)
    assert read.config.text == config.text
    assert read.config.vision == config.vision
    assert read.parameters.keys() == model.parameters.keys()
    for path, array in model.parameters.items():
        np.testing.assert_array_equal(read.parameters[path], array)


def test_decoding_with_the_2b_model_reads_its_layers_its_head_and_the_cache() -> None:
    file = OFFICIAL / "qwen3-vl-2b-instruct.json"
    config = load_config(file)
    task = work.Workload(config, "bfloat16", 512, 448, 448, 16)
    assert task.prompt_tokens == 512 + 196 + 2
    attention = 2 * 2048 * 2048 + 2 * 1024 * 2048 + 2 * 128
    layer = attention + 3 * 6144 * 2048 + 2 * 2048
    cache = 2 * 28 * 8 * 128 * (710 + 8)
    found = work.costs(task)
    assert found["decode"].read_bytes == 2 * (28 * layer + 151936 * 2048 + cache)
    products = 2 * (28 * layer + 151936 * 2048) + 4 * 2048 * 28 * (710 + 8)
    assert found["decode"].flops == products
    pairs = 710 * 711 // 2
    prefill = 2 * (28 * layer * 710 + 151936 * 2048) + 4 * 2048 * 28 * pairs
    assert found["prefill"].flops == prefill


def test_vision_counts_patches_in_blocks_and_tokens_in_mergers() -> None:
    file = OFFICIAL / "qwen3-vl-2b-instruct.json"
    task = work.Workload(load_config(file), "bfloat16", 1, 448, 448, 1)
    block = 4 * 1024 * 1024 + 2 * 1024 * 4096
    merger = 4096 * 4096 + 4096 * 2048
    flops = 2 * 784 * (1536 * 1024 + 24 * block) + 2 * 196 * 4 * merger + 4 * 784**2 * 1024 * 24
    assert work.costs(task)["vision"].flops == flops


def test_a_sparse_model_reads_only_the_chosen_experts() -> None:
    file = OFFICIAL / "qwen3-vl-30b-a3b-instruct.json"
    task = work.Workload(load_config(file), "bfloat16", 64, 0, 0, 1)
    found = work.costs(task)
    attention = 2 * 4096 * 2048 + 2 * 512 * 2048 + 2 * 128
    layer = attention + 128 * 2048 + 2 * 2048
    expert = 3 * 768 * 2048
    head = 151936 * 2048
    cache = 2 * 48 * 4 * 128 * 65
    assert found["decode"].read_bytes == 2 * (48 * (layer + 8 * expert) + head + cache)
    # 64 tokens choose 512 times: every one of 128 experts may be wanted, but none more than once.
    assert found["prefill"].read_bytes == 2 * (48 * (layer + 128 * expert) + head)


def test_inputs_are_what_the_model_takes() -> None:
    config = load_config(DENSE)
    task = work.Workload(config, "float32", 500, 64, 96, 1)
    arrays = work.inputs(task, seed=3)
    ids = arrays["input_ids"][0]
    assert len(ids) == task.prompt_tokens
    assert (ids == config.image_token_id).sum() == 6
    assert config.video_token_id not in ids
    assert ids.max() < config.text.vocab_size
    assert arrays["pixel_values"].shape == (24, math.prod((3, 2, 16, 16)))
    assert arrays["image_grid_thw"].tolist() == [[1, 4, 6]]
    again: dict[str, Any] = work.inputs(task, seed=3)
    jax.tree.map(np.testing.assert_array_equal, arrays, again)


def test_the_formulations_report_compares_packed_weights_with_raw_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--out", "40", "--in", "64", "--rows", "1", "--repeats", "1", "--codec", "int4:32"]
    assert script("bench_formulations").main([*arguments, "--dtype", "bfloat16"]) == 0
    (case,) = json.loads(capsys.readouterr().out.splitlines()[-1])["cases"]
    assert (case["codec"], case["rows"]) == ("int4:32", 1)
    assert case["chosen"] in case["GB_per_s"]
    assert case["against_raw"] > 0


def test_the_formulations_report_compares_caches(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--slots", "70", "--rows", "1", "9", "--repeats", "1", "--dtype", "float32"]
    assert script("bench_formulations").main(arguments) == 0
    cases = json.loads(capsys.readouterr().out.splitlines()[-1])["cases"]
    assert [case["rows"] for case in cases] == [1, 9]
    for case in cases:
        taken = case["milliseconds"]
        assert case["against_raw"] == pytest.approx(taken["raw"] / taken["int8"])
        # Keys and values of eight heads: 128 numbers, or codes and their scale.
        speeds = case["GB_per_s"]
        assert speeds["raw"] * taken["raw"] == pytest.approx(2 * 8 * 70 * 128 * 4 / 1e6)
        assert speeds["int8"] * taken["int8"] == pytest.approx(2 * 8 * 70 * 132 / 1e6)


def test_the_formulations_report_names_the_chosen_one(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", "40", "--in", "24", "--rows", "1", "70", "--repeats", "1"]
    assert script("bench_formulations").main([*arguments, "--dtype", "float16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cases = json.loads(lines[-1])["cases"]
    assert [(case["dtype"], case["rows"]) for case in cases] == [("float16", 1), ("float16", 70)]
    for case, line in zip(cases, lines, strict=False):
        assert f"chosen: {case['chosen']}" in line
        assert all(speed > 0 for speed in case["GB_per_s"].values())
    assert cases[1]["chosen"] == ("many_rows" if kernels.usable() else "blocks")
