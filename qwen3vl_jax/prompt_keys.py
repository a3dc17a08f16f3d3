"""What decides keys, values and features to the last bit, as digests.

Sums of floats depend on how many rows are multiplied at once, and attention on the slots of its
cache. So the unit of what is kept is what passes through the layers at once, a chunk of a prompt or
a piece of equally large pictures, and the size of the cache is part of its name.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int

from qwen3vl_jax.cache import KVCache
from qwen3vl_jax.checkpoints.files import read_into, read_small, sha256, storage_errors
from qwen3vl_jax.checkpoints.manifest import MANIFEST_BYTES, MANIFEST_NAME
from qwen3vl_jax.checkpoints.opening import kind_of
from qwen3vl_jax.frames import Piece
from qwen3vl_jax.inputs import NO_FEATURE, Part, cut, last_real
from qwen3vl_jax.network import Chunk

SAMPLES, SAMPLE_BYTES = 256, 4096  # of a weight file: every tensor of a few rows is among them


def digest(*parts: object) -> str:
    """SHA-256 of texts, numbers and arrays with their shapes and dtypes, in hexadecimal."""
    whole = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            whole.update(f"{part.dtype}{part.shape}".encode())
            whole.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        else:
            whole.update(f"{part!r};".encode())
    return whole.hexdigest()


def weights_digest(path: Path) -> str:
    """What tells the weights of a checkpoint from others, without reading all of them.

    The manifest of a store has digests of all. Of other formats, names, sizes and times of files
    count, and samples of their content.

    Raises:
        WeightError, StorageError: there is no checkpoint, or it cannot be read.
    """
    kind = kind_of(path)
    if kind == "store":
        return sha256(read_small(path / MANIFEST_NAME, MANIFEST_BYTES))
    with storage_errors(f"cannot read {path}"):
        found = path.glob("*.safetensors*") if kind == "huggingface" else path.rglob("*")
        files = sorted(file for file in found if file.is_file())
        return digest(*(_file_digest(file, str(file.relative_to(path))) for file in files))


def _file_digest(file: Path, name: str) -> str:
    # Not open_regular: a cache of downloads is full of links, and was read with care before.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        count = min(SAMPLES, -(-status.st_size // SAMPLE_BYTES))
        last = max(status.st_size - SAMPLE_BYTES, 0)
        samples = np.zeros((count, min(SAMPLE_BYTES, status.st_size)), np.uint8)
        for index, sample in enumerate(samples):
            read_into(descriptor, sample, last * index // max(count - 1, 1), file)
        return digest(name, status.st_size, status.st_mtime_ns, samples)
    finally:
        os.close(descriptor)


@dataclasses.dataclass(frozen=True, slots=True)
class Shown:
    """A piece of pictures: its key, the rows of the features that are its own, and its shapes."""

    key: str
    rows: Int[np.ndarray, "F tokens"]
    patches: int
    shapes: Piece


def shown(identity: str, piece: Piece) -> Shown:
    """The key says what pixels there are, and where they are in their frames."""
    arrays = [np.asarray(a) for a in (piece.patches, piece.rows_columns, piece.valid)]
    rows = np.asarray(piece.token_rows)
    real = rows[0] != np.iinfo(rows.dtype).max
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), piece)
    return Shown(digest("features", identity, *arrays), rows[:, real], int(arrays[2].sum()), shapes)


def chunk_keys(
    identity: str,
    cache: KVCache,
    parts: Sequence[Part],
    tokens: Chunk,
    pieces: Sequence[Shown],
) -> list[str]:
    """The key of every chunk: all tokens up to its end, and what the pictures among them show.

    Args:
        cache: empty.
        parts: the chunks.
        tokens: of the whole prompt.
        pieces: all pictures.
    """
    slots = cache.block_slots or cache.capacity
    before = digest("tokens", identity, cache.batch, slots, cache.block_slots, bool(pieces))
    keys = []
    for part in parts:
        new = cut(tokens, part.first, part.end, part.tokens)
        read = [(pieces[index].key, digest(pieces[index].rows)) for index in read_by(new, pieces)]
        here = np.where(part.ends(tokens), last_real(tokens), -1)
        arrays = (new.input_ids, new.valid, new.positions, new.feature_rows)
        before = digest(before, part.first, here, *arrays, *read)
        keys.append(before)
    return keys


def read_by(new: Chunk, pieces: Sequence[Shown]) -> list[int]:
    """Which pieces have tokens among these."""
    wanted = new.feature_rows[new.feature_rows != NO_FEATURE]
    return [index for index, piece in enumerate(pieces) if np.isin(piece.rows, wanted).any()]
