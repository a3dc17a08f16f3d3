"""Changing the format of a checkpoint: Hugging Face, Orbax or a raw store to our store.

One array is in memory at a time, and what it becomes. What is finished is noted in a journal, so
the same call continues after a kill; the destination appears only when it is complete and durable.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from memsched.codecs.choice import Choice
from qwen3vl_jax.checkpoints.array_writer import ArrayWriter, stored_array
from qwen3vl_jax.checkpoints.encodings import (
    Encodings,
    as_encoded,
    encodings_of,
    origin,
    origins,
)
from qwen3vl_jax.checkpoints.files import (
    DTYPES,
    bytes_of,
    pieces,
    read_small,
    sha256,
    storage_errors,
    write_synced,
)
from qwen3vl_jax.checkpoints.hf_checkpoint import INDEX_NAME, HFCheckpoint
from qwen3vl_jax.checkpoints.hf_layout import keep_layout, pass_layout_on
from qwen3vl_jax.checkpoints.input_squares import Inputs, measured
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
from qwen3vl_jax.checkpoints.selection import Selection, matrix_bytes, select
from qwen3vl_jax.checkpoints.store import Store, check_file
from qwen3vl_jax.checkpoints.work_directory import WorkDirectory
from qwen3vl_jax.config import Config, load_config
from qwen3vl_jax.errors import StorageError, UsageError
from qwen3vl_jax.weights import Entry, arrays

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


def to_store(
    source: Path,
    destination: Path,
    *,
    dtype: str,
    progress: Progress,
    codecs: Mapping[str, str] | None = None,
    selection: Selection | None = None,
    inputs: Inputs | None = None,
) -> Choice | None:
    """Write our store at `destination` from a Hugging Face or Orbax checkpoint, or a raw store.

    Args:
        dtype: "keep", or the name of the dtype that all arrays get.
        codecs: for paths of arrays the codec that each is encoded with; those that would not
            become smaller stay raw.
        selection: in place of `codecs`, by what they are chosen.
        inputs: what the codes of int8 and int4 are fitted to; None: all columns count the same.

    Returns:
        What was chosen by a selection.

    Raises:
        UsageError: if `destination` exists, or the source is such a store already.
        WeightError: if the source is damaged, or not the model of its config.json.
        memsched.errors.CodecError: an array to be encoded has NaN or infinite numbers.
        StorageError: if there is too little space, or the system refuses.
    """
    config = load_config(source)
    if kind_of(source) == "store" and not codecs and selection is None:
        raise UsageError(
            f"{source} is a store already; use --codec, --to-hf, --to-orbax or --verify"
        )
    with open_checkpoint(source, config) as checkpoint:
        if checkpoint.encodings:
            raise UsageError(
                f"{source} is an encoded store, and nothing is encoded twice; convert the original"
            )
        dtypes = _dtypes(checkpoint, config, dtype)
        encodings: Encodings = {} if codecs is None else encodings_of(config, codecs, dtypes)
        task = {"to": "store", "dtype": dtype, "from": fingerprint(source)}
        task |= _task(encodings, selection, inputs)
        with WorkDirectory(destination, task) as work:
            selected = None
            if selection is not None:
                progress.stage("measuring", matrix_bytes(config, dtypes))
                selected = select(selection, checkpoint, config, dtypes, work, progress.advance)
                encodings = selected.encodings
            fits = measured(inputs, encodings, work)
            needed_space(work.content, store_bytes(config, dtypes, encodings, work.done))
            progress.stage("converting", checkpoint.nbytes)
            files = _copy_files(checkpoint, source, work.content) | fits.files
            files |= _write_files(work.content, selected.files if selected is not None else {})
            writer = ArrayWriter(work, dtype, encodings, fits.squares)
            kept = _store_all(checkpoint, config, writer, progress)
            names = (entry.array for entry in arrays(as_encoded(config, encodings)))
            stored = {name: stored_array(work.done[name]) for name in names}
            write_synced(work.content / MANIFEST_NAME, encode(Manifest(stored, files, kept)))
            work.publish()
    return None if selected is None else selected.choice


def _task(
    encodings: Encodings, selection: Selection | None, inputs: Inputs | None
) -> dict[str, str]:
    """What tells work with these codecs, chosen or given, and these inputs from other work."""
    names = sorted((name, encoding.codec) for name, encoding in encodings.items())
    task = {"codecs": sha256(repr(names).encode())} if names else {}
    task |= {} if selection is None else selection.task
    return task if inputs is None else task | {"inputs": inputs.digest}


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


def _write_files(destination: Path, files: Mapping[str, bytes]) -> dict[str, StoredFile]:
    for name, content in files.items():
        write_synced(destination / name, content)
    return {name: StoredFile(len(content), sha256(content)) for name, content in files.items()}


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


def _dtypes(checkpoint: Checkpoint, config: Config, dtype: str) -> Callable[[Entry], np.dtype]:
    """The dtypes that arrays have before they are encoded."""

    def dtype_of(entry: Entry) -> np.dtype:
        return checkpoint.dtype_of(origin(entry, config)) if dtype == "keep" else DTYPES[dtype]

    return dtype_of


def store_bytes(
    config: Config,
    dtype_of: Callable[[Entry], np.dtype],
    encodings: Encodings,
    done: Container[str] = (),
) -> int:
    """What a store takes on disk, but for the arrays that are done; side files not counted."""
    nbytes = 0
    for entry in arrays(as_encoded(config, encodings)):
        if entry.array not in done:
            stored = StoredArray(dtype_of(entry).name, entry.shape, "")
            if encoding := encodings.get(entry.array):
                shape, packed_dtype = encoding.packed
                stored = StoredArray(packed_dtype, shape, "", encoding)
            sizes = chunk_files(stored)
            # A file occupies whole blocks; zarr.json one, and its directory one.
            nbytes += sum(-(-size // 4096) * 4096 for size in sizes.values()) + 8192
    return nbytes


def _copy_files(checkpoint: Checkpoint, source: Path, content: Path) -> dict[str, StoredFile]:
    """Copy what lies beside the arrays, and the layout of the original where it is known."""
    if isinstance(checkpoint, Store):
        for name in checkpoint.manifest.files:
            check_file(source, name, checkpoint.manifest)
        return copy_side_files(source, content) | pass_layout_on(checkpoint, content)
    files = copy_side_files(source, content)
    return (
        files | keep_layout(checkpoint, content) if isinstance(checkpoint, HFCheckpoint) else files
    )


def _store_all(
    checkpoint: Checkpoint, config: Config, writer: ArrayWriter, progress: Progress
) -> Source:
    """Store all arrays; returns where they came from."""
    match checkpoint:
        case HFCheckpoint():
            shards = _store_shards(checkpoint, config, writer, progress)
            return Source("huggingface", writer.dtype, shards)
        case Store():
            _store_arrays(checkpoint, config, writer, progress)
            first = checkpoint.manifest.source
            return (
                first if writer.dtype == "keep" else dataclasses.replace(first, dtype=writer.dtype)
            )
        case _:
            _store_arrays(checkpoint, config, writer, progress)
            return Source("orbax", writer.dtype, {})


def _store_shards(
    checkpoint: HFCheckpoint, config: Config, writer: ArrayWriter, progress: Progress
) -> dict[str, StoredFile]:
    """Store all arrays in the order of the files' bytes; return the digests of the files."""
    made = origins(config, writer.encodings)
    homes: dict[int, list[Entry]] = {number: [] for number in range(len(checkpoint.shards))}
    for entry in sorted(made, key=checkpoint.place_of):
        homes[checkpoint.place_of(entry)[0]].append(entry)
    digests = {}
    for number, shard in enumerate(checkpoint.shards):
        name = f"shard {shard.path.name}"
        if name in writer.work.done and not any(writer.missing(made[e]) for e in homes[number]):
            progress.advance(shard.nbytes - len(shard.header.raw))
        else:
            digest = hashlib.sha256(shard.header.raw)
            for entry in homes[number]:
                stored = checkpoint.read_stored(entry)
                for piece in pieces(bytes_of(stored)):
                    digest.update(piece)
                if missing := writer.missing(made[entry]):
                    writer.put(missing, checkpoint.orient(entry, stored))
                progress.advance(stored.nbytes)
            record = StoredFile(shard.nbytes, digest.hexdigest())
            writer.flush()
            writer.work.note({name: dataclasses.asdict(record)})
        digests[shard.path.name] = StoredFile(**writer.work.done[name])
    return digests


def _store_arrays(
    checkpoint: Checkpoint, config: Config, writer: ArrayWriter, progress: Progress
) -> None:
    for entry, made in origins(config, writer.encodings).items():
        if missing := writer.missing(made):
            writer.put(missing, checkpoint.read(entry))
        progress.advance(int(np.prod(entry.shape)) * checkpoint.dtype_of(entry).itemsize)
    writer.flush()
