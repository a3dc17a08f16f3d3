"""Observations on disk: JSON lines, added to by every run that learns, up to a size.

Each line has the digest of the rates it belongs to. A file can be cut at its end by a crash; what
is wrong anywhere else is refused.
"""

import dataclasses
import fcntl
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from memsched.cost.features import RunFeatures
from memsched.cost.observations import (
    MOST_SECONDS,
    CopyObservation,
    Observation,
    RunObservation,
)
from memsched.cost.strict import dtype, items, number, record, whole, word
from memsched.errors import DamagedError, StoreError
from memsched.whole_file import check_target, write_whole

VERSION = 1
MOST_BYTES = 4 << 20
LONGEST_S = 1e5
LARGEST = 1 << 60

_RUN_KEYS = ("v", "machine", "run", "case", "beside", "seconds")
_COPY_KEYS = ("v", "machine", "link", "case", "copies", "blocks", "nbytes", "beside", "seconds")
_FEATURES = tuple(field.name for field in dataclasses.fields(RunFeatures))
_WORDS = ("kind", "dtype")


def write(file: Path, machine: str, observations: Iterable[Observation]) -> int:
    """Adds observations of the machine with these rates. Returns how many: all, or 0 if the file
    has no room for them.

    Raises:
        StoreError: the file cannot be written; it is as it was.
    """
    lines = [_line(machine, one) for one in observations]
    text = "".join(lines).encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file) as opened:
            opened.seek(0)
            size = opened.read().rfind(b"\n") + 1  # what a crash cut is written over
            if size + len(text) > MOST_BYTES:
                return 0
            opened.truncate(size)
            _write_all(opened, text, size)
    except OSError as error:
        raise _refused(file, error) from error
    return len(lines)


def check_writable(file: Path) -> None:
    """Raises StoreError if nothing could be added there: known before the work is done."""
    try:
        os.close(os.open(file, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC))
    except FileNotFoundError:
        check_target(file)
    except OSError as error:
        raise _refused(file, error) from error


def shrink(file: Path, machine: str) -> None:
    """Leaves what `replace` would of the observations of the machine with these rates.

    Raises:
        DamagedError: the file is no such file.
        StoreError: it cannot be written.
    """
    try:
        opened = _locked(file)
    except OSError as error:
        raise _refused(file, error) from error
    with opened:
        replace(file, machine, read(file, machine))


def replace(file: Path, machine: str, observations: Sequence[Observation]) -> int:
    """A file of these observations and no others; the newest as far as half of a file holds them.

    Raises:
        StoreError: the file cannot be written.
    """
    lines = [_line(machine, one) for one in observations]
    size, first = 0, len(lines)
    while first and size + len(lines[first - 1]) <= MOST_BYTES // 2:
        first -= 1
        size += len(lines[first])
    write_whole(file, "".join(lines[first:]))
    return len(lines) - first


def read(file: Path, machine: str) -> tuple[Observation, ...]:
    """The observations of the machine with these rates. A line that a crash cut is left out.

    Raises:
        DamagedError: the file is no such file.
        StoreError: it cannot be read.
    """
    try:
        with file.open("rb") as opened:
            body = opened.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise StoreError(f"observations {file}: {error.strerror}") from error
    if len(body) > MOST_BYTES:
        raise DamagedError(f"observations {file}: larger than {MOST_BYTES:,} B; delete it")
    found = []
    for place, line in enumerate(body.split(b"\n")[:-1], start=1):
        try:
            owner, observation = _observation(_parsed(line))
        except DamagedError as error:
            raise DamagedError(f"observations {file}: line {place}: {error}; delete it") from None
        if owner == machine:
            found.append(observation)
    return tuple(found)


def _locked(file: Path) -> io.FileIO:
    """The file, open to be read and added to; until it is closed, nobody else adds to it."""
    while True:
        opened = io.FileIO(file, "a+", opener=lambda name, flags: os.open(name, flags, 0o600))
        try:
            fcntl.flock(opened, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(opened.fileno()), file.stat()):
                return opened
        except BaseException:
            opened.close()
            raise
        opened.close()  # another file has taken its place


def _write_all(opened: io.FileIO, text: bytes, size: int) -> None:
    """Adds a text to so many bytes, or nothing: what a disk has room for it takes in silence."""
    rest = memoryview(text)
    try:
        while rest:
            rest = rest[opened.write(rest) :]
    except OSError:
        opened.truncate(size)
        raise


def _refused(file: Path, error: OSError) -> StoreError:
    return StoreError(f"observations {file}: {error.strerror}; give another place")


def _line(machine: str, one: Observation) -> str:
    values = dataclasses.asdict(one)
    if isinstance(one, RunObservation):
        values["run"] = list(values.pop("features").values())
    whole_line = {"v": VERSION, "machine": machine, **values}
    return json.dumps(whole_line, separators=(",", ":")) + "\n"


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise DamagedError("not JSON") from None


def _observation(values: Any) -> tuple[str, Observation]:
    is_run = isinstance(values, dict) and "run" in values
    record(values, _RUN_KEYS if is_run else _COPY_KEYS, "an observation")
    if values["v"] != VERSION:
        raise DamagedError(f"version {str(values['v'])[:20]} is unknown, wanted {VERSION}")
    machine, case = word(values["machine"], "machine"), word(values["case"], "case")
    beside = number(values["beside"], 0.0, 1.0, "beside")
    if not is_run:
        copies, blocks, nbytes = (
            whole(values[key], LARGEST, key) for key in ("copies", "blocks", "nbytes")
        )
        seconds = number(values["seconds"], 1e-9, LONGEST_S, "seconds")
        link = word(values["link"], "link")
        return machine, CopyObservation(case, link, copies, blocks, nbytes, beside, seconds)
    times = items(values["seconds"], MOST_SECONDS, "seconds")
    if not times:
        raise DamagedError("seconds must have at least one entry")
    seconds_of = tuple(number(one, 1e-9, LONGEST_S, "seconds") for one in times)
    return machine, RunObservation(case, _features(values["run"]), beside, seconds_of)


def _features(values: Any) -> RunFeatures:
    found = items(values, len(_FEATURES), "run")
    if len(found) != len(_FEATURES):
        raise DamagedError(f"run must have {len(_FEATURES)} entries, found {len(found)}")
    checked: dict[str, Any] = {
        name: word(value, name) if name in _WORDS else whole(value, LARGEST, name)
        for name, value in zip(_FEATURES, found, strict=True)
    }
    dtype(checked["dtype"], "dtype")
    return RunFeatures(**checked)
