"""Sets of bytes of an arena, as sorted half-open ranges that do not touch."""

from collections.abc import Iterable

Range = tuple[int, int]


def union(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The bytes that are in at least one of the ranges."""
    merged: list[Range] = []
    for first, end in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif first < end:
            merged.append((first, end))
    return tuple(merged)


def without(whole: Iterable[Range], gone: Iterable[Range]) -> tuple[Range, ...]:
    """The bytes of `whole` that are not in `gone`."""
    left = []
    holes = union(gone)
    for first, end in union(whole):
        for low, high in holes:
            if low < end and first < high:
                if first < low:
                    left.append((first, low))
                first = max(first, high)
        if first < end:
            left.append((first, end))
    return tuple(left)


def size(ranges: Iterable[Range]) -> int:
    """How many bytes the ranges hold."""
    return sum(end - first for first, end in ranges)
