"""The port against transformers in the same process, on fresh random models of every kind."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import parity
import pytest

from qwen3vl_jax import Qwen3VL

torch = pytest.importorskip("torch", reason="the reference needs the test extra")
# Tiny products: a second thread only waits, forty times as long when the machine is busy.
torch.set_num_threads(1)

IMAGE, VIDEO, START, END, VOCABULARY = 150, 151, 152, 153, 160
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024, "attention_bias": False,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}  # fmt: skip
VISION = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 32,
    "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2], "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
}  # fmt: skip
EXPERTS = {
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
YARN = TEXT["rope_parameters"] | {  # type: ignore[operator]
    "rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 32,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kind:
    """A sort of model: settings of the decoder, and whether the head is the embedding."""

    text: dict[str, Any]
    sparse: bool = False
    tied: bool = False
    seed: int = 0


KINDS = {
    "dense": Kind({}, seed=1),
    "dense, another seed": Kind({"num_key_value_heads": 1, "head_dim": 24} | {
        "rope_parameters": TEXT["rope_parameters"] | {"mrope_section": [4, 4, 4]}  # type: ignore[operator]
    }, seed=2),
    "tied": Kind({}, tied=True, seed=3),
    "moe": Kind(EXPERTS, sparse=True, seed=4),
    "mixed": Kind(EXPERTS | {"mlp_only_layers": [1]}, sparse=True, seed=5),
    "every second layer sparse": Kind(EXPERTS | {"decoder_sparse_step": 2}, sparse=True, seed=6),
    "attention bias": Kind({"attention_bias": True}, seed=7),
    "yarn": Kind({"rope_parameters": YARN}, seed=8),
}  # fmt: skip


def reference(kind: Kind) -> Any:
    """A random model of transformers, with weights wide enough that every part matters."""
    import transformers

    family = "Qwen3VLMoe" if kind.sparse else "Qwen3VL"
    config = getattr(transformers, f"{family}Config")(
        text_config=TEXT | kind.text, vision_config=VISION, tie_word_embeddings=kind.tied,
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START,
        vision_end_token_id=END, dtype="float32",
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(kind.seed)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).float().eval()
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape)
            if name.endswith("bias"):
                weight.copy_(0.05 * noise)
            elif "norm" in name:
                weight.copy_(1 + 0.1 * noise)
            elif "embed" in name and "patch" not in name:
                weight.copy_(0.5 * noise)
            else:
                inputs = weight[0].numel() if weight.ndim != 3 else weight.shape[-1]
                weight.copy_(1.4 * noise / inputs**0.5)
    model.tie_weights()
    model.generation_config.eos_token_id = None  # 64 tokens, whatever they are
    return model


Grid = tuple[int, int, int]


def row(rng: np.random.Generator, *parts: int | tuple[str, Grid]) -> list[int]:
    """Token ids: an int is so many random words, the others are pictures and videos."""
    tokens: list[int] = []
    for part in parts:
        match part:
            case int():
                tokens += rng.integers(0, 140, part).tolist()
            case ("image", (_, rows, columns)):
                tokens += [START, *[IMAGE] * (rows * columns // 4), END]
            case ("video", (frames, rows, columns)):
                # Every group of two frames has its own timestamp, as in the released models.
                for group in range(frames):
                    tokens += [group, 141, START, *[VIDEO] * (rows * columns // 4), END]
    return tokens


def batch(seed: int, *rows: tuple[Any, ...], left: bool = True) -> dict[str, np.ndarray]:
    """What a processor gives for these rows, padded to the longest."""
    rng = np.random.default_rng(seed)
    tokens = [row(rng, *parts) for parts in rows]
    length = max(map(len, tokens))
    shape = (len(tokens), length)
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for index, line in enumerate(tokens):
        place = slice(length - len(line), None) if left else slice(len(line))
        ids[index, place], mask[index, place] = line, 1
    kinds = np.where(ids == IMAGE, 1, np.where(ids == VIDEO, 2, 0))
    found = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}
    for kind, suffix in (("image", ""), ("video", "_videos")):
        grids = [
            part[1]
            for parts in rows
            for part in parts
            if isinstance(part, tuple) and part[0] == kind
        ]
        if grids:
            patches = int(np.prod(grids, axis=1).sum())
            found[f"pixel_values{suffix}"] = rng.uniform(-1, 1, (patches, 1536)).astype(np.float32)
            found[f"{kind}_grid_thw"] = np.array(grids, np.int64)
    return found


def odd_video(seed: int) -> dict[str, np.ndarray]:
    """Five frames: the last one is repeated to fill the third group."""
    found = batch(seed, (3, ("video", (3, 4, 6)), 5))
    last = found["pixel_values_videos"][-24:].reshape(24, 3, 2, 16, 16)
    last[:, :, 1] = last[:, :, 0]
    return found


PICTURE, WIDE, TALL = ("image", (1, 4, 4)), ("image", (1, 2, 8)), ("image", (1, 6, 4))
CLIP = ("video", (2, 4, 4))
INPUTS = {
    "text": batch(1, (9,)),
    "image": batch(2, (4, PICTURE, 5)),
    "two images": batch(3, (2, WIDE, 3, TALL, 6)),
    "video": batch(4, (3, CLIP, 4)),
    "odd video": odd_video(5),
    "image and video": batch(6, (2, TALL, 1, CLIP, 4)),
    "padded left": batch(7, (4, PICTURE, 5), (7,), (1, WIDE, TALL, 9)),
    "padded right": batch(7, (4, PICTURE, 5), (7,), (1, WIDE, TALL, 9), left=False),
}


Pair = tuple[Any, Qwen3VL]


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """A model of transformers, and the port reading what it saved."""

    @functools.cache
    def make(kind: str) -> Pair:
        theirs = reference(KINDS[kind])
        folder = tmp_path_factory.mktemp("saved")
        theirs.save_pretrained(folder, max_shard_size="60KB")
        return theirs, Qwen3VL.from_pretrained(folder, dtype="float32")

    return make


# Every sort of input for one dense and one sparse model; for the others the two that hold most.
RICH = ("image and video", "padded left")
CASES = [
    (kind, name) for kind in KINDS for name in INPUTS if kind in ("dense", "moe") or name in RICH
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_logits_are_those_of_transformers(
    kind: str, name: str, pair_of: Callable[[str], Pair]
) -> None:
    theirs, ours = pair_of(kind)
    given = INPUTS[name]
    theirs.model.rope_deltas = None
    with torch.no_grad():
        logits = theirs(**{key: torch.from_numpy(value) for key, value in given.items()}).logits
    assert parity.logits_difference(ours, given, {"logits": logits.numpy()}) < parity.TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_64_greedy_tokens_are_those_of_transformers(
    kind: str, pair_of: Callable[[str], Pair]
) -> None:
    theirs, ours = pair_of(kind)
    given = INPUTS["padded left"]
    theirs.model.rope_deltas = None
    tensors = {key: torch.from_numpy(value) for key, value in given.items()}
    with torch.no_grad():
        tokens = theirs.generate(**tensors, max_new_tokens=64, do_sample=False).numpy()
    wanted = tokens[:, given["input_ids"].shape[1] :]
    assert wanted.shape[1] == 64
    assert np.array_equal(parity.greedy(ours, given, 64), wanted)
