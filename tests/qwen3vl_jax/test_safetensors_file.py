"""The reader of safetensors files: what it accepts is what the safetensors package reads."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qwen3vl_jax.checkpoints.files import open_regular, read_into, read_small
from qwen3vl_jax.checkpoints.safetensors_file import HEADER_BYTES, SafetensorsFile, read_index
from qwen3vl_jax.errors import BadInputError, StorageError, WeightError

TENSORS: dict[str, np.ndarray] = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(4, 3),
    "b.bias": np.arange(5, dtype=np.float16),
    "c.norm": np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(2, 3),
}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def everything(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    with SafetensorsFile(path) as file:
        found = {name: file.read(name) for name in file.tensors}
    return {name: (v.dtype.name, v.shape, v.tobytes()) for name, v in found.items()}


def raw_file(path: Path, header: dict[str, object] | bytes, data: bytes = b"") -> Path:
    """A file with any header: what no honest writer would write."""
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(body)) + body + data)
    return path


def entry(
    start: int, stop: int, *, shape: object = None, dtype: object = "F32"
) -> dict[str, object]:
    lengths = [(stop - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": lengths, "data_offsets": [start, stop]}


def test_every_tensor_is_read_as_safetensors_wrote_it(shard: Path) -> None:
    wanted = {name: (v.dtype.name, v.shape, v.tobytes()) for name, v in TENSORS.items()}
    assert everything(shard) == wanted


def test_arrays_lie_at_aligned_addresses_and_belong_to_the_caller(shard: Path) -> None:
    with SafetensorsFile(shard) as file:
        first, second = file.read("b.bias"), file.read("b.bias")
    assert first.ctypes.data % 64 == 0
    first[:] = 0
    np.testing.assert_array_equal(second, TENSORS["b.bias"])


def test_a_range_of_rows_is_read_alone(shard: Path) -> None:
    with SafetensorsFile(shard) as file:
        np.testing.assert_array_equal(file.read("a.weight", 1, 2), TENSORS["a.weight"][1:3])


def test_no_flipped_header_bit_crashes_or_changes_a_tensor_of_the_expected_set(shard: Path) -> None:
    """Whatever is still accepted has another name; test_weights.py shows that these are refused
    when the names are compared with those of the model."""
    original, whole = everything(shard), shard.read_bytes()
    header_bytes = 8 + struct.unpack("<Q", whole[:8])[0]
    renamed = 0
    for bit in range(8 * header_bytes):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        shard.write_bytes(damaged)
        try:
            found = everything(shard)
        except WeightError:
            continue
        assert sorted(found.values()) == sorted(original.values())
        assert found.keys() != original.keys()
        renamed += 1
    assert renamed < 8 * sum(map(len, TENSORS))


def test_every_truncation_and_every_extension_is_refused(shard: Path) -> None:
    whole = shard.read_bytes()
    for size in range(len(whole)):
        shard.write_bytes(whole[:size])
        with pytest.raises(WeightError, match=r"truncated|damaged"):
            everything(shard)
    shard.write_bytes(whole + b"\0")
    with pytest.raises(WeightError, match="describes"):
        everything(shard)


@pytest.mark.parametrize(
    ("header", "data_bytes", "says"),
    [
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', 4, "twice"),
        (b'{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}', 4, "twice"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "overlaps"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "hole"),
        ({"a": entry(4, 8)}, 8, "hole"),
        ({"a": entry(0, 8)}, 4, "truncated"),
        ({"a": entry(0, 8, shape=[3])}, 8, "takes 12 B"),
        ({"a": entry(0, 8, shape=[2**40, 2**40])}, 8, "takes"),
        ({"a": entry(0, 8, shape=[-2, -1])}, 8, "malformed"),
        ({"a": entry(0, 8, shape=[2.0])}, 8, "malformed"),
        ({"a": entry(0, 4, shape=[True])}, 4, "malformed"),
        ({"a": entry(0, 8, shape=[1] * 9)}, 8, "malformed"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, 8, "malformed"),
        ({"a": entry(0, 8, shape=[8], dtype="F8_E4M3")}, 8, "F8_E4M3.*quantised"),
        ({"a": entry(0, 8, dtype=["F32"])}, 8, "dtype"),
        ({"a": entry(0, 8) | {"extra": 1}}, 8, "exactly"),
        ({"a": 3}, 0, "exactly"),
        ({"__metadata__": {"format": "exe"}, "a": entry(0, 4)}, 4, "__metadata__"),
        ({"__metadata__": {"format": "pt", "n": 1}, "a": entry(0, 4)}, 4, "__metadata__"),
        (b'["a"]', 0, "no JSON object"),
        (b'{"a":NaN}', 0, "NaN"),
        (b'{"a":\xff}', 0, "JSON"),
        (b'{"a":' + b"[" * 200_000 + b"}", 0, "JSON"),
        (b'{"a":' + b"9" * 10_000 + b"}", 0, "JSON"),
    ],
)
def test_a_header_that_breaks_a_rule_is_refused(
    tmp_path: Path, header: dict[str, object] | bytes, data_bytes: int, says: str
) -> None:
    path = raw_file(tmp_path / "model.safetensors", header, bytes(data_bytes))
    with pytest.raises(WeightError, match=says):
        SafetensorsFile(path)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", HEADER_BYTES + 1))
        file.truncate(10**12)
    with pytest.raises(WeightError, match="at most"):
        SafetensorsFile(path)


def test_more_than_100_000_tensors_are_refused(tmp_path: Path) -> None:
    header = b"{" + b",".join(b'"%d":0' % i for i in range(100_001)) + b"}"
    with pytest.raises(WeightError, match="100,001"):
        SafetensorsFile(raw_file(tmp_path / "model.safetensors", header))


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=0, max_size=6)), max_size=6),
    st.integers(0, 3),
)
@hypothesis.settings(
    max_examples=400, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_what_is_accepted_of_a_mutated_file_is_what_safetensors_reads(
    shard: Path, edits: list[tuple[int, bytes]], keep_length: int
) -> None:
    whole = _honest(shard)
    damaged = bytearray(whole)
    for place, text in edits:
        start = place % len(damaged)
        # Mostly the same length, else nearly every mutation fails at the first check.
        damaged[start : start + (len(text) if keep_length else 0)] = text
    path = shard.with_name("mutated.safetensors")
    path.write_bytes(damaged)
    try:
        found = everything(path)
    except WeightError:
        return
    try:
        with safe_open(path, framework="np") as file:
            assert sorted(file.keys()) == sorted(found)
            for name, (_, shape, _) in found.items():
                assert tuple(file.get_slice(name).get_shape()) == shape
    except SafetensorError as error:
        pytest.fail(f"safetensors refuses what we accept: {error}")


def _honest(shard: Path) -> bytes:
    save_file(TENSORS, shard, metadata={"format": "pt"})
    return shard.read_bytes()


def test_a_file_that_changes_while_it_is_open_is_noticed(shard: Path) -> None:
    with SafetensorsFile(shard) as file:
        with open(shard, "r+b") as other:
            other.seek(-1, os.SEEK_END)
            other.write(b"\x7f")
        os.utime(shard, ns=(1, 1))
        with pytest.raises(WeightError, match="changed"):
            file.read("a.weight")


def test_a_file_that_is_cut_while_it_is_open_is_noticed(shard: Path) -> None:
    with SafetensorsFile(shard) as file:
        os.truncate(shard, 100)
        with pytest.raises(WeightError, match="truncated"):
            file.read("c.norm")


def test_a_short_read_is_finished(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: honest(fd, [buffers[0][:3]], at))
    assert everything(shard)["a.weight"][2] == TENSORS["a.weight"].tobytes()


def test_a_read_error_is_a_storage_error(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with SafetensorsFile(shard) as file:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(StorageError, match=r"byte.*Input/output error"):
            file.read("a.weight")


def _as_link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def _as_pipe(path: Path, _: Path) -> None:
    os.mkfifo(path)


def _as_directory(path: Path, _: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [_as_link, _as_pipe, _as_directory])
def test_only_regular_files_are_opened(shard: Path, make: Callable[[Path, Path], None]) -> None:
    path = shard.with_name("other.safetensors")
    make(path, shard)
    with pytest.raises((WeightError, StorageError), match=r"link|regular|directory"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        ("../../blobs/" + "0a" * 32, True),
        ("../../blobs/" + "0a" * 20, True),
        ("../../blobs/../../secret", False),
        ("../../../blobs/" + "0a" * 32, False),
        ("/blobs/" + "0a" * 32, False),
        ("../../blobs/model", False),
    ],
)
def test_links_are_followed_only_in_the_layout_of_the_hub(
    shard: Path, target: str, allowed: bool
) -> None:
    snapshot = shard.parent / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    blob = (snapshot / target).resolve()
    if blob.is_relative_to(shard.parent):
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(shard.read_bytes())
    (snapshot / "model.safetensors").symlink_to(target)
    if allowed:
        assert everything(snapshot / "model.safetensors") == everything(shard)
    else:
        with pytest.raises(WeightError, match="symbolic link"):
            SafetensorsFile(snapshot / "model.safetensors")


def test_a_blob_that_is_a_link_itself_is_refused(shard: Path) -> None:
    snapshot, blobs = shard.parent / "snapshots" / "1", shard.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / ("0a" * 32)).symlink_to(shard)
    (snapshot / "model.safetensors").symlink_to("../../blobs/" + "0a" * 32)
    with pytest.raises(StorageError):
        SafetensorsFile(snapshot / "model.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "a/b",
        "",
        ".",
        "..",
        ".hidden",
        "a\0b",
        "a\nb",
        "x" * 256,
        "ä",
        3,
        None,
    ],
)
def test_an_index_names_plain_files_only(tmp_path: Path, name: object) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightError, match="plain file name"):
        read_index(path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[]", "", "{"])
def test_a_malformed_index_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(WeightError):
        read_index(path)


def test_small_files_are_capped(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"12345")
    assert read_small(path, 5) == b"12345"
    with pytest.raises(BadInputError, match="at most 4 B"):
        read_small(path, 4)


def test_reading_past_the_end_says_where_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    descriptor = open_regular(path)
    try:
        with pytest.raises(WeightError, match="ends at byte 5, wanted 8"):
            read_into(descriptor, np.empty(6, np.uint8), 2, path)
    finally:
        os.close(descriptor)
