"""The experts of a layer get one codec: a step computes several, and each mixture would be another
program to compile.

groups = together(subjects)
choice = apart(choose([group.subject for group in groups], ...), groups)
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from memsched.codecs.choice import Candidate, Choice, Subject

EXPERTS = ".experts."


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Subjects that get one codec, and all of them as one subject."""

    subject: Subject
    members: tuple[Subject, ...]


def together(subjects: Iterable[Subject]) -> list[Group]:
    """Matrices with those that get the same codec, in the order of the first ones."""
    found: dict[str, list[Subject]] = {}
    for subject in subjects:
        found.setdefault(_group_name(subject.name), []).append(subject)
    return [Group(_joined(name, members), tuple(members)) for name, members in found.items()]


def apart(choice: Choice, groups: Sequence[Group]) -> Choice:
    """What was chosen for groups, for each member."""
    members = {group.subject.name: group.members for group in groups}
    arrays = []
    for one in choice.arrays:
        for member in members[one.name]:
            own = next((c for c in member.candidates if c.codec == one.codec), None)
            arrays.append(
                dataclasses.replace(
                    one,
                    name=member.name,
                    raw_bytes=member.nbytes,
                    sensitivity=member.sensitivity,
                    nbytes=own.nbytes if own else member.nbytes,
                    error=own.error if own else 0.0,
                )
            )
    return Choice(tuple(arrays), choice.bound_bytes)


def _group_name(name: str) -> str:
    """ "layers.3.mlp.experts.7.down_proj" without the 7; any other name as it is."""
    layer, experts, rest = name.partition(EXPERTS)
    return f"{layer}{EXPERTS}{rest.partition('.')[2]}" if experts else name


def _joined(name: str, members: Sequence[Subject]) -> Subject:
    if len(members) == 1:
        return dataclasses.replace(members[0], name=name)
    sensitivity = math.sqrt(math.fsum(member.sensitivity**2 for member in members))
    by_codec: dict[str, list[tuple[Subject, Candidate]]] = {}
    for member in members:
        for one in member.candidates:
            by_codec.setdefault(one.codec, []).append((member, one))
    candidates = []
    for codec, pairs in by_codec.items():
        if len(pairs) == len(members):
            moved = math.sqrt(math.fsum((m.sensitivity * one.error) ** 2 for m, one in pairs))
            error = moved / sensitivity if sensitivity else 0.0
            candidates.append(Candidate(codec, sum(one.nbytes for _, one in pairs), error))
    nbytes = sum(member.nbytes for member in members)
    return Subject(name, nbytes, sensitivity, tuple(candidates))
