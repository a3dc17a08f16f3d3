"""A control group with a memory limit, for a process that is about to start.

Versions 1 and 2 of the kernel's control groups are known. Where neither can be written, there is no
limit, and what a process takes is only measured.
"""

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from qwen3vl_jax.errors import UsageError

LIMITS = ("memory.max", "memory.limit_in_bytes")
PEAKS = ("memory.peak", "memory.max_usage_in_bytes")
# A shell joins the group and becomes the program: all its memory is counted.
_JOIN = 'echo $$ > "$0" && exec "$@"'
_numbers = itertools.count()


class MemoryGroup:
    """A group below one of our own; it ends with this object."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """Makes the folder, which is a group in a file system of groups, and limits it.

        Raises:
            OSError: the system refuses.
        """
        self._folder = folder
        folder.mkdir()
        try:
            limit = next((folder / name for name in LIMITS if (folder / name).exists()), None)
            if limit is None:
                raise FileNotFoundError(f"{folder} limits no memory")
            limit.write_text(str(limit_bytes))
        except OSError:
            self.close()
            raise

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command line of the same command inside the group."""
        return ["/bin/sh", "-c", _JOIN, str(self._folder / "cgroup.procs"), *command]

    @property
    def peak_bytes(self) -> int | None:
        """The most that was charged to the group, page cache included; None if nobody counts."""
        for name in PEAKS:
            with contextlib.suppress(OSError):
                return int((self._folder / name).read_text())
        return None

    def close(self) -> None:
        """Removes the group, whose processes have ended."""
        with contextlib.suppress(OSError):
            self._folder.rmdir()


@contextlib.contextmanager
def memory_group(limit_bytes: int, above: Iterable[Path]) -> Iterator[MemoryGroup | None]:
    """A limited group below the first of `above` that allows it, or None.

    Raises:
        UsageError: the limit is none.
    """
    if limit_bytes < 1:
        raise UsageError(f"a memory limit of {limit_bytes:,} B is none; give some gigabytes")
    group = None
    for folder in above:
        with contextlib.suppress(OSError):
            name = f"qwen3vl-bench-{os.getpid()}-{next(_numbers)}"
            group = MemoryGroup(folder / name, limit_bytes)
            break
    try:
        yield group
    finally:
        if group is not None:
            group.close()
