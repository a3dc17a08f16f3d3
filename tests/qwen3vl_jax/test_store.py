"""Our store: what is written is read, and no damage passes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_factory as factory
import numpy as np
import pytest
import tensorstore
from quick import least_s

from memsched.collector import uncollected
from qwen3vl_jax.checkpoints import zarr_array
from qwen3vl_jax.checkpoints.conversion import to_store
from qwen3vl_jax.checkpoints.manifest import (
    CHUNK_BYTES,
    Manifest,
    StoredArray,
    chunk_files,
    chunk_rows,
    decode,
    encode,
)
from qwen3vl_jax.checkpoints.opening import open_checkpoint
from qwen3vl_jax.checkpoints.store import ARRAYS_NAME, Store
from qwen3vl_jax.checkpoints.verification import verify_store
from qwen3vl_jax.checkpoints.zarr_array import read_rows, sync_arrays, write_array
from qwen3vl_jax.config import load_config
from qwen3vl_jax.errors import ConfigError, Qwen3VLError, WeightError
from qwen3vl_jax.weights import block_rows, table


class Silent:
    """A progress that nobody sees; it remembers how far it came."""

    def __init__(self) -> None:
        self.done_bytes, self.total_bytes = 0, 0

    def stage(self, name: str, total_bytes: int) -> None:
        self.total_bytes += total_bytes

    def advance(self, nbytes: int) -> None:
        self.done_bytes += nbytes


SMALL: dict[str, Any] = {
    "text": {"num_hidden_layers": 1, "vocab_size": 34},
    "vision": {"depth": 1, "patch_size": 2},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small store in bfloat16, with one sparse layer."""
    folder = tmp_path_factory.mktemp("made")
    factory.checkpoint(folder / "hf", "moe", dtype="bfloat16", layout="released", shards=2, **SMALL)
    to_store(folder / "hf", folder / "store", dtype="keep", progress=Silent())
    return folder / "store"


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy of the small store that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "store"))


def bits(values: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return values.dtype.name, values.shape, values.tobytes()


@pytest.mark.parametrize("kind", ["dense", "moe", "mixed"])
@pytest.mark.parametrize("layout", ["saved", "released"])
def test_a_store_gives_the_arrays_of_its_source(tmp_path: Path, kind: str, layout: str) -> None:
    factory.checkpoint(tmp_path / "hf", kind, layout=layout, shards=2, tied=kind == "mixed")
    progress = Silent()
    to_store(tmp_path / "hf", tmp_path / "store", dtype="keep", progress=progress)
    config = load_config(tmp_path / "hf")
    assert load_config(tmp_path / "store") == config
    with (
        open_checkpoint(tmp_path / "hf", config) as source,
        open_checkpoint(tmp_path / "store", config) as made,
    ):
        assert isinstance(made, Store)
        assert made.nbytes == source.nbytes == progress.done_bytes == progress.total_bytes
        for entry in table(config, vocab_rows=block_rows(config.text.vocab_size, 3)):
            found = made.read(entry)
            assert bits(found) == bits(source.read(entry))
            assert found.ctypes.data % 64 == 0
            assert made.dtype_of(entry) == source.dtype_of(entry)
    for name, content in factory.SIDE_FILES.items():
        assert (tmp_path / "store" / name).read_bytes() == content


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_store_can_have_another_dtype(tmp_path: Path, dtype: str) -> None:
    tensors = factory.checkpoint(tmp_path / "hf")
    to_store(tmp_path / "hf", tmp_path / "store", dtype=dtype, progress=Silent())
    config = load_config(tmp_path / "store")
    with open_checkpoint(tmp_path / "store", config) as made:
        (entry,) = [e for e in table(config) if e.path == "visual.pos_embed.weight"]
        wanted = tensors["model.visual.pos_embed.weight"].astype(factory.DTYPES[dtype])
        assert bits(made.read(entry)) == bits(wanted)


def test_a_value_that_the_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    values = factory.config_values()
    tensors = factory.random_tensors(values)
    tensors["model.visual.pos_embed.weight"][3, 3] = 1e6
    factory.save(tmp_path / "hf", values, tensors)
    with pytest.raises(WeightError, match=r"pos_embed.weight' has values beyond .* float16"):
        to_store(tmp_path / "hf", tmp_path / "store", dtype="float16", progress=Silent())
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("shape", "itemsize", "rows"),
    [
        ((5,), 4, 5),
        ((1024, 2048), 2, 1024),
        ((2048, 2048), 2, 1024),
        ((2048, 6144), 2, 293),
        ((3, 2**22), 4, 1),
        ((151936, 2048), 2, 1020),
    ],
)
def test_chunks_are_whole_rows_of_at_most_4_mib(
    shape: tuple[int, ...], itemsize: int, rows: int
) -> None:
    assert chunk_rows(shape, itemsize) == rows
    assert rows == 1 or rows * np.prod(shape[1:]) * itemsize <= CHUNK_BYTES
    stored = StoredArray({2: "bfloat16", 4: "float32"}[itemsize], shape, "")
    padded = sum(size - 4 for size in chunk_files(stored).values())
    assert stored.nbytes <= padded < stored.nbytes * 1.01 + CHUNK_BYTES / 64


