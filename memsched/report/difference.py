"""What differs between two plans: of their reports as data, which may come from files."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from memsched.errors import DamagedError
from memsched.report.rendering import Group, RenderableType, columns, line
from memsched.report.text import seconds_text
from memsched.sizes import LARGEST_BYTES

NAMES = ("before", "after")
# What a report says of the plan as a whole, among its assumptions.
FACTS = ("model", "machine", "capacity_bytes", "bytes_per_s", "flops_per_s", "dtype", "request")
# Solvers leave so much between equal figures.
TOLERANCE = 1e-6
LARGEST_NUMBER = 1e30
# Longer lists of arrays are cut, and what is cut is counted.
LISTED = 10
MOST_ARRAYS = 1_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """Something that the plans are for, in words; it differs."""

    what: str
    before: str
    after: str


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One quantity of both; None where one has none of it. `unit` is "s", "B" or "tokens/s"."""

    what: str
    unit: str
    before: float | None
    after: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Moved:
    """An array that has another part or codec, or lies in another tier; None where it is not."""

    name: str
    nbytes: int
    before: str | None
    after: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """Facts that differ, names of others that are `alike`, and which of both are `refused`.

    Then rows that differ and `same` others that do not, arrays that changed, the largest first, and
    `unmoved` others. Of a refusal there are no rows and arrays.
    """

    facts: tuple[Fact, ...]
    alike: tuple[str, ...]
    refused: tuple[str, ...]
    rows: tuple[Row, ...] = ()
    same: int = 0
    moved: tuple[Moved, ...] = ()
    unmoved: int = 0


def difference(
    before: Mapping[str, Any], after: Mapping[str, Any], names: tuple[str, str] = NAMES
) -> Difference:
    """What the plans are for; rates, seconds, peaks and bytes over links, by phase; who moved.

    Args:
        names: of the reports, for errors.

    Raises:
        DamagedError: a value that no report has.
    """
    old, new = (_read(report, name) for report, name in zip((before, after), names, strict=True))
    known = [what for what in old.facts if what in new.facts]
    facts = [Fact(what, old.facts[what], new.facts[what]) for what in known]
    changed = tuple(fact for fact in facts if fact.before != fact.after)
    differing = {_head(fact.what) for fact in changed}
    alike = tuple(what for what in dict.fromkeys(map(_head, known)) if what not in differing)
    refused = tuple(which for which, one in zip(NAMES, (old, new), strict=True) if not one.fits)
    if refused:
        return Difference(changed, alike, refused)
    rows = _rows(old, new)
    moved, places = _moved(old, new), old.places.keys() & new.places.keys()
    unmoved = len(places) - len(places & {one.name for one in moved})
    same = len(old.values | new.values) - len(rows)
    return Difference(changed, alike, refused, rows, same, moved, unmoved)


def view(found: Difference) -> RenderableType:
    """To read."""
    facts = [(fact.what, fact.before, fact.after) for fact in found.facts]
    blocks: list[RenderableType] = []
    if facts:
        blocks = [columns(("<they differ in", "<before", "<after"), facts)]
    alike = ", ".join(found.alike) or "nothing of model, machine, dtype and request is known"
    blocks += [line(f"  the same in both: {alike}"), line("")]
    if found.refused:
        blocks += [line(f"  {one} is a refusal: no plan to compare") for one in found.refused]
        return Group(*blocks)
    return Group(*blocks, *_figures_view(found), *_arrays_view(found))


def _figures_view(found: Difference) -> list[RenderableType]:
    rows = [
        (row.what, _text(row.unit, row.before), _text(row.unit, row.after), _change(row))
        for row in found.rows
    ]
    table = [columns(("<", ">before", ">after", ">change"), rows)] if rows else []
    return [*table, line(f"  {found.same:,} figures are the same"), line("")]


def _arrays_view(found: Difference) -> list[RenderableType]:
    blocks: list[RenderableType] = []
    groups: dict[tuple[str | None, str | None], list[Moved]] = {}
    for one in found.moved:
        groups.setdefault((one.before, one.after), []).append(one)
    for (old, new), ones in groups.items():
        total = sum(one.nbytes for one in ones)
        way = f"from {old} to {new}"
        if old is None or new is None:
            way = f"only before: {old}" if new is None else f"only after: {new}"
        blocks.append(line(f"  {way}: {len(ones):,} arrays, {total:,} B"))
        blocks += [line(f"    {one.nbytes:>18,} B  {one.name}") for one in ones[:LISTED]]
        if rest := ones[LISTED:]:
            nbytes = sum(one.nbytes for one in rest)
            blocks.append(line(f"    {nbytes:>18,} B  in {len(rest):,} others"))
    if found.unmoved or not found.moved:
        stay = f"{found.unmoved:,} arrays are where they were"
        blocks.append(line(f"  {stay if found.unmoved else 'there are no arrays to compare'}"))
    return blocks


def _rows(old: "_Report", new: "_Report") -> tuple[Row, ...]:
    """Figures that differ by more than solvers do; bytes are exact."""
    rows = []
    for what, unit in old.values | new.values:
        before, after = old.values.get((what, unit)), new.values.get((what, unit))
        least = 0.0 if unit == "B" else TOLERANCE
        # A gap is a share already.
        near = {"rel_tol": least, "abs_tol": 0.0 if unit else TOLERANCE}
        if before is None or after is None or not math.isclose(before, after, **near):
            rows.append(Row(what, unit, before, after))
    return tuple(rows)


