"""The manifest of a store: what it must hold, to the byte.

manifest.json is written last, in one spelling only, and carries a digest of itself: whatever
changes in it is noticed. It implies every zarr.json, so tensorstore opens nothing on trust.

    {"format": "qwen3vl-store", "version": 1, "chunk_bytes": 4194304,
     "arrays": {path: {"dtype", "shape", "sha256"}},      sha256 of the values, row by row
     "files": {name: {"nbytes", "sha256"}},               everything else in the directory
     "source": {"kind", "dtype", "shards": {name: {"nbytes", "sha256"}}},
     "digest": sha256 of all of the above}

Version 2 is for stores with encoded arrays. Those also have "encoding": {"codec", "shape",
"dtype"}, the codec's name and what the values stand for; the array's own shape and dtype follow
from these.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from qwen3vl_jax.checkpoints.encodings import Encoding
from qwen3vl_jax.checkpoints.files import DTYPES, STORED_DTYPES, sha256
from qwen3vl_jax.checkpoints.safetensors_file import strict_json
from qwen3vl_jax.errors import WeightError

FORMAT = "qwen3vl-store"
VERSIONS = (1, 2)  # without and with encoded arrays
MANIFEST_NAME = "manifest.json"
ZARR_NAME = "zarr.json"
CHUNK_BYTES = 4 * 2**20
MANIFEST_BYTES = 512 * 2**20
KINDS = ("huggingface", "orbax")
DTYPE_CHOICES = ("keep", *DTYPES)
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Plain names, or plain names below source/.
_FILE_NAME = re.compile(r"(source/)?[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")


@dataclasses.dataclass(frozen=True, slots=True)
class StoredArray:
    """One array: dtype name, shape, and SHA-256 of its values in row-major order."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    encoding: Encoding | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        size = STORED_DTYPES[self.dtype].itemsize
        for length in self.shape:
            size *= length
        return size

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """The shape of the array that the values stand for."""
        return self.shape if self.encoding is None else self.encoding.shape

    @property
    def raw_dtype(self) -> str:
        """And its dtype."""
        return self.dtype if self.encoding is None else self.encoding.dtype

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk. Encoded rows are cut where raw ones are: blocks begin with a chunk."""
        if self.encoding is not None and self.encoding.keeps_rows:
            return chunk_rows(self.raw_shape, DTYPES[self.raw_dtype].itemsize)
        return chunk_rows(self.shape, STORED_DTYPES[self.dtype].itemsize)

    def as_dict(self) -> dict[str, Any]:
        """As a manifest has it."""
        fields = dataclasses.asdict(self)
        if self.encoding is None:
            del fields["encoding"]
        return fields


@dataclasses.dataclass(frozen=True, slots=True)
class StoredFile:
    """Size and SHA-256 of a file."""

    nbytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where the weights came from: the format, the --dtype, and the original files, if any."""

    kind: str
    dtype: str
    shards: Mapping[str, StoredFile]


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """Everything in a store."""

    arrays: Mapping[str, StoredArray]
    files: Mapping[str, StoredFile]
    source: Source

    @property
    def encodings(self) -> dict[str, Encoding]:
        """Those of the arrays that have one."""
        found = ((name, array.encoding) for name, array in self.arrays.items())
        return {name: encoding for name, encoding in found if encoding is not None}


def encode(manifest: Manifest) -> bytes:
    """The one spelling of a manifest."""
    body = {
        "format": FORMAT,
        "version": 2 if manifest.encodings else 1,
        "chunk_bytes": CHUNK_BYTES,
        "arrays": {name: array.as_dict() for name, array in manifest.arrays.items()},
        "files": {name: dataclasses.asdict(file) for name, file in manifest.files.items()},
        "source": dataclasses.asdict(manifest.source),
    }
    return _spell(body | {"digest": sha256(_spell(body))})


