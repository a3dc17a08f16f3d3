"""What must hold of the model whatever its weights: chunks, caches, padding, programs, memory.

Two ways to compute the same thing add in another order, so they agree to rounding: within
`parity.TOLERANCE` of the largest logit (about 10 times what is seen).
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import parity
import pytest
import tiny

from qwen3vl_jax import Qwen3VL, vision
from qwen3vl_jax.config import Config, load_config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.inputs import prepare
from qwen3vl_jax.network import forward

GetModel = Callable[..., Qwen3VL]
CHECKPOINTS = ["dense", "moe_mixed"]


def last_logits(model: Qwen3VL, given: parity.Arrays) -> np.ndarray:
    """Logits of the last real token of every row, by the full forward pass."""
    logits = np.asarray(model(**given))
    last = given["attention_mask"].shape[1] - 1 - given["attention_mask"][:, ::-1].argmax(axis=1)
    return logits[np.arange(len(last)), last]


@pytest.mark.parametrize(
    ("name", "chunk_tokens", "case"),
    [
        ("dense", 1, "text"),
        ("dense", 7, "image_video"),
        ("dense", 16, "batch_right"),
        ("moe_mixed", 7, "batch_right"),
    ],
)
def test_prefill_in_chunks_is_prefill_at_once(
    name: str, chunk_tokens: int, case: str, tiny_model: GetModel
) -> None:
    # Chunks of 7 cut through pictures; the shorter rows end in an earlier chunk.
    model, given = tiny_model(name), tiny.inputs(case)
    batch, tokens = given["input_ids"].shape
    cache = model.new_cache(batch=batch, capacity=tokens)
    logits, _ = model.prefill(given, cache, chunk_tokens=chunk_tokens)
    assert parity.relative(np.asarray(logits), last_logits(model, given)) < parity.TOLERANCE


@pytest.mark.parametrize("chunk_tokens", [0, -1])
def test_a_chunk_without_tokens_is_refused(chunk_tokens: int, tiny_model: GetModel) -> None:
    model = tiny_model("dense")
    cache = model.new_cache(batch=1, capacity=64)
    with pytest.raises(UsageError, match=f"must be at least 1, found {chunk_tokens}"):
        model.prefill(tiny.inputs("text"), cache, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_cached_decoding_is_the_full_forward_pass(name: str, tiny_model: GetModel) -> None:
    model, given = tiny_model(name), tiny.inputs("batch_left")
    new = np.random.default_rng(1).integers(0, 384, (3, 6)).astype(np.int32)
    whole = dict(given)
    whole["input_ids"] = np.concatenate([given["input_ids"], new], axis=1)
    for key, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        whole[key] = np.concatenate([given[key], np.full_like(new, value)], axis=1)
    wanted = np.asarray(model(**whole))
    tokens = given["input_ids"].shape[1]
    _, cache = model.prefill(given, model.new_cache(batch=3, capacity=tokens + 6))
    for step in range(6):
        logits, cache = model.decode(new[:, step], cache)
        found = parity.relative(np.asarray(logits), wanted[:, tokens + step])
        assert found < parity.TOLERANCE


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_row_alone(name: str, side: str, tiny_model: GetModel) -> None:
    model, given = tiny_model(name), tiny.inputs(f"batch_{side}")
    together = np.asarray(model(**given))
    pictures, patches = 0, 0
    for row, count in enumerate([1, 0, 2]):
        real = given["attention_mask"][row].astype(bool)
        alone = {key: given[key][row : row + 1, real] for key in ("input_ids", "attention_mask")}
        if count:
            grids = given["image_grid_thw"][pictures : pictures + count]
            size = int(grids.prod(axis=1).sum())
            alone["pixel_values"] = given["pixel_values"][patches : patches + size]
            alone["image_grid_thw"] = grids
            pictures, patches = pictures + count, patches + size
        found = parity.relative(together[row, real], np.asarray(model(**alone))[0])
        assert found < parity.TOLERANCE


def test_a_second_turn_on_the_cache_is_the_whole_conversation(tiny_model: GetModel) -> None:
    model, first, second = tiny_model("dense"), tiny.inputs("image"), tiny.inputs("video")
    whole = {
        key: np.concatenate([first[key], second[key]], axis=1)
        for key in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    whole |= {key: first[key] for key in ("pixel_values", "image_grid_thw")}
    whole |= {key: second[key] for key in ("pixel_values_videos", "video_grid_thw")}
    tokens = whole["input_ids"].shape[1]
    _, cache = model.prefill(first, model.new_cache(batch=1, capacity=tokens))
    logits, cache = model.prefill(second, cache)
    assert parity.relative(np.asarray(logits), last_logits(model, whole)) < parity.TOLERANCE
    assert cache.length == tokens


@pytest.mark.parametrize("blocks", [2, 3])
def test_a_vocabulary_in_blocks_gives_the_same_logits(
    blocks: int, tiny_model: GetModel, tiny_checkpoint: Callable[[str], Path]
) -> None:
    # The same sums in the same order; only the shape of a product differs.
    given = tiny.inputs("image")
    split = Qwen3VL.from_pretrained(
        tiny_checkpoint("dense_tied"), dtype="float32", vocab_blocks=blocks
    )
    found = parity.relative(
        np.asarray(split(**given)), np.asarray(tiny_model("dense_tied")(**given))
    )
    assert found < 1e-6


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_one_program_and_step_by_step_agree(name: str, tiny_model: GetModel) -> None:
    # Inside one program XLA fuses across steps, which moves sums by a few roundings: 2e-6 of the
    # largest logit is seen; bit equality is not promised.
    model, given = tiny_model(name), tiny.inputs("image_video")
    batch, _ = prepare(model.config, given)
    whole = jax.jit(forward, static_argnums=2)(model.network, batch, model.config)
    steps = forward(model.network, batch, model.config)
    assert parity.relative(np.asarray(whole), np.asarray(steps)) < parity.TOLERANCE


def one_block_tower(hidden: int) -> Config:
    """A model whose vision tower is as small as can be."""
    config = load_config(tiny.DATA / "dense")
    small = dataclasses.replace(
        config.vision, depth=1, hidden_size=hidden, intermediate_size=hidden, num_heads=1,
        deepstack_visual_indexes=(),
    )  # fmt: skip
    text = dataclasses.replace(config.text, num_hidden_layers=1)
    return dataclasses.replace(config, vision=small, text=text)


def test_new_picture_sizes_rarely_compile_a_new_program() -> None:
    model = Qwen3VL.random(one_block_tower(8))
    rng = np.random.default_rng(0)

    def programs_after(count: int) -> int:
        for rows, columns in 2 * rng.integers(3, 9, (count, 2)):
            pixels = np.zeros((rows * columns, 1536), np.float32)
            grid = np.array([[1, rows, columns]])
            model.encode({"pixel_values": pixels, "image_grid_thw": grid})
        return vision.vision_block._cache_size()

    before = vision.vision_block._cache_size()
    # 36 to 256 patches: 64, then four buckets for each doubling.
    assert programs_after(50) - before <= 9
    known = vision.vision_block._cache_size()
    assert programs_after(50) - known <= 1


MEASURE_PEAK = """
import json, re, sys
import numpy as np
from qwen3vl_jax import Qwen3VL
from qwen3vl_jax.config import load_config
rows = int(sys.argv[2])
tower = Qwen3VL.random(load_config(sys.argv[1]))
def encode(rows):
    pixels = np.zeros((rows * rows, 1536), np.float32)
    given = {"pixel_values": pixels, "image_grid_thw": np.array([[1, rows, rows]])}
    return np.asarray(tower.encode(given).tokens)
def peak_kb():
    # Not getrusage: its peak includes the process that started this one.
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
encode(4)
before = peak_kb()
found = encode(rows)
after = peak_kb()
print(json.dumps({"peak": (after - before) * 1024, "finite": bool(np.isfinite(found).all())}))
"""


def test_a_picture_of_4096_by_4096_pixels_needs_no_square_of_patches(tmp_path: Path) -> None:
    # 65,536 patches: the pixels and their padded copy are 805 MB; one score matrix were 17 GB.
    values = json.loads((tiny.DATA / "dense" / "config.json").read_text())
    values["vision_config"] |= {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1,
        "deepstack_visual_indexes": [],
    }  # fmt: skip
    values["text_config"]["num_hidden_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(values))
    command = [sys.executable, "-c", MEASURE_PEAK, str(tmp_path), "256"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    pixel_bytes = 256 * 256 * 1536 * 4
    assert found["finite"]
    assert pixel_bytes < found["peak"] < 2 * pixel_bytes + 256 * 2**20