def _moved(old: "_Report", new: "_Report") -> tuple[Moved, ...]:
    moved = []
    for name in old.places | new.places:
        nbytes, before = old.places.get(name, (0, None))
        other_nbytes, after = new.places.get(name, (0, None))
        if before != after:
            moved.append(Moved(name, nbytes or other_nbytes, before, after))
    return tuple(sorted(moved, key=lambda one: (-one.nbytes, one.name)))


def _head(what: str) -> str:
    return what.partition(".")[0]


@dataclasses.dataclass(frozen=True, slots=True)
class _Report:
    """A report that was read: figures by name and unit, bytes and place of every array."""

    fits: bool
    facts: Mapping[str, str]
    values: dict[tuple[str, str], float]
    places: dict[str, tuple[int, str]]


def _read(report: Mapping[str, Any], name: str) -> _Report:
    fits = report.get("fits", True)
    if not isinstance(fits, bool):
        raise _damaged(f"{name}: fits", "true or false", fits)
    values = {what: value for what, value in _values(report, name) if value is not None}
    facts = dict(_facts(report, name))
    if "fits" in report:
        facts["fits"] = "yes" if fits else "no"
    return _Report(fits, facts, values, dict(_places(report, name)))


def _facts(report: Mapping[str, Any], name: str) -> Iterator[tuple[str, str]]:
    """What a report says of its plan as a whole, in words."""
    said = _table(f"{name}: assumptions", report.get("assumptions", {}))
    for what in FACTS:
        if isinstance(said.get(what), dict):
            for key, value in _table(f"{name}: {what}", said[what]).items():
                yield f"{what}.{key}", _words(f"{name}: {what}.{key}", value)
        elif what in said:
            yield what, _words(f"{name}: {what}", said[what])


def _words(where: str, value: Any) -> str:
    if isinstance(value, str) and value.isprintable():
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = _number(where, value)
        return f"{number:,.0f}" if isinstance(value, int) else f"{number:,.6g}"
    return json.dumps(value)


def _values(report: Mapping[str, Any], name: str) -> Iterator[tuple[tuple[str, str], float | None]]:
    """All figures of a report under their names and units."""
    for key, unit in (("tokens_per_s", "tokens/s"), ("first_token_seconds", "s"), ("gap", "")):
        # Rounding can bring a plan below its bound.
        yield (key, unit), _number(f"{name}: {key}", report.get(key), least=-1 if not unit else 0)
    for part, phase in _table(f"{name}: phases", report.get("phases", {})).items():
        where = f"{name}: phases.{part[:60]}"
        phase = _table(where, phase)
        for key in ("seconds", "bound_seconds"):
            yield (f"{part} {key}", "s"), _number(f"{where}.{key}", phase.get(key))
        for key, words in (("link_bytes", "over"), ("peak_bytes", "peak of")):
            for end, nbytes in _table(f"{where}.{key}", phase.get(key, {})).items():
                yield (f"{part} {words} {end}", "B"), _number(f"{where}.{key}", nbytes)


def _places(report: Mapping[str, Any], name: str) -> Iterator[tuple[str, tuple[int, str]]]:
    """Bytes and place of every array: its role, its tier, and its codec if it has one."""
    arrays = report.get("arrays", [])
    if not isinstance(arrays, list) or len(arrays) > MOST_ARRAYS:
        raise _damaged(f"{name}: arrays", f"a list of at most {MOST_ARRAYS:,}", type(arrays))
    for array in arrays:
        row = _table(f"{name}: an array", array)
        match row | {"codec": row.get("codec", "raw")}:
            case {
                "name": str() as key,
                "nbytes": int() as nbytes,
                "tier": str() as tier,
                "why": str() as why,
                "codec": str() as codec,
            } if (
                0 <= nbytes <= LARGEST_BYTES
                and not isinstance(nbytes, bool)
                and (key + tier + why + codec).isprintable()
            ):
                place = tier if codec == "raw" else f"{tier}, {codec}"
                yield key, (nbytes, f"{why.partition(':')[0]} ({place})")
            case _:
                wanted = "one with printable name, nbytes, tier, why and codec"
                raise _damaged(f"{name}: an array", wanted, array)


def _table(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _damaged(where, "an object", value)
    for key in value:
        # They are shown, and a terminal obeys some characters.
        if not key.isprintable():
            raise _damaged(f"{where}: a name", "printable", key)
    return value


def _number(where: str, value: Any, least: int = 0) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _damaged(where, "a number", value)
    # An integer may be too large for a float, and 1e400 is infinite.
    if not least <= value <= LARGEST_NUMBER:
        raise _damaged(where, f"a number from {least} to {LARGEST_NUMBER:g}", value)
    return float(value)


def _damaged(where: str, wanted: str, found: Any) -> DamagedError:
    return DamagedError(
        f"{where} must be {wanted}, found {ascii(found)[:60]}; make the report anew"
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
    return dataclasses.asdict(found)
