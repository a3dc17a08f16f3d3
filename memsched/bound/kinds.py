"""Weights that are alike, with the codecs that each may have: what one of them takes and moves.

A subject of a choice is one or more weights of a program (a matrix in blocks) that get one codec.
All weights that may not be encoded are kinds, too, with nothing to choose.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from memsched.bound.masses import Masses, weight_numbers
from memsched.codecs.choice import RAW, Subject, saves
from memsched.cost import CostModel
from memsched.machine import Machine
from memsched.plan import Run
from memsched.program import Program

Numbers = tuple[int, int, float, float]


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """What a codec makes of one member of a kind; bytes and copies as of `WeightClass`.

    `square` is what it adds to the square of the output's error, on average. `compute_s` is what
    steps take beyond what they take with raw weights; less than 0 where fewer bytes are faster.
    """

    codec: str
    square: float
    device_bytes: int
    host_bytes: int
    arrival_s: float
    staging_s: float
    compute_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """Members that take the same and may become the same; the first option is raw.

    `shares` is as of `WeightClass`, by bytes.
    """

    members: tuple[str, ...]
    shares: Mapping[int, float]
    options: tuple[Option, ...]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.members)


@dataclasses.dataclass(frozen=True, slots=True)
class Variants:
    """One program in several codecs: what a choice of codecs is made for.

    Attributes:
        raw: with raw weights.
        encoded: by codec, the same with every weight in it that can be.
        parts: the weights of the program that each subject is.
    """

    raw: Program
    encoded: Mapping[str, Program]
    parts: Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True, slots=True)
class _Table:
    """Numbers of all weights, and what a step takes more for each, by codec."""

    numbers: Mapping[str, Mapping[str, Numbers]]
    compute_s: Mapping[str, Mapping[str, float]]


def read_kinds(
    variants: Variants,
    subjects: Sequence[Subject],
    machine: Machine,
    cost: CostModel,
    masses: Masses,
    *,
    smallest_saving: float,
) -> tuple[Kind, ...]:
    """All weights that a program reads, by kind, in the order of their first readers.

    Args:
        masses: of the raw program.
    """
    shares = {name: one.shares for one in masses.weights for name in one.names}
    table = _table(variants, machine, cost, shares)
    known = {subject.name: subject for subject in subjects}
    owner = {part: name for name in known for part in variants.parts[name]}
    names = dict.fromkeys(owner.get(name, name) for name in shares)
    found: dict[tuple[tuple[str, ...], object], list[str]] = {}
    for name in names:
        parts = variants.parts.get(name, (name,))
        codecs = _usable(known.get(name), smallest_saving)
        label = tuple((table.numbers[RAW][part], tuple(shares[part].items())) for part in parts)
        alike = label, known[name].sensitivity if codecs else 0.0
        found.setdefault((codecs, alike), []).append(name)
    return tuple(
        _kind(members, _mean_squares(known, members, codecs), variants, shares, table)
        for (codecs, _), members in found.items()
    )


def _usable(subject: Subject | None, smallest_saving: float) -> tuple[str, ...]:
    """The codecs that save enough."""
    if subject is None:
        return ()
    return tuple(one.codec for one in subject.candidates if saves(subject, one, smallest_saving))


def _table(variants: Variants, machine: Machine, cost: CostModel, names: Iterable[str]) -> _Table:
    listed = list(names)
    programs = {RAW: variants.raw, **variants.encoded}
    numbers = {
        codec: weight_numbers(program, machine, cost, listed) for codec, program in programs.items()
    }
    compute_s = {
        codec: _compute_s(variants.raw, program, machine, cost)
        for codec, program in variants.encoded.items()
    }
    return _Table(numbers, compute_s)


def _compute_s(
    raw: Program, encoded: Program, machine: Machine, cost: CostModel
) -> dict[str, float]:
    """What steps take more, divided among the weights that they read by the bytes these save."""
    found: dict[str, float] = {}
    for step in raw.steps:
        saved = {
            name: raw.arrays[name].nbytes - encoded.arrays[name].nbytes
            for name in dict.fromkeys(step.reads)
            if encoded.arrays[name] != raw.arrays[name]
        }
        total = sum(saved.values())
        if total:
            run = Run(step.name)
            more_s = cost.seconds(run, encoded, machine) - cost.seconds(run, raw, machine)
            for name, nbytes in saved.items():
                found[name] = found.get(name, 0.0) + more_s * nbytes / total
    return found


def _kind(
    members: Sequence[str],
    squares: Mapping[str, float],
    variants: Variants,
    shares: Mapping[str, Mapping[int, float]],
    table: _Table,
) -> Kind:
    parts, raw = variants.parts.get(members[0], (members[0],)), table.numbers[RAW]
    options = [_option(RAW, 0.0, parts, raw, {})]
    for codec, square in squares.items():
        numbers = table.numbers[codec]
        if any(numbers[part] != raw[part] for part in parts):
            options.append(_option(codec, square, parts, numbers, table.compute_s[codec]))
    mixed: dict[int, float] = {}
    for part in parts:
        for window, share in shares[part].items():
            by_bytes = share * raw[part][0] / (options[0].device_bytes or 1)
            mixed[window] = mixed.get(window, 0.0) + by_bytes
    return Kind(tuple(members), MappingProxyType(mixed), tuple(options))


def _mean_squares(
    known: Mapping[str, Subject], members: Sequence[str], codecs: Sequence[str]
) -> dict[str, float]:
    totals = dict.fromkeys(codecs, 0.0)
    for name in members if codecs else ():
        subject = known[name]
        for one in subject.candidates:
            if one.codec in totals:
                totals[one.codec] += (subject.sensitivity * one.error) ** 2
    return {codec: total / len(members) for codec, total in totals.items()}


def _option(
    codec: str,
    square: float,
    parts: Sequence[str],
    numbers: Mapping[str, Numbers],
    compute_s: Mapping[str, float],
) -> Option:
    sums = [sum(column) for column in zip(*(numbers[part] for part in parts), strict=True)]
    device_bytes, host_bytes, arrival_s, staging_s = sums
    more_s = sum(compute_s.get(part, 0.0) for part in parts)
    return Option(codec, square, int(device_bytes), int(host_bytes), arrival_s, staging_s, more_s)
