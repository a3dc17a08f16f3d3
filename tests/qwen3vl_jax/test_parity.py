"""The port computes what transformers computed, in float32, from stored checkpoints and inputs."""

from collections.abc import Callable

import numpy as np
import parity
import pytest
import tiny

from qwen3vl_jax import Qwen3VL
from qwen3vl_jax.positions import rope_positions, token_kinds

# Every case for one dense and one sparse checkpoint, fewer where only a name or a layout differs.
FEWER = {"moe", "dense_v4_names", "moe_v4_names"}
CASES = [
    (name, case)
    for name in tiny.ANSWERS
    for case in tiny.answers(name)
    if name not in FEWER or case in ("text", "image_video", "batch_left")
]
WITH_PICTURES = [(name, case) for name, case in CASES if not case.startswith("text")]
# One checkpoint of each kind: the others share its vision tower and its positions.
OWN_WEIGHTS = ("dense", "moe_official_layout")

GetModel = Callable[..., Qwen3VL]


@pytest.mark.parametrize("case", [case for name, case in WITH_PICTURES if name == "dense"])
def test_positions_and_rope_deltas_are_exact(case: str, tiny_model: GetModel) -> None:
    config, given = tiny_model("dense").config, tiny.inputs(case)
    answer = tiny.answers("dense")[case]
    mask = given["attention_mask"].astype(bool)
    grids = {
        kind: [tuple(grid) for grid in given.get(f"{kind}_grid_thw", np.zeros((0, 3))).tolist()]
        for kind in ("image", "video")
    }
    positions, following = rope_positions(
        token_kinds(given["input_ids"], config),
        mask,
        config.vision.spatial_merge_size,
        grids["image"],
        grids["video"],
        np.zeros(len(mask), np.int32),
    )
    assert np.array_equal(positions, answer["position_ids"])
    assert np.array_equal((following - mask.sum(axis=1))[:, None], answer["rope_deltas"])


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, case in WITH_PICTURES if name in OWN_WEIGHTS]
)
def test_vision_and_deepstack_features_are_equal(
    name: str, case: str, tiny_model: GetModel
) -> None:
    found = parity.vision_differences(tiny_model(name), tiny.inputs(case), tiny.answers(name)[case])
    assert sorted(found) == ["deepstack_0", "deepstack_1", "deepstack_2", "embeds"]
    assert max(found.values()) < parity.TOLERANCE, found


@pytest.mark.parametrize(("name", "case"), CASES)
def test_logits_are_equal(name: str, case: str, tiny_model: GetModel) -> None:
    found = parity.logits_difference(tiny_model(name), tiny.inputs(case), tiny.answers(name)[case])
    assert found < parity.TOLERANCE


GREEDY = [
    ("dense", "text_batch_left"),
    ("dense", "image_video"),
    ("dense", "video_odd"),
    ("dense", "batch_left"),
    ("dense_tied", "batch_left"),
    ("moe", "two_images"),
    ("moe_mixed", "batch_left"),
    ("moe_official_layout", "image"),
]


@pytest.mark.parametrize(("name", "case"), GREEDY)
def test_64_greedy_tokens_are_identical(name: str, case: str, tiny_model: GetModel) -> None:
    wanted = tiny.answers(name)[case]["greedy"]
    assert wanted.shape[1] == 64
    assert np.array_equal(parity.greedy(tiny_model(name), tiny.inputs(case), 64), wanted)


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    return float((left * right).sum() / np.linalg.norm(left) / np.linalg.norm(right))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["image", "video"])
def test_half_precision_points_the_same_way(case: str, dtype: str, tiny_model: GetModel) -> None:
    # Dense only: in an MoE rounding may choose another expert, and then the numbers are others.
    given, answer = tiny.inputs(case), tiny.answers("dense")[case]["logits"]
    real = given["attention_mask"].astype(bool)
    found = np.asarray(tiny_model("dense", dtype=dtype)(**given))
    assert found.dtype == np.float32
    assert cosine(found[real], answer[real]) >= 0.999
    # Half precision must really be used: float32 would be closer than this.
    assert parity.relative(found[real], answer[real]) > 1e-4
