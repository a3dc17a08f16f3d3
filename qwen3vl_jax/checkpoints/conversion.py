"""Changing the format of a checkpoint: Hugging Face or Orbax to our store, and back.

One array is in memory at a time. What is finished is noted in a journal, so the same call
continues after a kill; the destination appears only when it is complete and durable.
"""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qwen3vl_jax.checkpoints.files import (
    DTYPES,
    PIECE_BYTES,
    aligned_empty,
    bytes_of,
    pieces,
    read_small,
    sha256,
    storage_errors,
    write_synced,
)
from qwen3vl_jax.checkpoints.hf_checkpoint import INDEX_NAME, HFCheckpoint
from qwen3vl_jax.checkpoints.hf_layout import keep_layout
from qwen3vl_jax.checkpoints.manifest import (
    MANIFEST_NAME,
    Manifest,
    Source,
    StoredArray,
    StoredFile,
    chunk_files,
    encode,
)
from qwen3vl_jax.checkpoints.opening import Checkpoint, kind_of, open_checkpoint
from qwen3vl_jax.checkpoints.store import ARRAYS_NAME
from qwen3vl_jax.checkpoints.work_directory import WorkDirectory
from qwen3vl_jax.checkpoints.zarr_array import check_array_files, sync_arrays, write_array
from qwen3vl_jax.config import Config, load_config
from qwen3vl_jax.errors import StorageError, UsageError, WeightError
from qwen3vl_jax.weights import Entry, arrays

# One round of fsync is for so much; a kill loses at most this.
BATCH_BYTES = 64 * 2**20
BATCH_ARRAYS = 16
# What makes a directory of weights a model: copied as it is, where it is there.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "README.md",
)


@runtime_checkable
class Progress(Protocol):
    """Told what is being done and how far it is."""

    def stage(self, name: str, total_bytes: int) -> None:
        """A new stage begins, of this many bytes."""

    def advance(self, nbytes: int) -> None:
        """So many bytes of the stage are done since the last call."""


def to_store(source: Path, destination: Path, *, dtype: str, progress: Progress) -> None:
    """Write our store at `destination` from a Hugging Face or Orbax checkpoint.

    Args:
        dtype: "keep", or the name of the dtype that all arrays get.

    Raises:
        UsageError: if `destination` exists, or the source is a store already.
        WeightError: if the source is damaged, or not the model of its config.json.
        StorageError: if there is too little space, or the system refuses.
    """
    kind = kind_of(source)
    if kind == "store":
        raise UsageError(f"{source} is a store already; use --to-hf, --to-orbax or --verify")
    config = load_config(source)
    task = {"to": "store", "dtype": dtype, "from": fingerprint(source)}
    with (
        open_checkpoint(source, config) as checkpoint,
        WorkDirectory(destination, task) as work,
    ):
        _check_space(checkpoint, config, work, dtype)
        progress.stage("converting", checkpoint.nbytes)
        writer = _Writer(work, dtype)
        shards: dict[str, StoredFile] = {}
        files = copy_side_files(source, work.content)
        if isinstance(checkpoint, HFCheckpoint):
            shards = _store_shards(checkpoint, config, writer, progress)
            files |= keep_layout(checkpoint, work.content)
        else:
            _store_arrays(checkpoint, config, writer, progress)
        stored = {entry.array: _stored(work.done[entry.array]) for entry in arrays(config)}
        manifest = Manifest(stored, files, Source(kind, dtype, shards))
        write_synced(work.content / MANIFEST_NAME, encode(manifest))
        work.publish()


def fingerprint(source: Path) -> list[list[Any]]:
    """Names, sizes and times of change of the files that hold the weights and the config."""
    kind = kind_of(source)
    match kind:
        case "store":
            paths = [source / MANIFEST_NAME]
        case "orbax":
            paths = [path for path in source.rglob("*") if path.is_file()]
        case _:
            paths = [*source.glob("*.safetensors"), source / INDEX_NAME, source / "config.json"]
    found = []
    for path in sorted(path for path in paths if path.exists()):
        status = path.stat()
        found.append([str(path.relative_to(source)), status.st_size, status.st_mtime_ns])
    return found


def copy_side_files(source: Path, destination: Path) -> dict[str, StoredFile]:
    """Copy config, tokenizer, processor and chat template durably; return what was copied."""
    copied = {}
    for name in SIDE_FILES:
        if (source / name).exists():
            content = read_small(source / name)
            write_synced(destination / name, content)
            copied[name] = StoredFile(len(content), sha256(content))
    return copied


def cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`values` as `dtype`; themselves if they have it already.

    Raises:
        WeightError: if a finite value becomes infinite.
    """
    if values.dtype == dtype:
        return values
    result = aligned_empty(values.shape, dtype)
    rows = max(1, PIECE_BYTES * len(values) // values.nbytes)
    for first in range(0, len(values), rows):
        part = values[first : first + rows]
        with np.errstate(over="ignore"):
            result[first : first + rows] = part.astype(dtype)
        if not np.array_equal(np.isfinite(part), np.isfinite(result[first : first + rows])):
            raise WeightError(
                f"array {name!r} has values beyond the range of {dtype.name}; "
                "choose another --dtype"
            )
    return result


def needed_space(path: Path, nbytes: int) -> None:
    """Whether the file system of `path` has `nbytes` left for us.

    Raises:
        StorageError: if not.
    """
    with storage_errors(f"cannot look at {path}"):
        status = os.statvfs(path)
    free = status.f_bavail * status.f_frsize
    if free < nbytes:
        raise StorageError(
            f"{path} needs {nbytes:,} B more, and its file system has {free:,} B free; "
            "free some space or choose another directory, then run the same command again"
        )


def _check_space(checkpoint: Checkpoint, config: Config, work: WorkDirectory, dtype: str) -> None:
    nbytes = 0
    for entry in arrays(config):
        if entry.array not in work.done:
            wanted = checkpoint.dtype_of(entry).name if dtype == "keep" else dtype
            sizes = chunk_files(StoredArray(wanted, entry.shape, ""))
            # A file occupies whole blocks; zarr.json one, and its directory one.
            nbytes += sum(-(-size // 4096) * 4096 for size in sizes.values()) + 8192
    needed_space(work.content, nbytes)


def _store_shards(
    checkpoint: HFCheckpoint, config: Config, writer: "_Writer", progress: Progress
) -> dict[str, StoredFile]:
    """Store all arrays in the order of the files' bytes; return the digests of the files."""
    homes: dict[int, list[Entry]] = {number: [] for number in range(len(checkpoint.shards))}
    for entry in sorted(arrays(config), key=checkpoint.place_of):
        homes[checkpoint.place_of(entry)[0]].append(entry)
    digests = {}
    for number, shard in enumerate(checkpoint.shards):
        name = f"shard {shard.path.name}"
        if name in writer.work.done and all(map(writer.has, homes[number])):
            progress.advance(shard.nbytes - len(shard.header.raw))
        else:
            digest = hashlib.sha256(shard.header.raw)
            for entry in homes[number]:
                stored = checkpoint.read_stored(entry)
                for piece in pieces(bytes_of(stored)):
                    digest.update(piece)
                if not writer.has(entry):
                    writer.put(entry, checkpoint.orient(entry, stored))
                progress.advance(stored.nbytes)
            record = StoredFile(shard.nbytes, digest.hexdigest())
            writer.flush()
            writer.work.note({name: dataclasses.asdict(record)})
        digests[shard.path.name] = StoredFile(**writer.work.done[name])
    return digests


def _store_arrays(
    checkpoint: Checkpoint, config: Config, writer: "_Writer", progress: Progress
) -> None:
    for entry in arrays(config):
        if not writer.has(entry):
            writer.put(entry, checkpoint.read(entry))
        progress.advance(int(np.prod(entry.shape)) * checkpoint.dtype_of(entry).itemsize)
    writer.flush()


class _Writer:
    """Writes arrays; makes them durable and notes them a batch at a time."""

    def __init__(self, work: WorkDirectory, dtype: str) -> None:
        self.work = work
        self._dtype = dtype
        self._folder = work.content / ARRAYS_NAME
        self._batch: dict[str, StoredArray] = {}

    def has(self, entry: Entry) -> bool:
        """Whether the array was noted, and its files have the right names and sizes."""
        record = self.work.done.get(entry.array)
        if record is None:
            return False
        try:
            check_array_files(self._folder, entry.array, _stored(record))
        except (WeightError, StorageError):
            return False
        return True

    def put(self, entry: Entry, values: np.ndarray) -> None:
        """Write an array in the wanted dtype."""
        dtype = values.dtype if self._dtype == "keep" else DTYPES[self._dtype]
        record = write_array(self._folder, entry.array, cast(values, dtype, entry.array))
        self._batch[entry.array] = record
        nbytes = sum(array.nbytes for array in self._batch.values())
        if len(self._batch) >= BATCH_ARRAYS or nbytes >= BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Make durable and note what was put since the last time."""
        if self._batch:
            sync_arrays(self._folder, self._batch)
            self.work.note({n: dataclasses.asdict(array) for n, array in self._batch.items()})
            self._batch = {}


def _stored(record: dict[str, Any]) -> StoredArray:
    return StoredArray(record["dtype"], tuple(record["shape"]), record["sha256"])
