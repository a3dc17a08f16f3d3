"""The table of names, and Hugging Face directories read through it."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import checkpoint_factory as factory
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from qwen3vl_jax.checkpoints.hf_checkpoint import check_shapes, expert_layouts
from qwen3vl_jax.checkpoints.opening import kind_of, open_checkpoint
from qwen3vl_jax.checkpoints.safetensors_file import SafetensorsFile
from qwen3vl_jax.config import load_config, parse_config
from qwen3vl_jax.errors import UsageError, WeightError
from qwen3vl_jax.weights import Entry, arrays, block_rows, row_blocks, table

KINDS = ("dense", "moe", "mixed")
CONFIGS = Path(__file__).parents[2] / "configs" / "models"


def read_all(directory: Path, *, vocab_blocks: int = 1) -> dict[str, np.ndarray]:
    config = load_config(directory)
    with open_checkpoint(directory, config) as checkpoint:
        rows = block_rows(config.text.vocab_size, vocab_blocks)
        return {e.path: checkpoint.read(e) for e in table(config, vocab_rows=rows)}


def expected(tensors: factory.Tensors) -> dict[str, np.ndarray]:
    """Our arrays from tensors whose experts lie as [E, out, in]."""
    found: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        path = name.removeprefix("model.")
        if ".experts." in name:
            parent, _, kind = path.rpartition(".")
            found |= {f"{parent}.{e}.{kind}": matrix for e, matrix in enumerate(tensor)}
        elif path in ("lm_head.weight", "language_model.embed_tokens.weight"):
            found[f"{path}.0"] = tensor
        else:
            found[path] = tensor
    return found


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> bool:
    """Whether names, dtypes, shapes and bits are equal."""
    return found.keys() == wanted.keys() and all(
        (v.dtype, v.shape, v.tobytes()) == (w.dtype, w.shape, w.tobytes())
        for v, w in ((found[name], wanted[name]) for name in found)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_directory_is_read_completely(tmp_path: Path, kind: str, tied: bool, dtype: str) -> None:
    tensors = factory.checkpoint(tmp_path, kind, tied=tied, dtype=dtype, shards=3)
    assert same(read_all(tmp_path), expected(tensors))


@pytest.mark.parametrize("kind", ["moe", "mixed"])
@pytest.mark.parametrize("dialect", ["4", "5"])
def test_both_expert_layouts_give_the_same_arrays(tmp_path: Path, kind: str, dialect: str) -> None:
    saved = factory.checkpoint(tmp_path / "saved", kind, dialect=dialect)
    factory.checkpoint(tmp_path / "released", kind, dialect=dialect, layout="released")
    assert same(read_all(tmp_path / "released"), expected(saved))
    assert same(read_all(tmp_path / "saved"), expected(saved))


def test_an_attention_bias_is_part_of_the_table(tmp_path: Path) -> None:
    tensors = factory.checkpoint(tmp_path, text={"attention_bias": True})
    assert same(read_all(tmp_path), expected(tensors))
    assert "language_model.layers.0.self_attn.o_proj.bias" in read_all(tmp_path)


@pytest.mark.parametrize("name", tiny.STORED)
def test_what_transformers_saved_is_read_completely(name: str) -> None:
    tensors: factory.Tensors = {}
    for path in sorted((tiny.DATA / name).glob("*.safetensors")):
        tensors |= load_file(path)
    if name == "moe_official_layout":
        tensors = {n: t.swapaxes(1, 2) if ".experts." in n else t for n, t in tensors.items()}
    assert same(read_all(tiny.DATA / name), expected(tensors))


# Published figures of the released checkpoints: tensors, and bytes in bfloat16.
RELEASED = {
    "qwen3-vl-2b": (625, 4_255_064_064),
    "qwen3-vl-4b": (713, 8_875_631_616),
    "qwen3-vl-8b": (750, 17_534_247_392),
    "qwen3-vl-32b": (1058, 66_714_780_128),
    "qwen3-vl-30b-a3b": (882, 62_141_508_064),
    "qwen3-vl-235b-a22b": (1388, 471_340_045_792),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_table_has_the_published_size(name: str) -> None:
    path = CONFIGS / f"{name}-instruct.json"
    entries = arrays(load_config(path))
    nbytes = sum(2 * int(np.prod(entry.shape)) for entry in entries)
    assert (len({entry.hf_name for entry in entries}), nbytes) == RELEASED[name]


def test_the_table_is_in_order_and_names_nothing_twice() -> None:
    paths = [entry.path for entry in table(parse_config(factory.config_values("mixed")))]
    assert len(paths) == len(set(paths))
    assert paths[0] == "visual.patch_embed.proj.weight"
    assert paths[-2:] == ["language_model.norm.weight", "lm_head.weight.0"]
    embedding = paths.index("language_model.embed_tokens.weight.0")
    assert all(path.startswith("visual.") for path in paths[:embedding])
    assert paths[embedding + 1].startswith("language_model.layers.0.")


def test_vocabulary_blocks_together_are_the_matrix(tmp_path: Path) -> None:
    tensors = factory.checkpoint(tmp_path)
    found = read_all(tmp_path, vocab_blocks=3)
    blocks = [found[f"lm_head.weight.{b}"] for b in range(3)]
    assert [len(block) for block in blocks] == [14, 14, 12]
    np.testing.assert_array_equal(np.concatenate(blocks), tensors["lm_head.weight"])
    assert "lm_head.weight.3" not in found


@pytest.mark.parametrize(
    ("rows", "count", "wanted"),
    [
        (10, 1, [(0, 10)]),
        (10, 4, [(0, 3), (3, 6), (6, 9), (9, 10)]),
        (3, 3, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_row_blocks_are_ceil_divided(rows: int, count: int, wanted: list[tuple[int, int]]) -> None:
    assert list(row_blocks(rows, block_rows(rows, count))) == wanted


@pytest.mark.parametrize("count", [0, 11, -1])
def test_an_impossible_number_of_blocks_is_refused(count: int) -> None:
    with pytest.raises(UsageError, match="vocab_blocks"):
        block_rows(10, count)


def test_blocks_of_a_given_size_leave_the_rest_to_the_last() -> None:
    assert row_blocks(10, 4) == ((0, 4), (4, 8), (8, 10))
    assert row_blocks(10, None) == ((0, 10),)
    with pytest.raises(UsageError, match="vocab_rows is 0"):
        row_blocks(10, 0)


def test_blocks_may_have_sizes_of_their_own() -> None:
    assert row_blocks(10, (4, 1, 3, 2)) == ((0, 4), (4, 5), (5, 8), (8, 10))
    for rows, says in (((4, 5), "are 9 .* wanted 10"), ((4, 0, 6), "blocks of 0"), ((), "are 0")):
        with pytest.raises(UsageError, match=says):
            row_blocks(10, rows)


def _missing(tensors: factory.Tensors) -> str:
    del tensors["model.visual.merger.norm.bias"]
    return "misses tensor 'model.visual.merger.norm.bias'"


def _unknown(tensors: factory.Tensors) -> str:
    tensors["model.visual.extra"] = np.zeros(2, np.float32)
    return "unknown tensor 'model.visual.extra'"


def _misshapen(tensors: factory.Tensors) -> str:
    tensors["model.language_model.norm.weight"] = np.zeros(15, np.float32)
    return r"'model.language_model.norm.weight' is \[15\].*wants \[16\]"


def _transposed(tensors: factory.Tensors) -> str:
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    return r"up_proj.weight' is \[16, 24\].*wants \[24, 16\]"


def _headless(tensors: factory.Tensors) -> str:
    del tensors["lm_head.weight"]
    return "misses tensor 'lm_head.weight'.*tie_word_embeddings: false"


@pytest.mark.parametrize("damage", [_missing, _unknown, _misshapen, _transposed, _headless])
@pytest.mark.parametrize("shards", [None, 2])
def test_a_wrong_tensor_is_named(tmp_path: Path, damage: Any, shards: int | None) -> None:
    values = factory.config_values()
    tensors = factory.random_tensors(values)
    says = damage(tensors)
    factory.save(tmp_path, values, tensors, shards=shards)
    with pytest.raises(WeightError, match=says):
        read_all(tmp_path)


def test_a_head_in_a_tied_model_is_refused(tmp_path: Path) -> None:
    values = factory.config_values(tied=True)
    tensors = factory.random_tensors(values)
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
    factory.save(tmp_path, values, tensors)
    with pytest.raises(WeightError, match=r"lm_head.weight.*tie_word_embeddings: true"):
        read_all(tmp_path)


def test_a_misshapen_expert_is_named(tmp_path: Path) -> None:
    values = factory.config_values("moe")
    tensors = factory.random_tensors(values)
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    tensors[name] = tensors[name][:2]
    factory.save(tmp_path, values, tensors)
    with pytest.raises(WeightError, match=r"layers.1.mlp.experts.down_proj' is \[2, 16, 12\]"):
        read_all(tmp_path)


SQUARE = {"moe_intermediate_size": 8}  # gate_up_proj is [E, 16, 16]: its layout cannot be seen


@pytest.mark.parametrize("layout", ["saved", "released"])
def test_square_experts_follow_the_others(tmp_path: Path, layout: str) -> None:
    saved = factory.checkpoint(tmp_path / "saved", "moe", text=SQUARE)
    factory.checkpoint(tmp_path / layout, "moe", text=SQUARE, layout=layout)
    assert same(read_all(tmp_path / layout), expected(saved))


@pytest.mark.parametrize(("version", "layout"), [("4.57.1", "released"), ("5.0.0", "saved")])
def test_square_experts_alone_follow_the_version_of_transformers(
    tmp_path: Path, version: str, layout: str
) -> None:
    values = factory.config_values("mixed", text=SQUARE, transformers_version=version)
    tensors = factory.random_tensors(values)
    gate_up = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    found = expert_layouts({gate_up: tensors[gate_up].shape}, parse_config(values), "x")
    assert found.issuperset({gate_up}) == (layout == "released")


def test_square_experts_without_a_version_are_refused() -> None:
    values = factory.config_values("moe", text=SQUARE, transformers_version="")
    with pytest.raises(WeightError, match="transformers_version"):
        expert_layouts({}, parse_config(values), "x")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    tensors = factory.checkpoint(tmp_path, shards=2)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: tensors[name]}, second, metadata={"format": "pt"})
    with pytest.raises(WeightError, match=f"{name!r} lies in both"):
        read_all(tmp_path)


def _edit_index(directory: Path, edit: Any) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def test_an_index_must_agree_with_the_headers(tmp_path: Path) -> None:
    factory.checkpoint(tmp_path, shards=2)
    _edit_index(tmp_path, lambda index: index.pop("lm_head.weight"))
    with pytest.raises(WeightError, match=r"lm_head.weight' should lie in no file"):
        read_all(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    factory.checkpoint(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightError, match=r"misses model-00002-of-00003\.safetensors"):
        read_all(tmp_path)


def test_a_shard_that_the_index_does_not_name_is_refused(tmp_path: Path) -> None:
    factory.checkpoint(tmp_path, shards=2)
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"")
    with pytest.raises(WeightError, match=r"model-00003-of-00003\.safetensors is not named"):
        read_all(tmp_path)


def test_an_index_that_points_outside_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory.checkpoint(tmp_path / "model", shards=2)
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    _edit_index(tmp_path / "model", lambda m: m.update({"lm_head.weight": "../secret.safetensors"}))
    config = load_config(tmp_path / "model")
    opened: list[str] = []
    honest = os.open

    def noted(path: Any, *arguments: Any, **more: Any) -> int:
        opened.append(str(path))
        return honest(path, *arguments, **more)

    monkeypatch.setattr(os, "open", noted)
    with pytest.raises(WeightError, match="plain file name"):
        open_checkpoint(tmp_path / "model", config)
    assert {Path(path).parent for path in opened} == {tmp_path / "model"}


def test_no_flipped_header_bit_is_accepted(tmp_path: Path) -> None:
    """All bits of a shard's header: the reader or the comparison with the table refuses each."""
    values = factory.config_values("moe", tied=True)
    tensors = factory.random_tensors(values)
    config = parse_config(values)
    few = [name for name in tensors if ".layers.0.mlp.experts." in name]
    shard = tmp_path / "model.safetensors"
    save_file({name: tensors[name] for name in few}, shard, metadata={"format": "pt"})
    rest = {name: tensor.shape for name, tensor in tensors.items() if name not in few}

    def accept() -> None:
        with SafetensorsFile(shard) as file:
            found = rest | {tensor.name: tensor.shape for tensor in file.header.tensors}
        check_shapes(found, expert_layouts(found, config, "x"), config, "x")

    accept()
    whole = shard.read_bytes()
    header_bytes = 8 + struct.unpack("<Q", whole[:8])[0]
    with open(shard, "r+b", buffering=0) as file:
        for bit in range(8 * header_bytes):
            damaged = bytearray(whole[:header_bytes])
            damaged[bit // 8] ^= 1 << bit % 8
            file.seek(0)
            file.write(damaged)
            with pytest.raises(WeightError):
                accept()


def test_a_directory_of_pickles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightError, match="never read"):
        kind_of(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="holds no weights"):
        kind_of(tmp_path)
    with pytest.raises(WeightError, match="is no directory"):
        kind_of(tmp_path / "nothing")


def test_single_file_and_index_together_are_refused(tmp_path: Path) -> None:
    factory.checkpoint(tmp_path, shards=2)
    factory.checkpoint(tmp_path)
    with pytest.raises(WeightError, match="holds both"):
        read_all(tmp_path)


def test_size_and_dtype_are_those_of_the_files(tmp_path: Path) -> None:
    tensors = factory.checkpoint(tmp_path, "moe", dtype="bfloat16")
    config = load_config(tmp_path)
    with open_checkpoint(tmp_path, config) as checkpoint:
        assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
        assert {checkpoint.dtype_of(e).type for e in table(config)} == {ml_dtypes.bfloat16}


def test_an_entry_knows_the_name_of_its_whole_array() -> None:
    assert (
        Entry("lm_head.weight.2", "lm_head.weight", (4, 2), rows=(8, 12)).array == "lm_head.weight"
    )
    assert Entry("visual.a.0", "model.visual.a.0", (4,)).array == "visual.a.0"
