"""A file of a fixed size that nobody else can open and that leaves nothing behind."""

import errno
import os
import tempfile
from pathlib import Path

from memsched.errors import StoreError
from memsched.stores.direct import DirectFile, open_direct

# What file systems without O_TMPFILE answer; EISDIR comes from kernels that do not know it.
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)


def private_file(directory: Path, nbytes: int) -> DirectFile:
    """A file of `nbytes` that are reserved on the disk, without a name, readable by us only.

    It is gone when it is closed, or when the process ends in whatever way. The directory is made
    with mode 0700 if it is missing.

    Raises:
        StoreError: there is less space, or the system refused.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = _unnamed(directory)
    except OSError as error:
        raise StoreError(
            f"no file can be made in {directory}: {error.strerror or error}; "
            "check the permissions or choose another directory"
        ) from None
    try:
        reserve(file, directory, 0, nbytes)
    except BaseException:
        file.close()
        raise
    return file


def _unnamed(directory: Path) -> DirectFile:
    try:
        return open_direct(directory, os.O_RDWR | os.O_TMPFILE | os.O_EXCL)
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise
    # It makes a directory of mode 0700, and takes it and the file's name away at once.
    with tempfile.TemporaryDirectory(prefix="memsched-", dir=directory) as private:
        path = Path(private) / "spill"
        return open_direct(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)


def reserve(file: DirectFile, directory: Path, offset: int, nbytes: int) -> None:
    """Take `nbytes` of the disk for a file in this directory, from `offset` on.

    Raises:
        StoreError: there is less space, or the system refused.
    """
    if not nbytes:
        return
    status = os.statvfs(directory)
    free_bytes = status.f_bavail * status.f_frsize
    try:
        # The call takes what it gets before it fails: nobody's disk shall be full meanwhile.
        if nbytes > free_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate(file.descriptor, offset, nbytes)
    except OSError as error:
        raise StoreError(
            f"{nbytes:,} B cannot be reserved in {directory}: {error.strerror}; "
            f"{free_bytes:,} B are free there: free some space, choose another directory or a "
            "smaller nvme space"
        ) from None
