"""How far long work is, on stderr: bars on a terminal, one for each stage, and lines."""

import sys
from typing import Protocol, runtime_checkable

from qwen3vl_jax import console


@runtime_checkable
class Display(Protocol):
    """Shows `checkpoints.conversion.Progress` while it is entered, and lines."""

    def __enter__(self) -> object: ...

    def __exit__(self, *_: object) -> None: ...

    def stage(self, name: str, total_bytes: int) -> None:
        """A new stage begins, of this many bytes."""

    def advance(self, nbytes: int) -> None:
        """So many bytes of the stage are done since the last call."""

    def say(self, line: str) -> None:
        """What was done."""


class ProgressBar:
    """Bytes, rate and time left; bars are drawn only on a terminal."""

    def __enter__(self) -> "ProgressBar":
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        terminal = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=terminal,
            disable=not terminal.is_terminal,
        )
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, name: str, total_bytes: int) -> None:
        """Draws a new bar."""
        self._task = self._progress.add_task(name, total=total_bytes)

    def advance(self, nbytes: int) -> None:
        """Moves the bar."""
        self._progress.advance(self._task, nbytes)

    def say(self, line: str) -> None:
        """Writes a line, terminal or not."""
        console.say(line)


class Silent:
    """Shows nothing."""

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing."""

    def stage(self, name: str, total_bytes: int) -> None:
        """Nothing."""

    def advance(self, nbytes: int) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""


def on_terminal() -> Display:
    """What somebody who watches sees; where stderr is no terminal, nothing."""
    return ProgressBar() if sys.stderr.isatty() else Silent()
