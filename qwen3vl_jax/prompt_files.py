"""Arrays that outlive a process: a directory of whole files, checked, of a bounded size in all.

An entry is named by the digest of all that decides its arrays, so whoever asks for it knows their
shapes and dtypes, and takes nothing from the file but numbers:

    magic, key, the arrays' CRC-32C     8 + 32 + 4 x arrays bytes, little-endian
    the arrays, row by row

It appears when all of it is on disk. What was used longest ago goes first.
"""

import contextlib
import errno
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import google_crc32c
import numpy as np

from qwen3vl_jax.checkpoints.files import (
    aligned_empty,
    open_regular,
    read_into,
    storage_errors,
    sync_directory,
)
from qwen3vl_jax.errors import BadInputError, UsageError

MAGIC = b"Q3VLKV1\n"
SUFFIX, UNFINISHED = ".kv", ".part"
LEFT_BEHIND_S = 3600.0  # an unfinished file that is older belongs to a process that was killed
_NAME = re.compile(r"[0-9a-f]{64}\.kv")

Form = tuple[tuple[int, ...], np.dtype]  # shape and dtype of an array


def nbytes_of(forms: Iterable[Form]) -> int:
    """Bytes of arrays."""
    return sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in forms)


class Entries:
    """The entries of a directory that only its owner can read, at most `space_bytes` of them."""

    def __init__(self, directory: Path, space_bytes: int) -> None:
        """Makes the directory with mode 0700 if it is missing.

        Raises:
            UsageError: others may write to it, or it is somebody else's.
            StorageError: the system refuses.
        """
        self.directory = directory
        self.space_bytes = space_bytes
        with storage_errors(f"cannot make the prompt cache {directory}"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = directory.stat()
            if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise UsageError(
                f"prompt cache {directory}: owner {found.st_uid}, mode {found.st_mode & 0o777:o}; "
                f"it must be yours ({os.geteuid()}) and writable by no one else: chmod 700, or "
                "name another"
            )
        self._sweep()

    def has(self, key: str, forms: Sequence[Form]) -> bool:
        """Whether there is an entry of the size that these arrays have."""
        with contextlib.suppress(OSError):
            found = self._path(key).lstat()
            return stat.S_ISREG(found.st_mode) and found.st_size == _file_bytes(forms)
        return False

    def read(self, key: str, forms: Sequence[Form]) -> Iterator[np.ndarray]:
        """The arrays one by one, each checked before it is given out.

        Raises:
            BadInputError: the entry is not what was written.
            StorageError: it is gone, or cannot be read.
        """
        path = self._path(key)
        descriptor = open_regular(path)
        try:
            size = os.fstat(descriptor).st_size
            if size != _file_bytes(forms):
                raise BadInputError(f"{path} has {size:,} B, wanted {_file_bytes(forms):,} B")
            header = np.empty(_header_bytes(forms), np.uint8)
            read_into(descriptor, header, 0, path)
            start = MAGIC + bytes.fromhex(key)
            if header[: len(start)].tobytes() != start:
                raise BadInputError(f"{path} does not begin with its own name; it is another file")
            offset = len(header)
            for index, wanted in enumerate(header[len(start) :].view("<u4")):
                array = aligned_empty(*forms[index])
                read_into(descriptor, array, offset, path)
                found = google_crc32c.value(array.reshape(-1).view(np.uint8))
                if found != wanted:
                    raise BadInputError(
                        f"{path} is damaged between bytes {offset:,} and "
                        f"{offset + array.nbytes:,}: CRC-32C {found:08x}, wanted {wanted:08x}"
                    )
                offset += array.nbytes
                yield array
        finally:
            os.close(descriptor)

    def write(self, key: str, forms: Sequence[Form], arrays: Iterable[np.ndarray]) -> int:
        """Makes room, and an entry of these arrays, unless there is one; returns its bytes.

        One that is larger than all of the space is not made.

        Raises:
            StorageError: the system refuses; nothing is left of the entry.
        """
        nbytes = _file_bytes(forms)
        if self.has(key, forms) or nbytes > self.space_bytes:
            return 0
        path = self._path(key)
        with storage_errors(f"cannot write {path}"):
            self._make_room(nbytes)
            # mkstemp makes a file of mode 0600 that was not there.
            descriptor, temporary = tempfile.mkstemp(UNFINISHED, f".{key[:16]}.", self.directory)
            try:
                self._fill(descriptor, key, forms, arrays)
                os.rename(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
            finally:
                os.close(descriptor)
        sync_directory(self.directory)
        return nbytes

    def touch(self, keys: Sequence[str]) -> None:
        """These were used just now; of equals, the last goes first."""
        now_ns = time.time_ns()
        for index, key in enumerate(keys):
            with contextlib.suppress(OSError):
                os.utime(self._path(key), ns=(now_ns - index, now_ns - index))

    def forget(self, key: str) -> None:
        """Removes an entry, if it is there."""
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    @property
    def used_bytes(self) -> int:
        """Of all entries."""
        return sum(size for _, size, _ in self._oldest_first())

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}{SUFFIX}"

    def _fill(
        self, descriptor: int, key: str, forms: Sequence[Form], arrays: Iterable[np.ndarray]
    ) -> None:
        offset, checksums = _header_bytes(forms), []
        for (shape, dtype), array in zip(forms, arrays, strict=True):
            assert (array.shape, array.dtype) == (shape, dtype), (array.shape, array.dtype)
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            checksums.append(google_crc32c.value(content))
            _write(descriptor, content.data, offset)
            offset += content.nbytes
        header = MAGIC + bytes.fromhex(key) + np.array(checksums, "<u4").tobytes()
        _write(descriptor, memoryview(header), 0)
        os.fsync(descriptor)

    def _make_room(self, nbytes: int) -> None:
        """Removes what was used longest ago until so many bytes fit."""
        entries = self._oldest_first()
        used_bytes = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if used_bytes + nbytes <= self.space_bytes:
                return
            path.unlink(missing_ok=True)
            used_bytes -= size

    def _oldest_first(self) -> list[tuple[int, int, Path]]:
        """Time of use, bytes and path of every entry. Other processes may remove some meanwhile."""
        found = []
        for path in self.directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if _NAME.fullmatch(path.name):
                    status = path.lstat()
                    found.append((status.st_mtime_ns, status.st_size, path))
        return sorted(found)

    def _sweep(self) -> None:
        """Removes what killed processes have left unfinished."""
        for path in self.directory.glob(f".*{UNFINISHED}"):
            with contextlib.suppress(OSError):
                if path.lstat().st_mtime < time.time() - LEFT_BEHIND_S:
                    path.unlink()


def _header_bytes(forms: Sequence[Form]) -> int:
    return len(MAGIC) + 32 + 4 * len(forms)


def _file_bytes(forms: Sequence[Form]) -> int:
    return _header_bytes(forms) + nbytes_of(forms)


def _write(descriptor: int, content: memoryview, offset: int) -> None:
    while content:
        count = os.pwrite(descriptor, content, offset)
        content, offset = content[count:], offset + count
