"""Reads how much main memory is left, and whether anybody waits for it.

Free memory, the limits of control groups (version 1 and 2) and what they hold, pressure stall
information, and events of groups. Files are opened once and read again at every look: that is a
few system calls, so that one can look between two tokens.
"""

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import psutil

from memsched.detection.memory_limits import NO_LIMIT_BYTES, ROOT, all_groups, own_groups
from memsched.pressure.observation import Observation, margin_bytes

READ_BYTES = 16 << 10  # all of any of these files
NO_STALLS = (
    "the kernel gives no pressure stall information: only limits, free memory and events of "
    "control groups are watched"
)
_AVAILABLE = re.compile(rb"^MemAvailable: +(\d+) kB", re.MULTILINE)
_TOTAL = re.compile(rb"^MemTotal: +(\d+) kB", re.MULTILINE)
# Page cache that nobody uses: it is dropped when memory is needed. Version 1 counts that of a group
# with its children, as its usage does, under "total_".
_DROPPABLE = (
    re.compile(rb"^total_inactive_file (\d+)", re.MULTILINE),
    re.compile(rb"^inactive_file (\d+)", re.MULTILINE),
)
_STALLED = re.compile(rb"^some avg10=([0-9.]+) ", re.MULTILINE)
_KILLS = re.compile(rb"^(?:oom|oom_kill) (\d+)", re.MULTILINE)
_THROTTLED = re.compile(rb"^high (\d+)", re.MULTILINE)
_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")
_USAGES = ("memory.current", "memory.usage_in_bytes")
# Local ones: those of the whole subtree count what happens in other groups.
_EVENTS = ("memory.events.local", "memory.events", "memory.oom_control")


class Sensor:
    """Open files of the kernel. `notes` says what this system does not tell.

    Args:
        root: where /proc and /sys are found.
        clock: seconds that never go back.
    """

    def __init__(self, root: Path = ROOT, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._files = contextlib.ExitStack()
        self._meminfo = self._open(root / "proc/meminfo")
        self._groups = [group for path in all_groups(root) if (group := self._group(path))]
        own = [path / "memory.pressure" for path in own_groups(root)]
        pressure = (self._open(path) for path in (root / "proc/pressure/memory", *own))
        # A kernel that has it switched off fails at the first read.
        self._pressure = [file for file in pressure if file and file.find(_STALLED)]
        self.notes = () if self._pressure else (NO_STALLS,)

    def __enter__(self) -> "Sensor":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes all files."""
        self._files.close()

    def observe(self) -> Observation:
        """What there is now."""
        spare_bytes, limit = min(self._spares())
        stalls = [float(found[1]) for file in self._pressure if (found := file.find(_STALLED))]
        return Observation(
            time_s=self._clock(),
            spare_bytes=spare_bytes,
            limit=limit,
            stalled_percent=max(stalls, default=None),
            alarms=self._alarms(),
        )

    def _spares(self) -> Iterator[tuple[int, str]]:
        yield self._free(), "free main memory"
        for group in self._groups:
            yield from group.spares()

    def _free(self) -> int:
        text = b"" if self._meminfo is None else self._meminfo.text()
        available, total = _AVAILABLE.search(text), _TOTAL.search(text)
        if available and total:
            return int(available[1]) * 1024 - margin_bytes(int(total[1]) * 1024)
        memory = psutil.virtual_memory()
        return int(memory.available) - margin_bytes(int(memory.total))

    def _alarms(self) -> int:
        # Groups are throttled when they reach memory.high, also by page cache: it counts only
        # where nothing tells whether anybody waits.
        patterns = (_KILLS,) if self._pressure else (_KILLS, _THROTTLED)
        texts = [group.events.text() for group in self._groups if group.events]
        return sum(int(n) for text in texts for pattern in patterns for n in pattern.findall(text))

    def _group(self, path: Path) -> "_Group | None":
        limits = tuple(
            (name, file) for name in _LIMITS if (file := self._open(path / name)) is not None
        )
        usage = self._first(path, _USAGES)
        if not limits or usage is None:
            return None
        return _Group(limits, usage, self._open(path / "memory.stat"), self._first(path, _EVENTS))

    def _first(self, path: Path, names: tuple[str, ...]) -> "_File | None":
        found = (self._open(path / name) for name in names)
        return next((file for file in found if file is not None), None)

    def _open(self, path: Path) -> "_File | None":
        try:
            file = _File(path)
        except OSError:
            return None
        self._files.callback(file.close)
        return file


class _File:
    """An open file whose content changes."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def text(self) -> bytes:
        """What is in it now; nothing once its control group is gone."""
        try:
            return os.pread(self._descriptor, READ_BYTES, 0)
        except OSError:
            return b""

    def find(self, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        """Where the pattern is in it now."""
        return pattern.search(self.text())

    def number(self) -> int | None:
        """The number that it holds now; None for "max", or no file any more."""
        text = self.text().strip()
        return int(text) if text.isdigit() else None

    def close(self) -> None:
        os.close(self._descriptor)


@dataclasses.dataclass(frozen=True, slots=True)
class _Group:
    """Files of one control group."""

    limits: tuple[tuple[str, _File], ...]
    usage: _File
    statistics: _File | None
    events: _File | None

    def spares(self) -> Iterator[tuple[int, str]]:
        """What each of its limits leaves, if it has any: most groups have none."""
        limits = [(name, file.number()) for name, file in self.limits]
        limited = [(name, n) for name, n in limits if n is not None and n < NO_LIMIT_BYTES]
        if not limited:
            return
        text = self.statistics.text() if self.statistics else b""
        droppable = _DROPPABLE[0].search(text) or _DROPPABLE[1].search(text)
        used = (self.usage.number() or 0) - (int(droppable[1]) if droppable else 0)
        for name, limit in limited:
            yield limit - max(0, used) - margin_bytes(limit), f"{name} of {limit:,} B"
