"""How the tensors of a checkpoint lie in safetensors files.

A store that was made from such files keeps their headers, so the original layout is known to the
byte. Otherwise the model is cut into files of at most 5 GB, in the expert layout of the
transformers version that config.json names.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from qwen3vl_jax.checkpoints.files import (
    DTYPES,
    read_small,
    sha256,
    storage_errors,
    sync_directory,
    write_synced,
)
from qwen3vl_jax.checkpoints.hf_checkpoint import (
    INDEX_NAME,
    SINGLE_NAME,
    HFCheckpoint,
    expert_layouts,
)
from qwen3vl_jax.checkpoints.manifest import StoredFile
from qwen3vl_jax.checkpoints.opening import Checkpoint
from qwen3vl_jax.checkpoints.safetensors_file import (
    FILE_DTYPES,
    HEADER_BYTES,
    INDEX_BYTES,
    Header,
    parse_header,
)
from qwen3vl_jax.checkpoints.store import Store, check_file
from qwen3vl_jax.config import Config
from qwen3vl_jax.weights import arrays, hf_shapes

SOURCE_NAME = "source"
HEADER_SUFFIX = ".header"
SHARD_BYTES = 5 * 10**9
_NAME_OF = {dtype: name for name, dtype in FILE_DTYPES.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that a new file shall hold, with the shape it has there."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """All files of a checkpoint: name -> header.

    `released` names the tensors that lie as [E, in, out]; `originals` has the SHA-256 of the
    files, where they are known; `index` is the content of the index, if there is one.
    """

    headers: dict[str, Header]
    released: frozenset[str]
    originals: dict[str, StoredFile]
    index: bytes | None


def keep_layout(checkpoint: HFCheckpoint, content: Path) -> dict[str, StoredFile]:
    """Keep headers and index of a source durably in the folder `content` of a store."""
    kept = {shard.path.name + HEADER_SUFFIX: shard.header.raw for shard in checkpoint.shards}
    index = checkpoint.directory / INDEX_NAME
    if index.exists():
        kept[INDEX_NAME] = read_small(index, INDEX_BYTES)
    return _keep(kept, content)


def pass_layout_on(store: Store, content: Path) -> dict[str, StoredFile]:
    """Keep durably, in the folder `content` of another store, what a store knows of its source."""
    prefix = f"{SOURCE_NAME}/"
    names = [name for name in store.manifest.files if name.startswith(prefix)]
    kept = {name.removeprefix(prefix): _kept(store, name.removeprefix(prefix)) for name in names}
    return _keep(kept, content) if kept else {}


def _keep(kept: dict[str, bytes], content: Path) -> dict[str, StoredFile]:
    folder = content / SOURCE_NAME
    with storage_errors(f"cannot create {folder}"):
        folder.mkdir(exist_ok=True)
    for name, raw in kept.items():
        write_synced(folder / name, raw)
    sync_directory(folder)
    return {
        f"{SOURCE_NAME}/{name}": StoredFile(len(raw), sha256(raw)) for name, raw in kept.items()
    }


def layout_of(checkpoint: Checkpoint, config: Config) -> Layout:
    """The layout to write: the original one, where it is known.

    Raises:
        WeightError: if what a store kept of its source is damaged.
    """
    if not isinstance(checkpoint, Store) or not checkpoint.manifest.source.shards:
        return _new_layout(checkpoint, config)
    source = checkpoint.manifest.source
    headers = {
        name: parse_header(_kept(checkpoint, name + HEADER_SUFFIX), original.nbytes, name)
        for name, original in source.shards.items()
    }
    shapes = {tensor.name: tensor.shape for header in headers.values() for tensor in header.tensors}
    released = expert_layouts(shapes, config, str(checkpoint.directory))
    has_index = f"{SOURCE_NAME}/{INDEX_NAME}" in checkpoint.manifest.files
    if source.dtype == "keep":
        index = _kept(checkpoint, INDEX_NAME) if has_index else None
        # What was encoded and decoded again is not what it was.
        originals = {} if checkpoint.encodings else dict(source.shards)
        return Layout(headers, released, originals, index)
    dtype = DTYPES[source.dtype]
    headers = {
        name: new_header(Planned(tensor.name, dtype, tensor.shape) for tensor in header.tensors)
        for name, header in headers.items()
    }
    return Layout(headers, released, {}, _index(headers) if has_index else None)


def new_header(tensors: Iterable[Planned]) -> Header:
    """A header for these tensors; wider dtypes come first, so that all values are aligned."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize):
        stop = start + tensor.nbytes
        fields[tensor.name] = {
            "dtype": _NAME_OF[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    body = json.dumps(fields, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    assert len(body) <= HEADER_BYTES, len(body)
    raw = len(body).to_bytes(8, "little") + body
    return parse_header(raw, len(raw) + start, "new header")


def _kept(store: Store, name: str) -> bytes:
    return check_file(store.directory, f"{SOURCE_NAME}/{name}", store.manifest)


def _new_layout(checkpoint: Checkpoint, config: Config) -> Layout:
    dtypes = {entry.hf_name: checkpoint.dtype_of(entry) for entry in arrays(config)}
    major = config.transformers_version.partition(".")[0]
    # The reader takes square experts by the same rule, so this must not depend on anything else.
    old = major.isdecimal() and int(major) < 5
    released = frozenset(n for n in hf_shapes(config) if old and ".mlp.experts." in n)
    groups: list[list[Planned]] = [[]]
    for name, shape in hf_shapes(config).items():
        stored = (shape[0], shape[2], shape[1]) if name in released else shape
        tensor = Planned(name, dtypes[name], stored)
        filled = sum(other.nbytes for other in groups[-1])
        if groups[-1] and filled + tensor.nbytes > SHARD_BYTES:
            groups.append([])
        groups[-1].append(tensor)
    count = len(groups)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = [SINGLE_NAME]
    headers = {name: new_header(group) for name, group in zip(names, groups, strict=True)}
    return Layout(headers, released, {}, _index(headers) if count > 1 else None)


def _index(headers: dict[str, Header]) -> bytes:
    tensors = [(tensor, name) for name, header in headers.items() for tensor in header.tensors]
    total = sum(tensor.stop - tensor.start for tensor, _ in tensors)
    homes = {tensor.name: name for tensor, name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": homes}
    return json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"
