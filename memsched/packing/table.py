"""Items from a CSV file, and back with their offsets. Nothing in the file is trusted."""

import csv
import io
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from memsched.errors import DamagedError, StoreError
from memsched.packing.items import Item
from memsched.whole_file import appearing

NEEDED = ("id", "lower", "upper", "size")
OPTIONAL = ("alignment",)
MOST_BYTES = 64 << 20
MOST_ITEMS = 100_000
# Sums of so many sizes and alignments stay exact.
LARGEST_SIZE = 1 << 42


def read_items(path: Path) -> list[Item]:
    """The items of a file with columns id, lower, upper, size and, if wanted, alignment.

    Raises:
        DamagedError: no such file, or one that breaks a rule; with the line.
        StoreError: it cannot be read.
    """
    rows = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    items: list[Item] = []
    lines: dict[str, int] = {}
    try:
        header = [name.strip() for name in next(rows, [])]
        _check_header(path, header)
        for row in rows:
            if not row:
                continue
            where = f"{path}, line {rows.line_num}"
            item = _item(where, header, row)
            if item.id in lines:
                raise DamagedError(
                    f"{where}: id {_short(item.id)} was there on line {lines[item.id]}; "
                    "give every item its own"
                )
            lines[item.id] = rows.line_num
            items.append(item)
            if len(items) > MOST_ITEMS:
                raise DamagedError(
                    f"{path} has more than {MOST_ITEMS:,} items; pack fewer at a time"
                )
    except csv.Error as error:
        raise DamagedError(f"{path}, line {rows.line_num}: {error}; write it as CSV") from error
    return items


def write_items(path: Path, items: Sequence[Item], offsets: Sequence[int]) -> None:
    """The same columns and the offsets. The file appears whole or not at all.

    Raises:
        StoreError: it cannot be written.
    """
    optional = OPTIONAL if any(item.alignment != 1 for item in items) else ()
    with appearing(path) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow((*NEEDED, *optional, "offset"))
        for item, offset in zip(items, offsets, strict=True):
            row = [item.id, item.lower, item.upper, item.size, item.alignment]
            table.writerow((*row[: len(NEEDED) + len(optional)], offset))


def _text(path: Path) -> str:
    try:
        # A pipe or a device may have no end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise DamagedError(f"{path} is not a regular file; give a CSV file")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise DamagedError(f"there is no file {path}; give a CSV file") from error
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; check that it can be read") from error
    if len(data) > MOST_BYTES:
        raise DamagedError(f"{path} has more than {MOST_BYTES:,} B; pack fewer items at a time")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DamagedError(
            f"{path}: byte {error.start} is not UTF-8; write it as CSV in UTF-8"
        ) from error


def _check_header(path: Path, header: Sequence[str]) -> None:
    wanted = f"columns {','.join(NEEDED)} (and {','.join(OPTIONAL)} if any)"
    for name in NEEDED:
        if name not in header:
            raise DamagedError(f"{path}, line 1: there is no column {name!r}; wanted {wanted}")
    for name in header:
        if name not in NEEDED + OPTIONAL or header.count(name) > 1:
            twice = "is there twice" if header.count(name) > 1 else "is not known"
            raise DamagedError(f"{path}, line 1: column {_short(name)} {twice}; wanted {wanted}")


def _item(where: str, header: Sequence[str], row: Sequence[str]) -> Item:
    if len(row) != len(header):
        raise DamagedError(f"{where} has {len(row)} fields; wanted {len(header)}, as in line 1")
    fields = dict(zip(header, row, strict=True))
    name = fields.pop("id")
    if not name.strip():
        raise DamagedError(f"{where}: the id is empty; give every item its own")
    numbers = {column: _number(where, column, text) for column, text in fields.items()}
    if numbers["lower"] >= numbers["upper"]:
        raise DamagedError(
            f"{where}: item {_short(name)} lives from {numbers['lower']} to {numbers['upper']}; "
            "upper must be above lower"
        )
    if numbers.get("alignment") == 0:
        raise DamagedError(f"{where}: item {_short(name)} has alignment 0; wanted 1 or more")
    return Item(name, **numbers)


def _number(where: str, column: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text.strip(), re.ASCII):
        raise DamagedError(f"{where}: {column} is {_short(text)}; wanted a whole number, 0 or more")
    number = int(text)
    if column in ("size", "alignment") and number > LARGEST_SIZE:
        raise DamagedError(f"{where}: {column} is {number:,}; wanted at most {LARGEST_SIZE:,}")
    return number


def _short(text: str) -> str:
    """For a message of one line."""
    return ascii(text if len(text) <= 40 else text[:37] + "...")
