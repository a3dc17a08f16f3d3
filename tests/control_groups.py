"""Memory control groups of tests, where the system lets us make them."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def control_group(limit_bytes: int) -> Iterator[Path | None]:
    """A memory control group with this limit; None where none can be made."""
    group = next((found for parent in _parents() if (found := _made(parent, limit_bytes))), None)
    try:
        yield group
    finally:
        if group is not None:
            _removed(group)


def _parents() -> Iterator[Path]:
    """Where groups of version 1 and 2 may be made: at the top, and where this process is."""
    own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for top, controller in (("/sys/fs/cgroup/memory", "memory"), ("/sys/fs/cgroup", "")):
        for _, controllers, path in own:
            if controller in controllers.split(","):
                yield from (Path(top), Path(top) / path.strip("/"))


def _made(parent: Path, limit_bytes: int) -> Path | None:
    group = parent / f"memory-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        return None
    for name in ("memory.limit_in_bytes", "memory.max"):
        with contextlib.suppress(OSError):
            if (group / name).exists():
                (group / name).write_text(str(limit_bytes))
                return group
    group.rmdir()
    return None


def peak_bytes(group: Path) -> int | None:
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        if (group / name).exists():
            return int((group / name).read_text())
    return None


def _removed(group: Path) -> None:
    for _ in range(100):
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.05)  # its last process has ended, but has not left
        else:
            return
