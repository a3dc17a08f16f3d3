"""One array on disk: a zarr array of checksummed chunks of whole rows.

    <name>/zarr.json   c.0.0   c.1.0   ...

A chunk has at most 4 MiB: raw little-endian values and their crc32c, which is checked at every
read. Rows that lie in other chunks are not touched.
"""

import dataclasses
import hashlib
import os
import re
import shutil
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import tensorstore

from qwen3vl_jax.checkpoints.encodings import Encoding
from qwen3vl_jax.checkpoints.files import (
    STORED_DTYPES,
    advice,
    aligned_empty,
    bytes_of,
    open_regular,
    read_into,
    read_small,
    sha256,
    storage_errors,
    sync_directory,
    sync_file,
)
from qwen3vl_jax.checkpoints.manifest import (
    ZARR_NAME,
    StoredArray,
    chunk_files,
    zarr_json,
    zarr_metadata,
)
from qwen3vl_jax.errors import Qwen3VLError, StorageError, WeightError

CHUNKS_IN_FLIGHT = 8
FSYNCS_IN_FLIGHT = 16
CHECKSUM_BYTES = 4
PART_BYTES = 256 << 10  # of a chunk of which few rows are wanted are in memory at a time
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")
_DAMAGED = ("DATA_LOSS", "FAILED_PRECONDITION", "NOT_FOUND", "INVALID_ARGUMENT", "OUT_OF_RANGE")


def read_rows(directory: Path, name: str, array: StoredArray, first: int, stop: int) -> np.ndarray:
    """Rows `first` to `stop` of one array of the folder `directory`.

    Returns:
        A new array at a 64-byte aligned address.

    Raises:
        WeightError: if a chunk is missing, cut, or does not match its crc32c.
        StorageError: if the system reports a read error.
    """
    check_array_files(directory, name, array)
    values = aligned_empty((stop - first, *array.shape[1:]), STORED_DTYPES[array.dtype])
    cuts = list(_cuts(array, first, stop))
    if len(cuts) == 1 and len(values) < array.chunk_rows:
        chunk, start = divmod(first, array.chunk_rows)
        file, nbytes = list(chunk_files(array).items())[chunk]
        _read_inside(directory / name / file, name, nbytes - CHECKSUM_BYTES, start, values)
        return values
    source = _open(directory / name, array)
    target = tensorstore.array(values, copy=False)
    reads = (target[lo - first : hi - first].write(source[lo:hi]) for lo, hi in cuts)
    _finish_all(reads, f"array {name!r}", reading=True)
    return values


def write_array(
    directory: Path, name: str, values: np.ndarray, encoding: Encoding | None = None
) -> StoredArray:
    """Write one array, replacing whatever lies there. It is durable after `sync_arrays`.

    Args:
        encoding: what the values stand for, if they are encoded.

    Raises:
        StorageError: if the system refuses.
    """
    folder = directory / name
    array = StoredArray(values.dtype.name, values.shape, "", encoding)
    with storage_errors(f"cannot write {folder}"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / ZARR_NAME).write_bytes(zarr_json(array))
    target = _open(folder, array)
    digest = hashlib.sha256()

    def writes() -> Iterator[tensorstore.WriteFutures]:
        for lo, hi in _cuts(array, 0, array.shape[0]):
            yield target[lo:hi].write(values[lo:hi])
            digest.update(bytes_of(values[lo:hi]))

    _finish_all(writes(), f"array {name!r}", reading=False)
    return dataclasses.replace(array, sha256=digest.hexdigest())


def sync_arrays(directory: Path, arrays: dict[str, StoredArray]) -> None:
    """Make arrays durable: their files, their folders, the names of these in `directory`.

    Raises:
        StorageError: if the system could not write them.
    """
    files = [
        directory / name / file
        for name, array in arrays.items()
        for file in (ZARR_NAME, *chunk_files(array))
    ]
    # Many at once: a journaling file system commits them together.
    with ThreadPoolExecutor(FSYNCS_IN_FLIGHT) as threads:
        list(threads.map(sync_file, files))
        list(threads.map(sync_directory, [directory / name for name in arrays]))
    sync_directory(directory)


