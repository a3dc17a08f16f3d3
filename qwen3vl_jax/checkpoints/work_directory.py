"""A directory that appears only when it is complete.

Work for DST happens in DST.partial: `content/` is what DST will be, `journal.jsonl` lists what in
it is finished and durable. After a kill at any moment the same command continues; another one
starts afresh. Publishing is one rename.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3vl_jax.checkpoints.files import storage_errors, sync_directory
from qwen3vl_jax.errors import StorageError, UsageError

JOURNAL_NAME = "journal.jsonl"
CONTENT_NAME = "content"


class WorkDirectory:
    """The place where `destination` is being made; locked while it is open."""

    def __init__(self, destination: Path, task: dict[str, Any]) -> None:
        """Continue the work on `task` if some was left, else start.

        Args:
            task: what is being made from what, as JSON; other work than this is thrown away.

        Raises:
            UsageError: if `destination` or something foreign is in the way.
            StorageError: if the system refuses, or another process is at work here.
        """
        self.destination = destination = destination.absolute()
        self.directory = destination.parent / f"{destination.name}.partial"
        self.content = self.directory / CONTENT_NAME
        if destination.exists() or destination.is_symlink():
            self._sweep()
            raise UsageError(
                f"{destination} exists; remove it, choose another name, or check it with --verify"
            )
        self.done: dict[str, dict[str, Any]] = {}
        self._journal = self._lock()
        try:
            self.done = self._load(task)
        except BaseException:
            self.close()
            raise

    def note(self, records: Mapping[str, dict[str, Any]]) -> None:
        """Remember durably what is finished; it must be durable itself."""
        lines = "".join(json.dumps([name, record]) + "\n" for name, record in records.items())
        rest = lines.encode()
        with storage_errors(f"cannot write {self.directory / JOURNAL_NAME}"):
            while rest:
                rest = rest[os.write(self._journal, rest) :]
            os.fsync(self._journal)
        self.done |= records

    def publish(self) -> None:
        """Let the destination appear; everything in `content` must be durable."""
        sync_directory(self.content)
        with storage_errors(f"cannot rename to {self.destination}"):
            os.rename(self.content, self.destination)
        sync_directory(self.destination.parent)
        shutil.rmtree(self.directory, ignore_errors=True)

    def close(self) -> None:
        """Let go of the lock. Unfinished work stays for the next time."""
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1

    def __enter__(self) -> "WorkDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sweep(self) -> None:
        """Remove what a kill just after publishing left: a journal without content."""
        names = {path.name for path in self.directory.glob("*")}
        if self.directory.is_dir() and names <= {JOURNAL_NAME}:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _lock(self) -> int:
        path = self.directory / JOURNAL_NAME
        if self.directory.is_symlink() or (self.directory.exists() and not _is_ours(path)):
            raise UsageError(f"{self.directory} is in the way and is not ours; remove it")
        with storage_errors(f"cannot create {self.directory}"):
            self.directory.mkdir(mode=0o700, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            journal = os.open(path, flags, 0o600)
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(journal)
                raise StorageError(
                    f"{self.directory} is in use by another process; wait for it, or stop it"
                ) from None
        return journal

    def _load(self, task: dict[str, Any]) -> dict[str, dict[str, Any]]:
        path = self.directory / JOURNAL_NAME
        entries, valid_bytes = _entries(path.read_bytes())
        going_on = entries[:1] == [["task", task]] and self.content.is_dir()
        with storage_errors(f"cannot prepare {self.directory}"):
            os.truncate(path, valid_bytes if going_on else 0)
            if going_on:
                return dict(entries[1:])
            shutil.rmtree(self.content, ignore_errors=True)
            self.content.mkdir()
        self.note({"task": task})
        sync_directory(self.directory)
        sync_directory(self.directory.parent)
        return {}


def _entries(journal: bytes) -> tuple[list[Any], int]:
    """The lines of a journal up to the first that a kill has cut, and their bytes."""
    entries, position = [], 0
    for line in journal.splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(entry, list) or len(entry) != 2:
            break
        entries.append(entry)
        position += len(line)
    return entries, position


def _is_ours(journal: Path) -> bool:
    # Killed between mkdir and the first line: an empty directory or journal.
    names = {path.name for path in journal.parent.iterdir()}
    return names <= {JOURNAL_NAME, CONTENT_NAME} and not journal.is_symlink()
