"""Writes the arrays of a store into a work directory, in another dtype or encoded if wanted."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from qwen3vl_jax.checkpoints.encodings import Encoding, Encodings, packed
from qwen3vl_jax.checkpoints.files import DTYPES, PIECE_BYTES, aligned_empty
from qwen3vl_jax.checkpoints.input_squares import Squares
from qwen3vl_jax.checkpoints.manifest import StoredArray
from qwen3vl_jax.checkpoints.store import ARRAYS_NAME
from qwen3vl_jax.checkpoints.work_directory import WorkDirectory
from qwen3vl_jax.checkpoints.zarr_array import check_array_files, sync_arrays, write_array
from qwen3vl_jax.errors import StorageError, WeightError
from qwen3vl_jax.weights import Entry

# One round of fsync is for so much; a kill loses at most this.
BATCH_BYTES = 64 * 2**20
BATCH_ARRAYS = 16


class ArrayWriter:
    """Makes arrays durable and notes them a batch at a time."""

    def __init__(
        self, work: WorkDirectory, dtype: str, encodings: Encodings, squares: Squares
    ) -> None:
        """`dtype` is what arrays get before they are encoded, or "keep"; `squares` of their inputs
        are what codes are fitted to.
        """
        self.work = work
        self.dtype = dtype
        self.encodings = encodings
        self._squares = squares
        self._folder = work.content / ARRAYS_NAME
        self._batch: dict[str, StoredArray] = {}

    def missing(self, entries: Iterable[Entry]) -> list[Entry]:
        """Those that were not noted, or whose files have not the right names and sizes."""
        return [entry for entry in entries if not self._has(entry)]

    def put(self, entries: Iterable[Entry], values: np.ndarray) -> None:
        """Write arrays that have the same values, each in its own form.

        Raises:
            WeightError: a value that the wanted dtype cannot hold.
            memsched.errors.CodecError: NaN or infinite numbers where they are to be encoded.
            StorageError: if the system refuses.
        """
        for entry in entries:
            name, encoding = entry.array, self.encodings.get(entry.array)
            dtype = values.dtype if self.dtype == "keep" else DTYPES[self.dtype]
            values = cast(values, dtype, name)
            if encoding is None:
                stored = values
            else:
                stored = packed(values, name, encoding, self._squares.get(name))
            self._batch[name] = write_array(self._folder, name, stored, encoding)
        nbytes = sum(array.nbytes for array in self._batch.values())
        if len(self._batch) >= BATCH_ARRAYS or nbytes >= BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Make durable and note what was put since the last time."""
        if self._batch:
            sync_arrays(self._folder, self._batch)
            self.work.note({name: array.as_dict() for name, array in self._batch.items()})
            self._batch = {}

    def _has(self, entry: Entry) -> bool:
        record = self.work.done.get(entry.array)
        if record is None:
            return False
        try:
            check_array_files(self._folder, entry.array, stored_array(record))
        except (WeightError, StorageError):
            return False
        return True


def stored_array(record: dict[str, Any]) -> StoredArray:
    """What a line of the journal says of an array."""
    encoding = None
    if found := record.get("encoding"):
        encoding = Encoding(found["codec"], tuple(found["shape"]), found["dtype"])
    return StoredArray(record["dtype"], tuple(record["shape"]), record["sha256"], encoding)


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
