"""Choosing the codec of every matrix of a checkpoint while it is converted.

Each matrix is read, and what every codec of a level would do to it is measured and noted; so are
sensitivities. The choice follows from these notes alone. A conversion's are in its journal: after a
kill it chooses the same.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from memsched.codecs import CodecError, parse_codec, relative_error
from memsched.codecs.choice import RAW, Candidate, Choice, Chosen, Subject, choose
from memsched.codecs.levels import Level, load_level
from qwen3vl_jax.checkpoints import sensitivity
from qwen3vl_jax.checkpoints.array_writer import cast
from qwen3vl_jax.checkpoints.encodings import (
    HEAD,
    Encoding,
    Encodings,
    encodable,
    encodings_of,
    everywhere,
    origin,
)
from qwen3vl_jax.checkpoints.experts_alike import apart, together
from qwen3vl_jax.checkpoints.files import sha256
from qwen3vl_jax.checkpoints.opening import Checkpoint
from qwen3vl_jax.checkpoints.store import Store, check_file
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.weights import Entry

LEVEL_FOLDER = Path(__file__).resolve().parents[2] / "configs" / "levels"
REPORT_NAME = "encoding_report.json"
MEASURED = "sensitivities"  # in the journal
BATCH_ARRAYS, BATCH_BYTES = 16, 64 * 2**20  # of measurements that are noted together
CHOSEN = "choice"  # in the journal, too
Errors = dict[str, float]
Chooser = Callable[[Sequence[Subject]], Choice]


@runtime_checkable
class Notes(Protocol):
    """What was measured so far, by name."""

    @property
    def done(self) -> Mapping[str, dict[str, Any]]:
        """All notes."""

    def note(self, records: Mapping[str, dict[str, Any]]) -> None:
        """Adds some."""


class NotesInMemory:
    """Notes that nothing outlives."""

    def __init__(self) -> None:
        self.done: dict[str, dict[str, Any]] = {}

    def note(self, records: Mapping[str, dict[str, Any]]) -> None:
        """Adds some."""
        self.done |= records


@dataclasses.dataclass(frozen=True, slots=True)
class Calibration:
    """How sensitivities are measured, and what tells it from another measurement."""

    measure: Callable[[], Mapping[str, float]]
    digest: str


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """What a choice is made by.

    Without a calibration, what the source has or the defaults hold. Without a chooser, the fewest
    bytes are chosen.
    """

    level: Level
    calibration: Calibration | None = None
    chooser: Chooser | None = None

    @property
    def task(self) -> dict[str, str]:
        """What tells work with this selection from other work."""
        calibrated = None if self.calibration is None else self.calibration.digest
        parts = (self.level, calibrated, sorted(sensitivity.DEFAULTS.items()))
        return {"selection": sha256(repr(parts).encode())}


@dataclasses.dataclass(frozen=True, slots=True)
class Selected:
    """What was chosen, and the files that say why."""

    choice: Choice
    encodings: Encodings
    files: Mapping[str, bytes]


def level_of(name: str) -> Level:
    """The level of this name that comes along.

    Raises:
        UsageError: there is none.
        memsched.errors.ProgramError: its file is not what it should be.
    """
    files = {path.stem: path for path in sorted(LEVEL_FOLDER.glob("*.toml"))}
    if name not in files:
        known = ", ".join(files) or f"none, for {LEVEL_FOLDER} is empty"
        raise UsageError(f"level {name!r} is unknown; there is {known}")
    return load_level(files[name])


def select(
    selection: Selection,
    checkpoint: Checkpoint,
    config: Config,
    dtype_of: Callable[[Entry], np.dtype],
    notes: Notes,
    progress: Callable[[int], None],
) -> Selected:
    """The encodings of a checkpoint by its level.

    Args:
        dtype_of: the dtype that an array has before it is encoded.
        progress: gets the bytes of every matrix that is done.

    Raises:
        WeightError, StorageError: as reading says.
    """
    level, entries = selection.level, matrices(config)
    paths = [entry.path for entry in entries]
    classes = _sensitivities(selection, checkpoint, config, paths, notes)
    single = sensitivity.of_matrices(paths, config, classes)
    _measure(level, checkpoint, config, dtype_of, notes, progress)
    subjects = [
        _subject(entry, dtype_of(entry), single[entry.path], notes.done.get(_key(entry), {}))
        for entry in entries
    ]
    if CHOSEN not in notes.done:
        chooser = selection.chooser or smallest(level)
        notes.note({CHOSEN: _noted(chooser(subjects))})
    choice = _choice(notes.done[CHOSEN])
    codecs = {one.name: one.codec for one in choice.arrays if one.codec != RAW}
    encodings = encodings_of(config, codecs, dtype_of)
    files = {REPORT_NAME: _report(level, choice, measured=classes is not None)}
    if classes is not None:
        files[sensitivity.FILE_NAME] = sensitivity.spelled(classes)
    return Selected(choice, encodings, files)


def smallest(level: Level) -> Chooser:
    """Chooses the fewest bytes."""

    def chooser(subjects: Sequence[Subject]) -> Choice:
        groups = together(subjects)
        found = choose(
            [group.subject for group in groups],
            error_budget=level.error_budget,
            smallest_saving=level.smallest_saving,
        )
        return apart(found, groups)

    return chooser


def _noted(choice: Choice) -> dict[str, Any]:
    return {
        "bound_bytes": choice.bound_bytes,
        "arrays": [dataclasses.asdict(one) for one in choice.arrays],
    }


def _choice(noted: Mapping[str, Any]) -> Choice:
    return Choice(tuple(Chosen(**one) for one in noted["arrays"]), noted["bound_bytes"])


def matrices(config: Config) -> list[Entry]:
    """What a choice is made for: whatever one codec for all would encode."""
    paths = everywhere(config, "int8")
    return [entry for entry in encodable(config) if entry.path in paths]


def matrix_bytes(config: Config, dtype_of: Callable[[Entry], np.dtype]) -> int:
    """What these take raw."""
    return sum(_raw_bytes(entry, dtype_of(entry)) for entry in matrices(config))


def summary(choice: Choice, level: Level) -> str:
    """A short table: codec, arrays, bytes before and after; the predicted error."""
    lines = [f"{'codec':<14}{'arrays':>7}{'raw bytes':>20}{'stored bytes':>20}"]
    for codec in (RAW, *level.codecs):
        found = [one for one in choice.arrays if one.codec == codec]
        if found:
            sizes = sum(one.raw_bytes for one in found), sum(one.nbytes for one in found)
            lines.append(f"{codec:<14}{len(found):>7,}{sizes[0]:>20,}{sizes[1]:>20,}")
    raw_bytes = sum(one.raw_bytes for one in choice.arrays)
    lines.append(f"{'all':<14}{len(choice.arrays):>7,}{raw_bytes:>20,}{choice.nbytes:>20,}")
    lines.append(
        f"predicted error of the logits: {choice.predicted_error:.4f} of {level.error_budget:g}"
    )
    return "\n".join(lines)


def _sensitivities(
    selection: Selection,
    checkpoint: Checkpoint,
    config: Config,
    paths: Iterable[str],
    notes: Notes,
) -> Mapping[str, float] | None:
    """Those of the classes: measured now, noted before, or what a store brings along."""
    names, label = sensitivity.classes(paths, config).keys(), sensitivity.FILE_NAME
    if selection.calibration is not None:
        if MEASURED not in notes.done:
            notes.note({MEASURED: dict(selection.calibration.measure())})
        return sensitivity.read(sensitivity.spelled(notes.done[MEASURED]), label, names)
    if isinstance(checkpoint, Store) and label in checkpoint.manifest.files:
        content = check_file(checkpoint.directory, label, checkpoint.manifest)
        return sensitivity.read(content, str(checkpoint.directory / label), names)
    return None


def _measure(
    level: Level,
    checkpoint: Checkpoint,
    config: Config,
    dtype_of: Callable[[Entry], np.dtype],
    notes: Notes,
    progress: Callable[[int], None],
) -> None:
    """Notes the error of every codec on every matrix, one matrix at a time."""
    batch: dict[str, Errors] = {}
    nbytes = 0
    for entry in matrices(config) if level.codecs else ():
        dtype = dtype_of(entry)
        if _key(entry) not in notes.done:
            values = cast(checkpoint.read(origin(entry, config)), dtype, entry.array)
            batch[_key(entry)] = _errors(values, entry.path, level.codecs)
            nbytes += values.nbytes
        if len(batch) >= BATCH_ARRAYS or nbytes >= BATCH_BYTES:
            notes.note(batch)
            batch, nbytes = {}, 0
        progress(_raw_bytes(entry, dtype))
    if batch:
        notes.note(batch)


def _errors(values: np.ndarray, path: str, codecs: Iterable[str]) -> Errors:
    """The error of each codec that can hold the matrix and makes it smaller."""
    encodings = [Encoding(codec, values.shape, values.dtype.name) for codec in codecs]
    usable = [e.codec for e in encodings if e.saves and (e.keeps_rows or path != HEAD)]
    with ThreadPoolExecutor(len(usable) or 1) as threads:
        found = threads.map(lambda codec: _error(values, path, codec), usable)
        return {codec: error for codec, error in zip(usable, found, strict=True) if error >= 0}


def _error(values: np.ndarray, path: str, codec: str) -> float:
    """Relative; -1 if the codec has no room for such numbers."""
    try:
        return relative_error(values, parse_codec(codec), path)
    except CodecError:
        return -1.0


def _key(entry: Entry) -> str:
    return f"errors {entry.path}"


def _raw_bytes(entry: Entry, dtype: np.dtype) -> int:
    return int(np.prod(entry.shape)) * dtype.itemsize


def _subject(entry: Entry, dtype: np.dtype, single: float, errors: Errors) -> Subject:
    candidates = tuple(
        Candidate(codec, parse_codec(codec).nbytes(entry.shape, dtype.name), error)
        for codec, error in errors.items()
    )
    return Subject(entry.path, _raw_bytes(entry, dtype), single, candidates)


def _report(level: Level, choice: Choice, *, measured: bool) -> bytes:
    body = {
        "level": level.name,
        "error_budget": level.error_budget,
        "smallest_saving": level.smallest_saving,
        "predicted_error": choice.predicted_error,
        "sensitivities": "measured" if measured else "default",
        "nbytes": choice.nbytes,
        "bound_bytes": choice.bound_bytes,
        "arrays": {one.name: _row(one) for one in choice.arrays},
    }
    return json.dumps(body, indent=1, sort_keys=True).encode() + b"\n"


def _row(one: Chosen) -> dict[str, Any]:
    row = dataclasses.asdict(one)
    del row["name"]
    return row