def check_array_files(directory: Path, name: str, array: StoredArray) -> None:
    """Whether zarr.json is exactly ours and every chunk is a regular file of the right size.

    Raises:
        WeightError: naming the file that is not.
    """
    folder = directory / name
    metadata = zarr_json(array)
    if read_small(folder / ZARR_NAME) != metadata:
        raise WeightError(
            f"{folder / ZARR_NAME} is not what the manifest implies: it is damaged; "
            "convert the model again"
        )
    for chunk, size in chunk_files(array).items():
        try:
            status = os.lstat(folder / chunk)
        except FileNotFoundError:
            raise WeightError(f"{folder / chunk} is missing; convert the model again") from None
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            raise WeightError(
                f"{folder / chunk} has {status.st_size:,} B, wanted a regular file of {size:,} B; "
                "convert the model again"
            )


def verify_array(directory: Path, name: str, array: StoredArray) -> None:
    """Read a whole array again and compare it with its SHA-256.

    Raises:
        WeightError: if anything differs.
    """
    values = read_rows(directory, name, array, 0, array.shape[0])
    if sha256(bytes_of(values)) != array.sha256:
        raise WeightError(f"array {name!r} does not match its SHA-256; convert the model again")


def _read_inside(chunk: Path, name: str, stop: int, first: int, values: np.ndarray) -> None:
    """Fill `values` with rows of a chunk of `stop` bytes, from its row `first` on; check all of it.

    tensorstore would have the whole chunk in memory twice, for one row of it.
    """
    wanted, part = bytes_of(values), np.empty(PART_BYTES, np.uint8)
    low = first * (len(wanted) // len(values))
    found = 0
    with _opened(chunk, name) as descriptor:
        for start in range(0, stop, PART_BYTES):
            piece = part[: stop - start]
            read_into(descriptor, piece, start, chunk)
            found = google_crc32c.extend(found, piece)
            begin, end = max(low, start), min(low + len(wanted), start + len(piece))
            if begin < end:
                wanted[begin - low : end - low] = bytes_of(piece[begin - start : end - start])
        read_into(descriptor, part[:CHECKSUM_BYTES], stop, chunk)
    if part[:CHECKSUM_BYTES].tobytes() != found.to_bytes(CHECKSUM_BYTES, "little"):
        raise WeightError(
            f"array {name!r} is damaged: {chunk} does not match its crc32c; convert the model again"
        )


@contextmanager
def _opened(chunk: Path, name: str) -> Iterator[int]:
    """A descriptor of a chunk. It may be lost or cut though `check_array_files` saw it whole."""
    try:
        descriptor = open_regular(chunk)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except (WeightError, StorageError) as error:
        if isinstance(error, StorageError) and not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise WeightError(
            f"array {name!r} is damaged: {chunk} was lost or cut; convert the model again"
        ) from None


def _open(folder: Path, array: StoredArray) -> tensorstore.TensorStore:
    # assume_metadata: tensorstore is told what zarr.json says, and never reads one.
    specification: dict[str, Any] = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "metadata": zarr_metadata(array),
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
        # `sync_arrays` does it for many files together.
        "context": {"file_io_sync": False},
    }
    return tensorstore.open(specification, open=True, assume_metadata=True).result()


def _cuts(array: StoredArray, first: int, stop: int) -> Iterator[tuple[int, int]]:
    """Row ranges between `first` and `stop` that lie in one chunk each."""
    rows = array.chunk_rows
    while first < stop:
        border = min(stop, (first // rows + 1) * rows)
        yield first, border
        first = border


def _finish_all(
    operations: Iterable[tensorstore.WriteFutures], what: str, *, reading: bool
) -> None:
    """Carry the operations out in order, a few at a time."""
    waiting: deque[tensorstore.WriteFutures] = deque()
    try:
        for operation in operations:
            waiting.append(operation)
            if len(waiting) > CHUNKS_IN_FLIGHT:
                waiting.popleft().result()
        while waiting:
            waiting.popleft().result()
    except (ValueError, RuntimeError, OSError) as error:
        # Nothing may still write into memory or files that the caller takes for its own.
        for operation in waiting:
            operation.exception()
        raise _explained(error, what, reading=reading) from None


def _explained(error: Exception, what: str, *, reading: bool) -> Qwen3VLError:
    """Our error for one of tensorstore's, which are texts."""
    text = " ".join(str(error).split())
    number = _OS_ERROR.search(text)
    verb = "read" if reading else "written"
    if number is not None:
        code = int(number[1])
        return StorageError(f"{what} cannot be {verb}: {os.strerror(code)}; {advice(code)}")
    if reading and text.startswith(_DAMAGED):
        return WeightError(f"{what} is damaged: {text[:400]}; convert the model again")
    return StorageError(f"{what} cannot be {verb}: {text[:400]}; {advice(None)}")
