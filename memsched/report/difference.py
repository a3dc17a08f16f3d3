"""What differs between two plans: of their reports as data, which may come from files."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from memsched.errors import DamagedError
from memsched.report.rendering import Group, RenderableType, columns, line
from memsched.report.text import seconds_text

# Longer lists of arrays are cut, and what is cut is counted.
LISTED = 10
MOST_ARRAYS = 1_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One quantity of both; None where one has none of it. `unit` is "s", "B" or "tokens/s"."""

    what: str
    unit: str
    before: float | None
    after: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Moved:
    """An array that has another part, or lies in another tier."""

    name: str
    nbytes: int
    before: str
    after: str


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """Rows that differ, `same` others that do not, and arrays that changed, the largest first."""

    rows: tuple[Row, ...]
    same: int
    moved: tuple[Moved, ...]


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> Difference:
    """Rates, seconds, peaks and bytes over links, by phase, and who moved.

    Raises:
        DamagedError: a value that no report has.
    """
    values = [dict(_values(report)) for report in (before, after)]
    rows = [
        Row(what, unit, values[0].get((what, unit)), values[1].get((what, unit)))
        for what, unit in dict.fromkeys([*values[0], *values[1]])
    ]
    differing = tuple(row for row in rows if row.before != row.after)
    return Difference(differing, len(rows) - len(differing), _moved(before, after))


def view(found: Difference) -> RenderableType:
    """To read."""
    blocks: list[RenderableType] = [
        columns(
            ("<", ">before", ">after", ">change"),
            [
                (row.what, _text(row.unit, row.before), _text(row.unit, row.after), _change(row))
                for row in found.rows
            ],
        ),
        line(f"  {found.same:,} figures are the same"),
        line(""),
    ]
    groups: dict[tuple[str, str], list[Moved]] = {}
    for one in found.moved:
        groups.setdefault((one.before, one.after), []).append(one)
    for (old, new), ones in groups.items():
        total = sum(one.nbytes for one in ones)
        blocks.append(line(f"  from {old} to {new}: {len(ones):,} arrays, {total:,} B"))
        blocks += [line(f"    {one.nbytes:>18,} B  {one.name}") for one in ones[:LISTED]]
        if rest := ones[LISTED:]:
            nbytes = sum(one.nbytes for one in rest)
            blocks.append(line(f"    {nbytes:>18,} B  in {len(rest):,} others"))
    if not found.moved:
        blocks.append(line("  every array is where it was"))
    return Group(*blocks)


def _values(report: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], float | None]]:
    """All figures of a report under their names and units."""
    for name, unit in (("tokens_per_s", "tokens/s"), ("first_token_seconds", "s"), ("gap", "")):
        if name in report:
            yield (name, unit), _number(name, report[name])
    for part, phase in _table("phases", report.get("phases", {})).items():
        phase = _table(f"phases.{part}", phase)
        for name in ("seconds", "bound_seconds"):
            yield (f"{part} {name}", "s"), _number(name, phase.get(name))
        for name, words in (("link_bytes", "over"), ("peak_bytes", "peak of")):
            for key, nbytes in _table(name, phase.get(name, {})).items():
                yield (f"{part} {words} {key}", "B"), _number(name, nbytes)


def _moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Moved, ...]:
    old, new = (_parts(report) for report in (before, after))
    moved = [
        Moved(name, nbytes, part, new[name][1])
        for name, (nbytes, part) in old.items()
        if name in new and new[name][1] != part
    ]
    return tuple(sorted(moved, key=lambda one: (-one.nbytes, one.name)))


def _parts(report: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Bytes and part of every array: its role and its tier."""
    arrays = report.get("arrays", [])
    if not isinstance(arrays, list) or len(arrays) > MOST_ARRAYS:
        raise DamagedError("report: arrays must be a list; make the report anew")
    found = {}
    for array in arrays:
        row = _table("an array", array)
        name, nbytes, tier, why = (row.get(key) for key in ("name", "nbytes", "tier", "why"))
        words = all(isinstance(word, str) for word in (name, tier, why))
        if not words or type(nbytes) is not int:
            raise DamagedError(
                f"report: an array must have name, nbytes, tier and why: {ascii(array)[:60]}; "
                "make the report anew"
            )
        found[str(name)] = (nbytes, f"{str(why).partition(':')[0]} ({tier})")
    return found


def _table(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DamagedError(f"report: {where[:60]} must be an object; make the report anew")
    return value


def _number(where: str, value: Any) -> float | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return None if value is None else float(value)
    raise DamagedError(
        f"report: {where} must be a number, found {ascii(value)[:60]}; make the report anew"
    )


def _text(unit: str, value: float | None) -> str:
    if value is None:
        return "-"
    if unit == "s":
        return seconds_text(value)
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.4g} {unit}".rstrip()


def _change(row: Row) -> str:
    if not row.before or row.after is None:
        return ""
    return f"{row.after / row.before - 1:+.1%}"


def rows_dict(found: Difference) -> dict[str, Any]:
    """As data, for JSON."""
    rows: Sequence[Row | Moved] = found.rows
    return {
        "rows": [dataclasses.asdict(row) for row in rows],
        "same": found.same,
        "moved": [dataclasses.asdict(one) for one in found.moved],
    }
