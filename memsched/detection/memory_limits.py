"""How much main memory this process may still take, and what says so.

Read from the kernel's files under a root directory: what is free on the machine, the limits of
the control groups (version 1 and 2) that the process is in, and its own (RLIMIT_AS, RLIMIT_DATA).
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

ROOT = Path("/")
# Above this a limit is no limit: version 1 writes 2**63 rounded down to pages.
NO_LIMIT_BYTES = 1 << 60


@dataclasses.dataclass(frozen=True, slots=True)
class Room:
    """Bytes that may still be taken, and whose limit that is."""

    nbytes: int
    limit: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Group:
    """File names of one version of control groups, and its controller in /proc/self/cgroup."""

    filesystem: str
    controller: str
    limit: str
    usage: str
    droppable: str


_VERSIONS = (
    _Group("cgroup2", "", "memory.max", "memory.current", "inactive_file"),
    _Group(
        "cgroup",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def main_memory(root: Path = ROOT) -> Room:
    """The smallest room that any limit leaves. `root` is where /proc and /sys are found."""
    rooms = [_free(root), *_group_rooms(root), *_own_rooms(root)]
    return min(rooms, key=lambda room: room.nbytes)


def own_groups(root: Path = ROOT) -> Iterator[Path]:
    """The directory of the process's own control group, for each version that is mounted."""
    for version in _VERSIONS:
        yield from itertools.islice(_groups(root, version), 1)


def all_groups(root: Path = ROOT) -> Iterator[Path]:
    """The directories of the process's control groups and of all above them, of both versions."""
    for version in _VERSIONS:
        yield from _groups(root, version)


def _free(root: Path) -> Room:
    """What the machine can give without swapping."""
    available = _fields(root / "proc/meminfo").get("MemAvailable")
    if available is None:
        available = int(psutil.virtual_memory().available)
    return Room(available, "free main memory")


def _group_rooms(root: Path) -> Iterator[Room]:
    """What each control group above the process leaves. Page cache can be dropped: not counted."""
    for version in _VERSIONS:
        for group in _groups(root, version):
            limit = _number(group / version.limit)
            if limit is None or limit >= NO_LIMIT_BYTES:
                continue
            droppable = _fields(group / "memory.stat").get(version.droppable, 0)
            used = max(0, (_number(group / version.usage) or 0) - droppable)
            yield Room(max(0, limit - used), f"{version.limit} of {limit:,} B")


def _groups(root: Path, version: _Group) -> Iterator[Path]:
    """Directories of the process's group and of all above it that can be seen from here."""
    path = _group_path(root, version)
    mount = _mount(root, version)
    if path is None or mount is None:
        return
    inside, point = mount
    # In a container the mount often shows the container's own group as its top.
    relative = path.relative_to(inside) if path.is_relative_to(inside) else PurePosixPath(".")
    top = root / point.relative_to("/")
    for directory in (relative, *relative.parents):
        yield top / directory


def _group_path(root: Path, version: _Group) -> PurePosixPath | None:
    """From lines like `4:memory:/user/1` (version 1) and `0::/user/1` (version 2)."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if version.controller in controllers.split(",") and path.startswith("/"):
            return PurePosixPath(path)
    return None


def _mount(root: Path, version: _Group) -> tuple[PurePosixPath, PurePosixPath] | None:
    """Which group is the top of the mount, and where it is mounted."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        kind, *_, options = after.split() or [""]
        if kind != version.filesystem:
            continue
        if version.controller and version.controller not in options.split(","):
            continue
        _, _, _, inside, point, *_ = before.split()
        return PurePosixPath(_unescaped(inside)), PurePosixPath(_unescaped(point))
    return None


def _own_rooms(root: Path) -> Iterator[Room]:
    """What the process's own limits leave of its address space and its data."""
    status = _fields(root / "proc/self/status")
    limits = _text(root / "proc/self/limits")
    for title, name, used in (
        ("Max address space", "RLIMIT_AS", "VmSize"),
        ("Max data size", "RLIMIT_DATA", "VmData"),
    ):
        if match := re.search(rf"^{title} +([0-9]+) ", limits, re.MULTILINE):
            limit = int(match[1])
            yield Room(max(0, limit - status.get(used, 0)), f"{name} of {limit:,} B")


def _fields(path: Path) -> dict[str, int]:
    """Bytes of lines like `MemAvailable:  12 kB` and `inactive_file 4096`."""
    found = {}
    for name, value, unit in re.findall(r"^(\w+):?\s+([0-9]+)( kB)?$", _text(path), re.MULTILINE):
        found[name] = int(value) * (1024 if unit else 1)
    return found


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none ("max", or no file)."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    """A file's text; nothing where it cannot be read: other systems have no such files."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
