"""Text with columns: in colours on a terminal, plain and the same words anywhere else."""

import io
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

__all__ = ["WIDTH", "Group", "RenderableType", "columns", "line", "plain", "show"]

WIDTH = 100
_END = re.compile(r"(?: |\x1b\[[\d;]*m)+$", re.MULTILINE)


def show(content: RenderableType, file: io.TextIOBase | None = None) -> None:
    """Writes to a file, stdout by default: with colours if it is a terminal and NO_COLOR is not
    set, else as `plain` text. A narrower terminal continues lines in its next one: cut to its
    width, numbers would lose digits.
    """
    target: Any = sys.stdout if file is None else file
    console = Console(file=target, highlight=False, soft_wrap=False)
    text = plain(content)
    if console.is_terminal:
        console.width = WIDTH
        with console.capture() as captured:
            console.print(content)
        text = _END.sub(lambda end: "\x1b[0m" if "\x1b" in end[0] else "", captured.get())
    target.write(text)
    target.flush()


def plain(content: RenderableType) -> str:
    """Text without colours, of at most 100 columns, no line of which ends in blanks."""
    buffer = io.StringIO()
    console = Console(
        file=buffer,
        width=WIDTH,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
        highlight=False,
        legacy_windows=False,
    )
    console.print(content)
    return "".join(f"{row.rstrip()}\n" for row in buffer.getvalue().splitlines())


def line(text: str, style: str = "") -> Text:
    """One line, cut where it would not fit. Markup in it is only text."""
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def columns(
    heads: Sequence[str], rows: Iterable[Sequence[str | Text]], *, gap: int = 3, indent: int = 2
) -> RenderableType:
    """A table without lines. A head begins with < or >: on which side its column is flush.

    Where there is no room for all, columns on the left are cut, but never the first one or numbers.
    """
    cells = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    named = any(head[1:] for head in heads)
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, show_header=named)
    longest = [
        max([len(head) - 1, *(row[index].cell_len for row in cells)])
        for index, head in enumerate(heads)
    ]
    cut = [index for index, head in enumerate(heads) if index and head[0] == "<"]
    kept = sum(longest[index] for index in range(len(heads)) if index not in cut)
    room = WIDTH - indent - gap * len(heads) - kept
    for index, head in enumerate(heads):
        table.add_column(
            Text(head[1:], "bold"),
            justify="right" if head[0] == ">" else "left",
            no_wrap=True,
            overflow="ellipsis",
            min_width=None if index in cut else longest[index],
            max_width=max(1, room // len(cut)) if index in cut else None,
        )
    for row in cells:
        table.add_row(*row)
    return Padding(table, (0, 0, 0, indent))