def decode(raw: bytes, label: str) -> Manifest:
    """Read and check a manifest.

    Raises:
        WeightError: if it is of another format or version, malformed, or changed.
    """
    body = strict_json(raw, label)
    if body.get("format") != FORMAT:
        raise WeightError(f"{label} is no manifest of ours; convert the model again")
    if body.get("version") not in VERSIONS or body.get("chunk_bytes") != CHUNK_BYTES:
        raise WeightError(
            f"{label} has version {body.get('version')!r} and chunks of "
            f"{body.get('chunk_bytes')!r} B, wanted 1 or 2 and {CHUNK_BYTES}; "
            "convert the model again"
        )
    digest = body.pop("digest", None)
    if digest != sha256(_spell(body)) or _spell(body | {"digest": digest}) != raw:
        raise WeightError(f"{label} is damaged: it does not match its digest; convert again")
    try:
        return _manifest(body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightError(f"{label} is malformed ({error!r:.100}); convert again") from None


def chunk_rows(shape: tuple[int, ...], itemsize: int) -> int:
    """Whole rows per chunk: as few chunks of at most 4 MiB as possible, of equal size."""
    row_bytes = itemsize
    for length in shape[1:]:
        row_bytes *= length
    most = max(1, CHUNK_BYTES // row_bytes)
    chunks = -(-shape[0] // most)
    return -(-shape[0] // chunks)


def zarr_metadata(array: StoredArray) -> dict[str, Any]:
    """What tensorstore is told about an array."""
    chunk = [array.chunk_rows, *array.shape[1:]]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(array.shape),
        "data_type": array.dtype,
        "fill_value": 0 if array.dtype == "uint8" else 0.0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        # c.0.0 and not c/0/0: all chunks of an array lie in one directory.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }


# Rows of the embedding table are read for every token, and indented JSON leaves cycles to gc.
@functools.lru_cache(maxsize=1024)
def zarr_json(array: StoredArray) -> bytes:
    """The exact bytes of an array's zarr.json."""
    return _spell(zarr_metadata(array))


def chunk_files(array: StoredArray) -> dict[str, int]:
    """Name -> size of the chunk files of an array. Every chunk is full; 4 B are its crc32c."""
    rows = array.chunk_rows
    size = array.nbytes // array.shape[0] * rows + 4
    zeros = ".0" * (len(array.shape) - 1)
    return {f"c.{chunk}{zeros}": size for chunk in range(-(-array.shape[0] // rows))}


def _spell(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode() + b"\n"


def _manifest(body: dict[str, Any]) -> Manifest:
    if set(body) != {"format", "version", "chunk_bytes", "arrays", "files", "source"}:
        raise ValueError("unknown or missing keys")
    source = body["source"]
    if source["kind"] not in KINDS or source["dtype"] not in DTYPE_CHOICES or len(source) != 3:
        raise ValueError("unknown source")
    arrays = {name: _array(entry) for name, entry in body["arrays"].items()}
    if any(array.encoding for array in arrays.values()) != (body["version"] == 2):
        raise ValueError("encoded arrays and the version do not go together")
    return Manifest(
        arrays,
        {name: _file(name, entry) for name, entry in body["files"].items()},
        Source(
            source["kind"],
            source["dtype"],
            {name: _file(name, entry) for name, entry in source["shards"].items()},
        ),
    )


def _array(entry: dict[str, Any]) -> StoredArray:
    shape, encoding = _shape(entry["shape"]), None
    if "encoding" in entry:
        encoding = _encoding(entry["encoding"])
        if encoding.packed != (shape, entry["dtype"]):
            raise ValueError("shape or dtype does not follow from the encoding")
    elif entry["dtype"] not in DTYPES:
        raise ValueError("bad dtype")
    if not _SHA256.fullmatch(entry["sha256"]) or len(entry) != 3 + (encoding is not None):
        raise ValueError("bad array")
    return StoredArray(entry["dtype"], shape, entry["sha256"], encoding)


def _encoding(entry: dict[str, Any]) -> Encoding:
    if len(entry) != 3 or entry["dtype"] not in DTYPES or not isinstance(entry["codec"], str):
        raise ValueError("bad encoding")
    encoding = Encoding(entry["codec"], _shape(entry["shape"]), entry["dtype"])
    if encoding.format.name != encoding.codec or not encoding.saves:
        raise ValueError("an encoding by another name, or one that saves nothing")
    return encoding


def _shape(lengths: list[Any]) -> tuple[int, ...]:
    shape = tuple(lengths)
    if not shape or any(type(length) is not int or not 0 < length < 2**48 for length in shape):
        raise ValueError("bad shape")
    return shape


def _file(name: str, entry: dict[str, Any]) -> StoredFile:
    size = entry["nbytes"]
    if not _FILE_NAME.fullmatch(name) or not _SHA256.fullmatch(entry["sha256"]):
        raise ValueError("bad file")
    if type(size) is not int or size < 0 or len(entry) != 2:
        raise ValueError("bad file size")
    return StoredFile(size, entry["sha256"])
