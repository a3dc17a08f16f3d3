"""Reading files that others wrote, and writing files that survive a power cut.

Reads: regular files only, no symbolic links out of the directory, 4 MiB pieces, short reads
finished. Writes: nothing counts as written before the file and its directory are fsynced.
"""

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np

from qwen3vl_jax.errors import BadInputError, StorageError, WeightError

PIECE_BYTES = 4 * 2**20  # one system call: Ctrl-C is answered between two of them
ALIGNMENT_BYTES = 64  # XLA on CPU takes such an array without copying it
SIDE_FILE_BYTES = 64 * 2**20  # tokenizer.json of the released models has 7 MB

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# What may lie in a store: numbers, or the bytes of encoded ones.
STORED_DTYPES = DTYPES | {"uint8": np.dtype(np.uint8)}

# A downloaded snapshot is a folder of links to files that are named by their own hash.
_HUB_BLOB = re.compile(r"\.\./\.\./blobs/[0-9a-f]{40,64}")


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError that says what was being done."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{what}: {error.strerror or error}; {advice(error.errno)}") from error


def advice(number: int | None) -> str:
    """What to do about an errno."""
    match number:
        case errno.ENOSPC | errno.EDQUOT:
            return "free some space and run the same command again"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "check the permissions or choose another directory"
        case errno.ENOENT:
            return "check the path"
        case _:
            return "check the disk and run the same command again"


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, opened for reading.

    Symbolic links are followed only as the hub's cache lays them: `../../blobs/<hash>`.

    Raises:
        WeightError: if it is a link to elsewhere, or no regular file.
        StorageError: if the system refuses.
    """
    # O_NONBLOCK: opening a pipe would wait for its writer for ever.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with storage_errors(f"cannot open {path}"):
        try:
            descriptor = os.open(path, flags)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            descriptor = os.open(_hub_blob(path), flags)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise WeightError(f"{path} is no regular file; copy the real file there")
    return descriptor


def _hub_blob(path: Path) -> Path:
    target = os.readlink(path)
    if not _HUB_BLOB.fullmatch(target):
        raise WeightError(
            f"{path} is a symbolic link to {target!r}; only links of the hub's cache "
            "(../../blobs/<hash>) are followed: copy the file, or name its own directory"
        )
    return path.parent / target


def read_small(path: Path, limit_bytes: int = SIDE_FILE_BYTES) -> bytes:
    """The whole of a small file.

    Raises:
        BadInputError: if it has more than `limit_bytes`.
        WeightError, StorageError: as `open_regular`.
    """
    descriptor = open_regular(path)
    try:
        with storage_errors(f"cannot read {path}"):
            size = os.fstat(descriptor).st_size
            if size > limit_bytes:
                raise BadInputError(f"{path} has {size:,} B; at most {limit_bytes:,} B are read")
            buffer = np.empty(size, np.uint8)
        read_into(descriptor, buffer, 0, path)
        return buffer.tobytes()
    finally:
        os.close(descriptor)


def read_into(descriptor: int, buffer: np.ndarray, offset: int, path: Path) -> None:
    """Fill the contiguous `buffer` from byte `offset` on.

    Raises:
        WeightError: if the file ends before.
        StorageError: if the system reports a read error.
    """
    view = bytes_of(buffer)
    done = 0
    while done < len(view):
        with storage_errors(f"cannot read {path} at byte {offset + done:,}"):
            count = os.preadv(descriptor, [view[done : done + PIECE_BYTES]], offset + done)
        if count == 0:
            raise WeightError(
                f"{path} ends at byte {offset + done:,}, wanted {offset + len(view):,}: "
                "it is truncated; fetch it again"
            )
        done += count


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at an address that is a multiple of 64 bytes."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT_BYTES, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[start : start + size].view(dtype).reshape(shape)


def bytes_of(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def pieces(data: memoryview) -> Iterator[memoryview]:
    """`data` in parts of 4 MiB."""
    for start in range(0, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]


def sha256(data: bytes | memoryview) -> str:
    """SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    for piece in pieces(memoryview(data)):
        digest.update(piece)
    return digest.hexdigest()


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and fsync it; its name is durable after `sync_directory`."""
    with storage_errors(f"cannot write {path}"), open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    _sync(path, os.O_RDONLY | os.O_NOFOLLOW)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    _sync(directory, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    with storage_errors(f"cannot fsync {path}"):
        descriptor = os.open(path, flags | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
