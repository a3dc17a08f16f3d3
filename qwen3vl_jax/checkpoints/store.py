"""Our store: one zarr array per weight, in checksummed chunks of at most 4 MiB.

It is also the disk tier of the model: any array, or any rows of one, is read alone.

    DIR/manifest.json   config.json   tokenizer.json   ...
    DIR/arrays/<path>/zarr.json   c.0.0   c.1.0   ...

A chunk is raw little-endian values and their crc32c, which tensorstore checks at every read.
Encoded arrays are arrays of bytes like any other; `read` decodes them, and `extents` says where
they lie.
"""

from pathlib import Path

import numpy as np

from qwen3vl_jax.checkpoints.encodings import as_encoded, fault_of, unpacked
from qwen3vl_jax.checkpoints.extents import Extent
from qwen3vl_jax.checkpoints.files import DTYPES, read_small, sha256
from qwen3vl_jax.checkpoints.manifest import (
    MANIFEST_BYTES,
    MANIFEST_NAME,
    Manifest,
    chunk_files,
    decode,
)
from qwen3vl_jax.checkpoints.zarr_array import check_array_files, read_rows
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import UsageError, WeightError
from qwen3vl_jax.weights import Entry, arrays

ARRAYS_NAME = "arrays"


class Store:
    """A store opened for reading. It holds no files open between reads."""

    def __init__(self, directory: Path, config: Config) -> None:
        """Read the manifest and compare it with the model.

        Raises:
            WeightError: if the manifest is damaged, or describes another model than `config`.
            StorageError: if the system refuses.
        """
        self.directory = directory
        label = str(directory / MANIFEST_NAME)
        self.manifest = decode(read_small(directory / MANIFEST_NAME, MANIFEST_BYTES), label)
        self.encodings = self.manifest.encodings
        check_arrays(self.manifest, config, label)
        check_file(directory, "config.json", self.manifest)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.manifest.arrays.values())

    def dtype_of(self, entry: Entry) -> np.dtype:
        """The dtype of the values, decoded."""
        return DTYPES[self.manifest.arrays[entry.array].raw_dtype]

    def read(self, entry: Entry) -> np.ndarray:
        """One array, as `opening.Checkpoint.read` says: decoded, if it is encoded."""
        encoding, stored = self.encodings.get(entry.array), self.read_packed(entry)
        return stored if encoding is None else unpacked(stored, encoding.part(entry.rows))

    def read_packed(self, entry: Entry) -> np.ndarray:
        """One array as it is stored."""
        array = self.manifest.arrays[entry.array]
        first, stop = entry.rows or (0, array.shape[0])
        return read_rows(self.directory / ARRAYS_NAME, entry.array, array, first, stop)

    def extents(self, entry: Entry) -> tuple[Extent, ...]:
        """The chunks that hold an array. They must begin where its rows do.

        Raises:
            UsageError: the rows of `entry` begin inside a chunk.
            WeightError: a file is not what the manifest says.
        """
        array = self.manifest.arrays[entry.array]
        check_array_files(self.directory / ARRAYS_NAME, entry.array, array)
        folder = self.directory / ARRAYS_NAME / entry.array
        rows = array.chunk_rows
        row_bytes = array.nbytes // array.shape[0]
        first, stop = entry.rows or (0, array.shape[0])
        if first % rows:
            raise UsageError(f"{entry.path}: row {first} is inside a chunk of {rows} rows")
        names = list(chunk_files(array))[first // rows : -(-stop // rows)]
        left = [min(rows, stop - start) for start in range(first, stop, rows)]
        return tuple(
            Extent(folder / name, 0, rows * row_bytes, used * row_bytes, checksum=True)
            for name, used in zip(names, left, strict=True)
        )

    def close(self) -> None:
        """Nothing is held open."""

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_arrays(manifest: Manifest, config: Config, label: str) -> None:
    """Whether a manifest lists exactly the arrays of the model.

    Raises:
        WeightError: naming the first array that is missing, unknown or misshapen.
    """
    encodings = manifest.encodings
    wanted = {entry.array: entry.shape for entry in arrays(as_encoded(config, encodings))}
    for name in sorted(wanted.keys() ^ manifest.arrays.keys()):
        fault = "misses array" if name in wanted else "holds an unknown array"
        raise WeightError(f"{label} {fault} {name!r}; it belongs to another config.json")
    for name, shape in wanted.items():
        found = manifest.arrays[name].raw_shape
        if found != shape:
            raise WeightError(
                f"{label}: {name!r} is {list(found)}, but config.json wants {list(shape)}; "
                "it belongs to another config.json"
            )
    wrong = fault_of(encodings, config)
    if wrong is not None:
        raise WeightError(f"{label}: {wrong}; convert the model again")


def check_file(directory: Path, name: str, manifest: Manifest) -> bytes:
    """The content of a file beside the arrays.

    Raises:
        WeightError: if it is not the one that the manifest knows.
    """
    content = read_small(directory / name, MANIFEST_BYTES)
    wanted = manifest.files.get(name)
    if wanted is None or (len(content), sha256(content)) != (wanted.nbytes, wanted.sha256):
        raise WeightError(
            f"{directory / name} is not the file that {MANIFEST_NAME} knows: it was changed or "
            "is damaged; convert the model again"
        )
    return content
