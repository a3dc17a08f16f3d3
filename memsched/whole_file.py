"""Files that appear whole or not at all, whatever happens while they are written."""

import contextlib
import io
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from memsched.errors import StoreError


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file that appears when all of it is on disk.

    Raises:
        StoreError: it cannot be written.
    """
    with appearing(path) as file:
        if isinstance(content, str):
            file.write(content)
        else:
            file.buffer.write(content)


def write_together(contents: Mapping[Path, str]) -> None:
    """Writes files that appear one right after the other, in this order, when all are on disk.

    Raises:
        StoreError: one cannot be written; then none of them is.
    """
    with contextlib.ExitStack() as stack:
        # The last one entered is the first to appear.
        for path, content in reversed(list(contents.items())):
            file = stack.enter_context(appearing(path))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def check_target(path: Path) -> None:
    """Raises StoreError if nothing could be written there: known before the work is done."""
    _check_place(path)
    directory = Path(os.path.realpath(path)).parent
    try:
        # Rights say little: root has all of them, and some file systems take no files at all.
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise StoreError(
            f"directory {directory} cannot be written: {error.strerror or error}; name another"
        ) from error


def _check_place(path: Path) -> None:
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise StoreError(f"{path} is not a regular file; name another")
    if not target.parent.is_dir():
        raise StoreError(f"{path}: there is no such directory; make it, or name another")
    if not os.access(target.parent, os.W_OK):
        raise StoreError(f"directory {target.parent} cannot be written; name another")


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[io.TextIOWrapper]:
    """A file that takes the place of `path` when the block ends well."""
    _check_place(path)
    target = Path(os.path.realpath(path))
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with open(handle, "w", encoding="utf-8", newline="") as file:
                yield file
                file.flush()
                os.fchmod(handle, _mode(target))
                os.fsync(handle)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
        _sync_directory(target.parent)
    except StoreError:  # of a file that was to appear before this one
        raise
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}; nothing was written") from error


def _mode(target: Path) -> int:
    """Permissions as the file had, or as a new one gets."""
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
