"""Which codec every array gets where a program runs: the fastest pass within a budget of error.

What a byte saved is worth depends on the array: one that streams saves time on every link that it
crosses, one that stays saves room for others, and both change what steps take by the cost model.
"""

import math
from collections.abc import Sequence

from memsched.bound.encoded import Counts, fastest_counts
from memsched.bound.kinds import Kind, Variants, read_kinds
from memsched.bound.masses import read_masses
from memsched.codecs.choice import RAW, Candidate, Choice, Chosen, Subject, choose, saves
from memsched.cost import CostModel
from memsched.machine import Machine

# Multiples of it, without their whole parts: those below any limit lie evenly among all.
GOLDEN = (math.sqrt(5) - 1) / 2
Codecs = dict[str, Candidate | None]


def choose_placed(
    subjects: Sequence[Subject],
    variants: Variants,
    machine: Machine,
    cost: CostModel,
    *,
    error_budget: float,
    smallest_saving: float,
) -> Choice | None:
    """One codec for each array, so that the bound of a pass is least; None if no pass is possible.

    Of choices within a thousandth of the fastest pass the one with the least error is taken.

    Raises:
        ProgramError: as `choose`.
    """
    smallest = choose(subjects, error_budget=error_budget, smallest_saving=smallest_saving)
    masses = read_masses(variants.raw, machine, cost)
    kinds = read_kinds(variants, subjects, machine, cost, masses, smallest_saving=smallest_saving)
    counts = fastest_counts(masses, kinds, error_budget=error_budget)
    if counts is None:
        return None
    codecs = _within(_assigned(subjects, kinds, counts), subjects, error_budget)
    left = error_budget**2 - math.fsum(_square(one, codecs[one.name]) for one in subjects)
    chosen = (_chosen(one, codecs[one.name], left, smallest_saving) for one in subjects)
    return Choice(tuple(chosen), smallest.bound_bytes)


def _assigned(subjects: Sequence[Subject], kinds: Sequence[Kind], counts: Counts) -> Codecs:
    """Of each kind the members with the least error get the smallest forms; equal ones in turn."""
    known = {subject.name: subject for subject in subjects}
    found: Codecs = dict.fromkeys(known)
    for kind, numbers in zip(kinds, counts.of_kinds, strict=True):
        if len(kind.options) < 2:
            continue
        pairs = zip(kind.options, numbers, strict=True)
        wanted = sorted(pairs, key=lambda pair: pair[0].device_bytes)
        order = _order([known[name] for name in kind.members], wanted[0][0].codec)
        place = 0
        for option, number in wanted:
            for subject in order[place : place + number]:
                found[subject.name] = _candidate(subject, option.codec)
            place += number
    return found


def _order(members: Sequence[Subject], codec: str) -> list[Subject]:
    """By the error of a codec, in halves and doubles of the average; alike ones evenly.

    Finer differences gain little. Where kinds of one member a layer are in one order, layers have
    few mixtures of codecs, and each mixture is a program to compile.
    """
    squares = [_square(one, _candidate(one, codec)) for one in members]
    average = math.fsum(squares) / len(squares)
    order = [
        (round(math.log2(square / average)) if square and average else -math.inf)
        for square in squares
    ]
    spread = [number * GOLDEN % 1 for number in range(1, len(members) + 1)]
    ranks = sorted(range(len(members)), key=lambda index: (order[index], spread[index]))
    return [members[index] for index in ranks]


def _candidate(subject: Subject, codec: str) -> Candidate | None:
    return next((one for one in subject.candidates if one.codec == codec), None)


def _within(codecs: Codecs, subjects: Sequence[Subject], error_budget: float) -> Codecs:
    """Kinds have average errors. Where members sum to more, the worst become raw again."""
    worst = sorted(subjects, key=lambda one: _square(one, codecs[one.name]))
    kept = dict(codecs)
    limit = error_budget**2 * (1 - 1e-12)
    while math.fsum(_square(one, kept[one.name]) for one in subjects) > limit:
        kept[worst.pop().name] = None
    return kept


def _square(subject: Subject, candidate: Candidate | None) -> float:
    return 0.0 if candidate is None else (subject.sensitivity * candidate.error) ** 2


def _chosen(
    subject: Subject, candidate: Candidate | None, left: float, smallest_saving: float
) -> Chosen:
    codec, nbytes, error = RAW, subject.nbytes, 0.0
    if candidate is not None:
        codec, nbytes, error = candidate.codec, candidate.nbytes, candidate.error
        saved = round(100 * (1 - nbytes / subject.nbytes))
        reason = f"{codec}: saves {saved} %, error {error:.2g} x {subject.sensitivity:.2g}"
    else:
        reason = f"raw: {_why_raw(subject, left, smallest_saving)}"
    return Chosen(subject.name, subject.nbytes, subject.sensitivity, codec, nbytes, error, reason)


def _why_raw(subject: Subject, left: float, smallest_saving: float) -> str:
    if not subject.candidates:
        return "there is no codec for it"
    usable = [one for one in subject.candidates if saves(subject, one, smallest_saving)]
    if not usable:
        best = min(subject.candidates, key=lambda one: one.nbytes)
        return f"{best.codec} saves less than {100 * smallest_saving:g} %"
    mildest = min(usable, key=lambda one: (one.error, one.nbytes))
    needed = subject.sensitivity * mildest.error
    if needed**2 > left:
        have = math.sqrt(max(0.0, left))
        return f"budget spent; {mildest.codec} needs {needed:.2g} of it, {have:.2g} are left"
    return "an encoding of it makes no pass faster"