def test_rows_are_read_alone(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3000, 1024)).astype(np.float32)
    stored = write_array(tmp_path, "a", values)
    sync_arrays(tmp_path, {"a": stored})
    chunks = sorted((tmp_path / "a").glob("c.*"))
    assert len(chunks) == 3
    # Only the chunk in the middle stays readable: rows 1000 to 1999.
    for damaged in (chunks[0], chunks[2]):
        damaged.write_bytes(bytes(damaged.stat().st_size))
    found = read_rows(tmp_path, "a", stored, 1200, 1800)
    assert bits(found) == bits(values[1200:1800])
    with pytest.raises(WeightError, match="'a' is damaged"):
        read_rows(tmp_path, "a", stored, 999, 1001)


def test_a_row_is_read_alone_but_all_of_its_chunk_is_checked(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3000, 1024)).astype(np.float32)
    stored = write_array(tmp_path, "a", values)
    for row in (0, 63, 64, 999, 1000, 2999):
        assert bits(read_rows(tmp_path, "a", stored, row, row + 1)) == bits(values[row : row + 1])
    path = tmp_path / "a" / "c.1.0"
    whole = path.read_bytes()
    for place in (0, len(whole) - 5, len(whole) - 1):  # first and last value, and the checksum
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(WeightError, match=r"'a' is damaged: .*c\.1\.0"):
            read_rows(tmp_path, "a", stored, 1500, 1501)


def _lost(path: Path) -> None:
    path.unlink()


def _cut(path: Path) -> None:
    os.truncate(path, 100)


def _cut_in_its_checksum(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [_lost, _cut, _cut_in_its_checksum])
@pytest.mark.parametrize("rows", [(5, 6), (0, 64)], ids=["one row", "all rows"])
def test_a_chunk_that_is_damaged_after_it_was_looked_at_is_a_weight_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    rows: tuple[int, int],
) -> None:
    stored = write_array(tmp_path, "a", np.zeros((64, 1024), np.float32))
    monkeypatch.setattr(zarr_array, "check_array_files", lambda *_: None)
    damage(tmp_path / "a" / "c.0.0")
    with pytest.raises(WeightError, match=r"^array 'a' is damaged: .*; convert the model again$"):
        read_rows(tmp_path, "a", stored, *rows)


ROW_PEAK = """
import sys
from pathlib import Path
import numpy as np
from memsched.calibration.resident import peak_since, start_peak
from qwen3vl_jax.checkpoints.zarr_array import read_rows, write_array
folder = Path(sys.argv[1])
stored = write_array(folder, "a", np.ones((1024, 1024), np.float32))
read_rows(folder, "a", stored, 5, 6)
before = start_peak()
read_rows(folder, "a", stored, 700, 701)
print(peak_since(before))
"""


def test_a_row_takes_little_memory_though_its_chunk_is_large(tmp_path: Path) -> None:
    """A token looks its row up before anybody looks whether there is memory for 8 MB more."""
    # Freed blocks go back to the system at once: none is left to hide in.
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}
    command = [sys.executable, "-c", ROW_PEAK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a" / "c.0.0").stat().st_size == CHUNK_BYTES + 4
    if done.stdout.strip() == "None":
        pytest.skip("the kernel keeps no mark of the most that was resident")
    assert int(done.stdout) < CHUNK_BYTES // 4


def test_another_reader_of_zarr_sees_the_same_values(store: Path) -> None:
    name = "language_model.embed_tokens.weight"
    config = load_config(store)
    path = str(store / ARRAYS_NAME / name)
    kvstore = {"driver": "file", "path": path}
    other = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True).result()
    with open_checkpoint(store, config) as made:
        (entry,) = [e for e in table(config) if e.array == name]
        assert bits(other.read().result()) == bits(made.read(entry))
    assert {c["name"] for c in json.loads(Path(path, "zarr.json").read_text())["codecs"]} == {
        "bytes",
        "crc32c",
    }


def test_zeros_are_written_too(tmp_path: Path) -> None:
    """A chunk left out because it holds the fill value could not be told from a lost one."""
    stored = write_array(tmp_path, "zero", np.zeros(10, np.float32))
    assert (tmp_path / "zero" / "c.0").stat().st_size == 44
    (tmp_path / "zero" / "c.0").unlink()
    with pytest.raises(WeightError, match=r"c\.0 is missing"):
        read_rows(tmp_path, "zero", stored, 0, 10)


def test_500_random_bit_flips_are_500_errors(store: Path) -> None:
    chosen = random.Random(0)
    files = sorted(path for path in store.rglob("*") if path.is_file())
    names = {path.name for path in files}
    assert {"manifest.json", "zarr.json", "config.json", "tokenizer.json", "c.0"} <= names
    # Files by kind first, so that chunks, zarr.json, manifest and others get their share.
    kinds = [
        [path for path in files if path.name.startswith("c.")],
        [path for path in files if path.name == "zarr.json"],
        [path for path in files if path.parent != store and path.name.endswith(".header")],
        [path for path in files if path.parent == store],
        [store / "manifest.json"],
    ]
    undetected = []
    for _ in range(500):
        path = chosen.choice(chosen.choice(kinds))
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


