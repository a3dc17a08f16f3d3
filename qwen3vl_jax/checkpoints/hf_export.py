"""Back to Hugging Face: safetensors files from a store or an Orbax checkpoint.

Where the layout of the original is known every file gets its old bytes, and its SHA-256 is
compared with the one of the original before the destination appears. An encoded store gives what
its arrays decode to, in that layout; the encoded head of a tied model is left out, as its table is
the head again.
"""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from qwen3vl_jax.checkpoints.conversion import Progress, copy_side_files, fingerprint, needed_space
from qwen3vl_jax.checkpoints.files import (
    bytes_of,
    pieces,
    storage_errors,
    sync_directory,
    write_synced,
)
from qwen3vl_jax.checkpoints.hf_checkpoint import INDEX_NAME, transposed
from qwen3vl_jax.checkpoints.hf_layout import Layout, layout_of
from qwen3vl_jax.checkpoints.manifest import StoredFile
from qwen3vl_jax.checkpoints.opening import Checkpoint, kind_of, open_checkpoint
from qwen3vl_jax.checkpoints.safetensors_file import Header
from qwen3vl_jax.checkpoints.work_directory import WorkDirectory
from qwen3vl_jax.config import load_config
from qwen3vl_jax.errors import UsageError, WeightError
from qwen3vl_jax.weights import Entry, arrays


def to_hf(source: Path, destination: Path, *, progress: Progress) -> None:
    """Write a Hugging Face directory at `destination` from a store or an Orbax checkpoint.

    Raises:
        UsageError: if `destination` exists, or the source is such a directory already.
        WeightError: if the source is damaged, or a file differs from the original.
        StorageError: if there is too little space, or the system refuses.
    """
    if kind_of(source) == "huggingface":
        raise UsageError(f"{source} is a Hugging Face directory already; leave out --to-hf")
    config = load_config(source)
    task = {"to": "huggingface", "from": fingerprint(source)}
    with (
        open_checkpoint(source, config) as checkpoint,
        WorkDirectory(destination, task) as work,
    ):
        layout = layout_of(checkpoint, config)
        entries: dict[str, list[Entry]] = {}
        for entry in arrays(config):
            entries.setdefault(entry.hf_name, []).append(entry)
        done = {name for name in layout.headers if f"shard {name}" in work.done}
        sizes = {name: _file_bytes(header) for name, header in layout.headers.items()}
        needed_space(work.content, sum(sizes[name] for name in sizes.keys() - done))
        progress.stage("writing safetensors", sum(sizes.values()))
        for name in layout.headers:
            if name in done:
                progress.advance(sizes[name])
                continue
            parts = _parts(checkpoint, layout.headers[name], layout.released, entries)
            record = _write_shard(work.content / name, parts, progress)
            _check_original(name, record, layout)
            sync_directory(work.content)
            work.note({f"shard {name}": dataclasses.asdict(record)})
        if layout.index is not None:
            write_synced(work.content / INDEX_NAME, layout.index)
        copy_side_files(source, work.content)
        work.publish()


def _file_bytes(header: Header) -> int:
    return max((tensor.stop for tensor in header.tensors), default=len(header.raw))


def _parts(
    checkpoint: Checkpoint,
    header: Header,
    released: frozenset[str],
    entries: dict[str, list[Entry]],
) -> Iterator[memoryview]:
    """The bytes of one file, in order."""
    yield memoryview(header.raw)
    for tensor in header.tensors:
        for entry in entries[tensor.name]:
            values = checkpoint.read(entry)
            yield bytes_of(transposed(values) if tensor.name in released else values)


def _write_shard(path: Path, parts: Iterator[memoryview], progress: Progress) -> StoredFile:
    digest = hashlib.sha256()
    size = 0
    with storage_errors(f"cannot write {path}"), open(path, "wb", buffering=0) as file:
        for piece in itertools.chain.from_iterable(map(pieces, parts)):
            digest.update(piece)
            size += len(piece)
            while piece:
                count = file.write(piece)
                progress.advance(count)
                piece = piece[count:]
        os.fsync(file.fileno())
    return StoredFile(size, digest.hexdigest())


def _check_original(name: str, record: StoredFile, layout: Layout) -> None:
    original = layout.originals.get(name, record)
    if record != original:
        raise WeightError(
            f"{name} came out with SHA-256 {record.sha256}, the original had {original.sha256}: "
            "the store is damaged; convert the original again"
        )
