"""Stores of encoded arrays: what is in them, and that no damage and no forgery passes."""

import hashlib
import json
import os
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoint_factory as factory
import numpy as np
import pytest
import tensorstore
import tiny
from encoded_stores import HEAD, NAMES, TABLE, Body, decoded, encoded_store, forge, is_encoded
from planned_models import store_of
from safetensors.numpy import load_file

from memsched.codecs import parse_codec
from memsched.errors import CodecError, ProgramError
from qwen3vl_jax.checkpoints.conversion import to_store
from qwen3vl_jax.checkpoints.encodings import Encoding, packed, unpacked
from qwen3vl_jax.checkpoints.hf_export import to_hf
from qwen3vl_jax.checkpoints.opening import open_checkpoint
from qwen3vl_jax.checkpoints.orbax_export import to_orbax
from qwen3vl_jax.checkpoints.store import ARRAYS_NAME, Store
from qwen3vl_jax.checkpoints.verification import verify, verify_store
from qwen3vl_jax.config import load_config
from qwen3vl_jax.errors import ConfigError, StorageError, UsageError, WeightError
from qwen3vl_jax.progress import Silent
from qwen3vl_jax.weights import arrays, table

PROJECTION = "language_model.layers.0.self_attn.q_proj.weight"
SMALL: dict[str, Any] = {
    "text": {"num_hidden_layers": 1, "vocab_size": 34},
    "vision": {"depth": 1, "patch_size": 2},
}


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """Array name -> values of a Hugging Face directory, by its own package; experts one by one."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, values in load_file(path).items():
            parent, _, kind = name.removeprefix("model.").rpartition(".")
            if parent.endswith(".experts"):
                found |= {f"{parent}.{i}.{kind}": part for i, part in enumerate(values)}
            else:
                found[name.removeprefix("model.")] = values
    return found


def contents(store: Path) -> dict[str, bytes]:
    """Relative name -> bytes of all files."""
    paths = [path for path in store.rglob("*") if path.is_file()]
    return {str(path.relative_to(store)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small `hf`, sparse and tied, and its `store` in int4."""
    folder = tmp_path_factory.mktemp("made")
    factory.checkpoint(folder / "hf", "moe", dtype="bfloat16", tied=True, shards=2, **SMALL)
    encoded_store(folder / "hf", folder / "store", "int4")
    return folder


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy of the small store that a test may damage."""
    return Path(shutil.copytree(made / "store", tmp_path / "store"))


@pytest.mark.parametrize("codec_name", NAMES)
@pytest.mark.parametrize("name", ["dense", "dense_tied", "moe"])
def test_a_store_holds_what_its_codec_makes_of_the_matrices(
    name: str, codec_name: str, tmp_path: Path
) -> None:
    source, codec = tiny.checkpoint(name, tmp_path), parse_codec(codec_name)
    found = Store(
        encoded_store(source, tmp_path / "store", codec_name), load_config(source)
    ).manifest.arrays
    wanted = tensors_of(source)
    if name == "dense_tied" and codec.cut == 1:
        wanted[HEAD] = wanted[TABLE]
    assert found.keys() == wanted.keys()
    for path, values in wanted.items():
        stored = codec.encode(values) if is_encoded(path, codec) else values
        assert (found[path].shape, found[path].dtype) == (stored.shape, stored.dtype.name), path
        assert found[path].sha256 == hashlib.sha256(stored.tobytes()).hexdigest(), path
        assert (found[path].encoding is not None) == is_encoded(path, codec)


@pytest.mark.parametrize("codec_name", NAMES)
def test_readers_get_decoded_values_of_all_or_of_some_rows(codec_name: str, tmp_path: Path) -> None:
    tensors = factory.checkpoint(tmp_path / "hf")
    encoded_store(tmp_path / "hf", tmp_path / "store", codec_name)
    config, codec = load_config(tmp_path / "hf"), parse_codec(codec_name)
    with open_checkpoint(tmp_path / "store", config) as checkpoint:
        for entry in table(config, vocab_rows=17):
            values = tensors[entry.hf_name]
            if is_encoded(entry.path, codec):
                values = decoded(values, codec_name)
            first, stop = entry.rows or (0, len(values))
            read = checkpoint.read(entry)
            np.testing.assert_array_equal(read, values[first:stop])
            assert read.dtype == checkpoint.dtype_of(entry) == np.float32


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_safetensors_orbax_and_a_raw_store_give_the_same_arrays(tmp_path: Path, kind: str) -> None:
    factory.checkpoint(tmp_path / "hf", kind, layout="released", shards=2, tied=True)
    to_orbax(tmp_path / "hf", tmp_path / "orbax", progress=Silent())
    store_of(tmp_path / "hf", tmp_path / "raw")
    stores = [
        contents(encoded_store(tmp_path / name, tmp_path / f"of {name}", "int8"))
        for name in ("hf", "orbax", "raw")
    ]
    assert stores[0] == stores[2]
    chunks = [{n: b for n, b in s.items() if n.startswith(ARRAYS_NAME)} for s in stores]
    assert chunks[0] == chunks[1]


def test_without_codecs_nothing_has_changed(made: Path, tmp_path: Path) -> None:
    for name, codecs in (("a", None), ("b", {})):
        to_store(made / "hf", tmp_path / name, dtype="keep", progress=Silent(), codecs=codecs)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["version"] == 1
    assert {tuple(array) for array in manifest["arrays"].values()} == {("dtype", "sha256", "shape")}


def test_another_dtype_is_taken_before_encoding(tmp_path: Path) -> None:
    tensors = factory.checkpoint(tmp_path / "hf")
    encoded_store(tmp_path / "hf", tmp_path / "store", "int8", dtype="bfloat16")
    found = Store(tmp_path / "store", load_config(tmp_path / "hf")).manifest.arrays[PROJECTION]
    narrow = tensors[f"model.{PROJECTION}"].astype(factory.DTYPES["bfloat16"])
    wanted = parse_codec("int8").encode(narrow)
    assert found.raw_dtype == "bfloat16"
    assert found.sha256 == hashlib.sha256(wanted.tobytes()).hexdigest()


def test_the_space_that_is_asked_for_is_what_the_files_occupy(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbytes = 0
    for folder in (made / "store" / ARRAYS_NAME).iterdir():
        chunks = [path.stat().st_size for path in folder.glob("c.*")]
        nbytes += sum(-(-size // 4096) * 4096 for size in chunks) + 2 * 4096
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=4096))
    with pytest.raises(StorageError, match=f"needs {nbytes:,} B more"):
        encoded_store(made / "hf", tmp_path / "new", "int4")


def test_an_array_is_encoded_beside_its_packed_form_and_little_else() -> None:
    values = np.random.default_rng(0).standard_normal((8192, 1024), np.float32)
    encoding = Encoding("int4:32", values.shape, "float32")
    codec = parse_codec("int4:32")
    np.testing.assert_array_equal(packed(values, "w", encoding), codec.encode(values))
    tracemalloc.start()
    stored = packed(values, "w", encoding)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A thread holds what it makes of 2 Mi numbers, and its codec some blocks of 256 KB.
    threads = os.cpu_count() or 1
    assert peak < stored.nbytes + threads * (2 << 20) + threads * (12 << 20)
    np.testing.assert_array_equal(
        unpacked(stored, encoding), codec.decode(stored, values.shape, "float32")
    )


# ---- export and verification ----


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_an_export_has_decoded_values_and_a_tied_head_is_the_table(
    tmp_path: Path, kind: str, tied: bool
) -> None:
    factory.checkpoint(tmp_path / "hf", kind, shards=2, tied=tied)
    encoded_store(tmp_path / "hf", tmp_path / "store", "int8")
    to_hf(tmp_path / "store", tmp_path / "back", progress=Silent())
    assert not verify(tmp_path / "store", tmp_path / "back", progress=Silent())
    wanted, found = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back")
    assert found.keys() == wanted.keys()
    assert (HEAD in found) != tied
    for path, values in wanted.items():
        lossy = is_encoded(path, parse_codec("int8"))
        left = decoded(values, "int8") if lossy else values
        np.testing.assert_array_equal(found[path], left)
    to_orbax(tmp_path / "store", tmp_path / "orbax", progress=Silent())
    config = load_config(tmp_path / "hf")
    with open_checkpoint(tmp_path / "orbax", config) as checkpoint:
        for entry in arrays(config):
            np.testing.assert_array_equal(checkpoint.read(entry), found[entry.array])


def test_verification_compares_with_what_encoding_the_source_gives(
    made: Path, tmp_path: Path
) -> None:
    assert verify(made / "hf", made / "store", progress=Silent())
    other = Path(shutil.copytree(made / "hf", tmp_path / "other"))
    factory.checkpoint(other, "moe", dtype="bfloat16", tied=True, shards=2, seed=1, **SMALL)
    with pytest.raises(WeightError, match=r"array '.*' differs"):
        verify(other, made / "store", progress=Silent())


def test_two_encoded_stores_are_not_compared(made: Path, tmp_path: Path) -> None:
    other = encoded_store(made / "hf", tmp_path / "other", "int8")
    with pytest.raises(UsageError, match="are both encoded; compare the original"):
        verify(made / "store", other, progress=Silent())


def test_200_random_bit_flips_are_200_errors(store: Path) -> None:
    chosen = random.Random(0)
    folders = [store / ARRAYS_NAME / name for name in (PROJECTION, HEAD)]
    files = [store / "manifest.json", *(path for f in folders for path in f.iterdir())]
    undetected = []
    for _ in range(200):
        path = chosen.choice(files)
        whole = path.read_bytes()
        place, bit = chosen.randrange(len(whole)), chosen.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        try:
            verify_store(store, progress=Silent())
            undetected.append((path, place, bit))
        except (WeightError, ConfigError):
            pass
        path.write_bytes(whole)
    assert undetected == []
    verify_store(store, progress=Silent())


# ---- forgeries ----


def _encoding(body: Body, name: str = PROJECTION) -> Body:
    found = body["arrays"][name]["encoding"]
    assert isinstance(found, dict)
    return found


def _unknown_codec(body: Body) -> None:
    _encoding(body)["codec"] = "int3"


def _no_text(body: Body) -> None:
    _encoding(body)["codec"] = ["int4:32"]


def _other_codec(body: Body) -> None:
    _encoding(body)["codec"] = "int8"


def _other_spelling(body: Body) -> None:
    _use(body, PROJECTION, "svd:rank=4")
    _encoding(body)["codec"] = "svd:rank=04"


def _other_shape(body: Body) -> None:
    _encoding(body)["shape"][1] += 1


def _other_dtype(body: Body) -> None:
    _encoding(body)["dtype"] = "uint8"


def _one_more_key(body: Body) -> None:
    _encoding(body)["offset"] = 0


def _nothing_saved(body: Body) -> None:
    body["arrays"][PROJECTION] |= {"dtype": "bfloat16", "shape": _encoding(body)["shape"]}
    _encoding(body)["codec"] = "bf16"


def _huge_and_consistent(body: Body) -> None:
    _use(body, PROJECTION, "int8", (2**40, 2**40))


def _other_rows_and_consistent(body: Body) -> None:
    outputs, inputs = _encoding(body)["shape"]
    _use(body, PROJECTION, "int4:32", (outputs + 1, inputs))


def _endless_axes(body: Body) -> None:
    _use(body, PROJECTION, "int8", (2**47,) * 60)


def _head_that_cannot_be_cut(body: Body) -> None:
    _use(body, HEAD, "svd:rank=4")


def _encoded_table(body: Body) -> None:
    _use(body, TABLE, "int4:32", tuple(body["arrays"][TABLE]["shape"]))


def _encoded_norm(body: Body) -> None:
    name = "language_model.norm.weight"
    _use(body, name, "int8", tuple(body["arrays"][name]["shape"]))


def _older_version(body: Body) -> None:
    body["version"] = 1


def _bytes_of_nothing(body: Body) -> None:
    body["arrays"][TABLE]["dtype"] = "uint8"


def _use(body: Body, name: str, codec: str, shape: tuple[int, ...] | None = None) -> None:
    """Another encoding, with the shape that follows from it."""
    shape = tuple(_encoding(body, name)["shape"]) if shape is None else shape
    stored, dtype = parse_codec(codec).packed(shape, "bfloat16")
    encoding = {"codec": codec, "shape": list(shape), "dtype": "bfloat16"}
    body["arrays"][name] |= {"dtype": dtype, "shape": list(stored), "encoding": encoding}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_unknown_codec, "malformed.*codec 'int3' is unknown"),
        (_no_text, "malformed.*bad encoding"),
        (_other_codec, "malformed.*does not follow"),
        (_other_spelling, "malformed.*by another name"),
        (_other_shape, r"malformed.*does not follow|wants"),
        (_other_dtype, "malformed.*bad encoding"),
        (_one_more_key, "malformed.*bad encoding"),
        (_nothing_saved, "malformed.*saves nothing"),
        (_huge_and_consistent, r"is \[1099511627776, 1099511627776\], but config.json wants"),
        (_other_rows_and_consistent, "config.json wants"),
        (_endless_axes, "config.json wants"),
        (_head_that_cannot_be_cut, "whose rows cannot be cut"),
        (_encoded_table, "is encoded, which it cannot be"),
        (_encoded_norm, "is encoded, which it cannot be|malformed"),
        (_older_version, "malformed.*do not go together"),
        (_bytes_of_nothing, "malformed.*bad dtype"),
    ],
)
def test_a_forged_encoding_is_refused_before_anything_is_read(
    store: Path, change: Callable[[Body], None], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorstore, "open", lambda *_, **__: pytest.fail("opened"))
    forge(store, change)
    config = load_config(store)
    tracemalloc.start()
    with pytest.raises(WeightError, match=says) as refused:
        open_checkpoint(store, config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(refused.value)
    assert peak < 4 << 20


def test_chunks_of_another_codec_are_refused(store: Path) -> None:
    forge(store, lambda body: _use(body, PROJECTION, "int8"))
    config = load_config(store)
    (entry,) = [entry for entry in arrays(config) if entry.path == PROJECTION]
    with (
        open_checkpoint(store, config) as checkpoint,
        pytest.raises(WeightError, match=r"zarr\.json is not what the manifest implies"),
    ):
        checkpoint.read(entry)


# ---- refusals ----


@pytest.mark.parametrize(
    ("codecs", "error", "says"),
    [
        ({TABLE: "int8"}, UsageError, "cannot be encoded"),
        ({"nowhere": "int8"}, UsageError, "'nowhere' cannot be encoded"),
        ({HEAD: "svd:rank=4"}, UsageError, "read in blocks of rows; choose int8 or int4"),
        ({PROJECTION: "bf16"}, UsageError, "make no array smaller"),
        ({PROJECTION: "int7"}, ProgramError, "codec 'int7' is unknown"),
    ],
)
def test_codecs_that_make_no_sense_are_refused_in_one_line(
    made: Path, tmp_path: Path, codecs: dict[str, str], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says) as refused:
        to_store(made / "hf", tmp_path / "new", dtype="keep", progress=Silent(), codecs=codecs)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_encoded_twice(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="encoded store, and nothing is encoded twice"):
        encoded_store(made / "store", tmp_path / "new", "int8")


def test_what_a_codec_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    values = factory.config_values()
    tensors = factory.random_tensors(values)
    tensors[f"model.{PROJECTION}"][3, 3] = np.nan
    factory.save(tmp_path / "hf", values, tensors)
    with pytest.raises(CodecError, match=rf"{PROJECTION}: 1 NaN"):
        encoded_store(tmp_path / "hf", tmp_path / "store", "int8")
    assert not (tmp_path / "store").exists()
