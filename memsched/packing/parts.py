"""A problem taken apart: what lives all the time lies at the ground, what never meets is separate.

Neither can cost anything, so no search has to find it out.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from memsched.packing.items import Item


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Items, by index, that can be packed on top of `base` without a look at the others."""

    indices: tuple[int, ...]
    base: int


def split(items: Sequence[Item]) -> tuple[dict[int, int], list[Part]]:
    """Offsets of the items whose place is clear, and the parts that the others fall into."""
    offsets = {index: item.offset or 0 for index, item in enumerate(items) if not item.size}
    groups = [Part(tuple(index for index, item in enumerate(items) if item.size), 0)]
    parts = []
    while groups:
        group = groups.pop()
        for indices in _separate(items, group.indices):
            ground = _ground(items, indices)
            base = group.base
            for index in sorted(ground):
                offsets[index] = base
                base += items[index].size
            rest = tuple(index for index in indices if index not in ground)
            if ground and rest:
                groups.append(Part(rest, base))
            elif rest:
                parts.append(Part(rest, base))
    return offsets, parts


def _separate(items: Sequence[Item], indices: Sequence[int]) -> Iterator[list[int]]:
    """Groups of items between moments when none is alive."""
    group: list[int] = []
    end = 0
    for index in sorted(indices, key=lambda index: (items[index].lower, index)):
        if group and items[index].lower >= end:
            yield group
            group = []
        end = max(end, items[index].upper) if group else items[index].upper
        group.append(index)
    if group:
        yield group


def _ground(items: Sequence[Item], indices: Sequence[int]) -> set[int]:
    """Items that live as long as the whole group, if they can be put below all others.

    Exchanged with what lies below it, such an item moves that by its own size: all must stay
    aligned, and nothing may be fixed.
    """
    group = [items[index] for index in indices]
    if any(item.offset is not None for item in group):
        return set()
    lower, upper = min(item.lower for item in group), max(item.upper for item in group)
    alignment = math.lcm(*(item.alignment for item in group))
    return {
        index
        for index in indices
        if (items[index].lower, items[index].upper) == (lower, upper)
        and items[index].size % alignment == 0
    }
