"""What is packed and what comes out: items with lifetimes, and their offsets."""

import dataclasses
import itertools
from collections.abc import Sequence

from memsched.errors import ProgramError


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """`size` bytes that are needed from time `lower` until just before `upper`.

    The offset will be a multiple of `alignment`. Where `offset` is given, the item already lies
    there and cannot be moved.
    """

    id: str
    lower: int
    upper: int
    size: int
    alignment: int = 1
    offset: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Packing:
    """Offsets of the items, in their order.

    `peak` is where the highest one ends. No packing ends below `bound`: the largest sum of sizes
    that live at one time, or the end of a fixed item if that is higher.
    """

    offsets: tuple[int, ...]
    peak: int
    bound: int

    @property
    def fragmentation(self) -> float:
        """The part of the peak that lies beyond the bound."""
        return 1 - self.bound / self.peak if self.peak else 0.0


# All offsets, and sums of an offset and a size, are exact in 64 bits below it.
_MOST_BYTES = 1 << 60


def check(items: Sequence[Item]) -> None:
    """Raises ProgramError for an item that cannot exist, two of one id, or too many bytes."""
    seen: set[str] = set()
    for item in items:
        name = f"item {item.id!r}"
        if item.id in seen:
            raise ProgramError(f"{name} is there twice; every id may be given once")
        seen.add(item.id)
        if item.lower >= item.upper:
            raise ProgramError(
                f"{name} lives from {item.lower} to {item.upper}; upper must be above lower"
            )
        if item.size < 0:
            raise ProgramError(f"{name} has {item.size:,} B; a size is 0 or more")
        if item.alignment < 1:
            raise ProgramError(f"{name} is aligned to {item.alignment}; wanted 1 or more")
        if item.offset is not None and (item.offset < 0 or item.offset % item.alignment):
            raise ProgramError(
                f"{name} is fixed at offset {item.offset}; "
                f"wanted a multiple of {item.alignment}, 0 or more"
            )
    highest = max((item.offset or 0 for item in items), default=0)
    highest += sum(item.size + item.alignment for item in items)
    if highest >= _MOST_BYTES:
        raise ProgramError(
            f"{len(items):,} items could reach {highest:,} B; at most {_MOST_BYTES:,} B are packed"
        )
    _check_fixed(items)


def _check_fixed(items: Sequence[Item]) -> None:
    fixed = sorted((item for item in items if item.offset is not None), key=lambda i: i.lower)
    alive: list[Item] = []
    for item in fixed:
        alive = [other for other in alive if other.upper > item.lower]
        for other in alive:
            if _overlap(item, other):
                raise ProgramError(
                    f"items {other.id!r} and {item.id!r} are fixed at offsets {other.offset} and "
                    f"{item.offset}, where they overlap; free one of the two"
                )
        alive.append(item)


def _overlap(one: Item, other: Item) -> bool:
    """Whether two fixed items share a byte. They are known to share a time."""
    assert one.offset is not None
    assert other.offset is not None
    return one.offset < other.offset + other.size and other.offset < one.offset + one.size


def largest_live_sum(items: Sequence[Item]) -> int:
    """The most bytes that live at one time, and at least where the highest fixed item ends."""
    changes: dict[int, int] = {}
    for item in items:
        changes[item.lower] = changes.get(item.lower, 0) + item.size
        changes[item.upper] = changes.get(item.upper, 0) - item.size
    sums = itertools.accumulate(changes[time] for time in sorted(changes))
    fixed = (item.offset + item.size for item in items if item.offset is not None)
    return max(itertools.chain(sums, fixed), default=0)