def test_a_flipped_weight_is_noticed_when_it_is_read(store: Path) -> None:
    config = load_config(store)
    chosen = random.Random(1)
    with open_checkpoint(store, config) as made:
        for entry in table(config):
            folder = store / ARRAYS_NAME / entry.array
            path = chosen.choice(sorted(folder.iterdir()))
            whole = path.read_bytes()
            place = chosen.randrange(len(whole))
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(WeightError, match=r"damaged"):
                made.read(entry)


def _array_folder(store: Path) -> Path:
    return store / ARRAYS_NAME / "visual.pos_embed.weight"


def _lost_chunk(store: Path) -> None:
    (_array_folder(store) / "c.0.0").unlink()


def _cut_chunk(store: Path) -> None:
    os.truncate(_array_folder(store) / "c.0.0", 100)


def _linked_chunk(store: Path) -> None:
    path = _array_folder(store) / "c.0.0"
    path.rename(store / "elsewhere")
    path.symlink_to(store / "elsewhere")


def _pipe_for_a_chunk(store: Path) -> None:
    path = _array_folder(store) / "c.0.0"
    path.unlink()
    os.mkfifo(path)


def _swapped_arrays(store: Path) -> None:
    """Two arrays of one shape: every crc32c still holds."""
    first, second = (store / ARRAYS_NAME / f"visual.blocks.0.norm{n}.bias" for n in (1, 2))
    first.rename(store / "other")
    second.rename(first)
    (store / "other").rename(second)


def _stray(store: Path) -> None:
    (_array_folder(store) / "c.1.0").write_bytes(b"")


def _lost_tokenizer(store: Path) -> None:
    (store / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        _lost_chunk,
        _cut_chunk,
        _linked_chunk,
        _pipe_for_a_chunk,
        _swapped_arrays,
        _stray,
        _lost_tokenizer,
    ],
)
def test_verification_finds(store: Path, damage: object) -> None:
    assert callable(damage)
    damage(store)
    with pytest.raises(Qwen3VLError):
        verify_store(store, progress=Silent())


def forged(store: Path, **changes: object) -> None:
    """A manifest with a right digest and wrong content, as an attacker would write it."""
    path = store / "manifest.json"
    manifest = decode(path.read_bytes(), "x")
    arrays = {**manifest.arrays, **changes}
    kept = {name: array for name, array in arrays.items() if isinstance(array, StoredArray)}
    path.write_bytes(encode(Manifest(kept, manifest.files, manifest.source)))


def test_a_forged_manifest_reaches_no_tensorstore(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        pytest.fail("tensorstore was called")

    config = load_config(store)
    monkeypatch.setattr(tensorstore, "open", never)
    huge = StoredArray("bfloat16", (2**40, 2**6), "0" * 64)
    for change, says in (
        ({"visual.pos_embed.weight": huge}, "pos_embed.weight' is"),
        ({"visual.pos_embed.weight": None}, "misses array"),
        ({"../../outside": huge}, "unknown array"),
    ):
        whole = (store / "manifest.json").read_bytes()
        forged(store, **change)
        with pytest.raises(WeightError, match=says):
            open_checkpoint(store, config)
        (store / "manifest.json").write_bytes(whole)


def test_a_forged_zarr_json_reaches_no_tensorstore(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(store)
    path = _array_folder(store) / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shape": [2**50, 2**10]}))
    with open_checkpoint(store, config) as made:
        monkeypatch.setattr(tensorstore, "open", lambda *_, **__: pytest.fail("opened"))
        (entry,) = [e for e in table(config) if e.path == "visual.pos_embed.weight"]
        with pytest.raises(WeightError, match=r"zarr\.json is not what the manifest implies"):
            made.read(entry)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [("version", 3, "version 3"), ("format", "other", "no manifest"), ("chunk_bytes", 1, "chunks")],
)
def test_another_format_is_refused(store: Path, key: str, value: object, says: str) -> None:
    path = store / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(WeightError, match=says):
        Store(store, load_config(store))


def test_another_model_is_refused(store: Path) -> None:
    wider = SMALL | {"text": SMALL["text"] | {"vocab_size": 40}}
    values = factory.config_values("moe", **wider)
    (store / "config.json").write_text(json.dumps(values))
    with pytest.raises(WeightError, match=r"config\.json wants"):
        Store(store, load_config(store))


@pytest.mark.alone
def test_ctrl_c_ends_reading_at_once(tmp_path: Path) -> None:
    stored = write_array(tmp_path, "a", np.zeros((64, 1024), np.float32))

    def read_for_20_seconds(start: float) -> None:
        while time.monotonic() < start + 20:
            read_rows(tmp_path, "a", stored, 0, 64)

    def ended() -> float:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        # In a callback of the collector, which JAX has, a KeyboardInterrupt would be lost.
        with uncollected(), pytest.raises(KeyboardInterrupt):
            read_for_20_seconds(start)
        return time.monotonic() - start

    assert least_s(ended, 1.5, most_s=5.5) < 1.5
