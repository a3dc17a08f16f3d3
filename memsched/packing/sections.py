"""Items as arrays, over the moments that matter: those when as many live as ever around them.

Between two such moments nothing new can collide: a section is a largest set of items that live
together, and every item covers a range of sections.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from memsched.packing.items import Item

# The lowest offset of what has been placed: above every real one, with room to add to it.
_FAR = {np.dtype(np.int32): 1 << 30, np.dtype(np.int64): 1 << 62}


@dataclasses.dataclass(frozen=True, slots=True)
class SpanTree:
    """A binary tree over the sections: its leaves are these, node n has the children 2n, 2n + 1.

    Every item belongs to the few nodes that make up its range. `members` lists the items of the
    `nodes` that have any, one node after the other; those of nodes[k] start at begins[k].
    """

    leaves: int
    sections: int
    nodes: np.ndarray
    members: np.ndarray
    begins: np.ndarray

    def lowest(self, values: np.ndarray, far: int) -> np.ndarray:
        """For each section the lowest value of its items; [item, column] -> [section, column]."""
        tree = np.full((2 * self.leaves, values.shape[1]), far, values.dtype)
        tree[self.nodes] = np.minimum.reduceat(values[self.members], self.begins, axis=0)
        node = 1
        while node < self.leaves:
            children = tree[2 * node : 4 * node].reshape(node, 2, -1)
            np.minimum(children, tree[node : 2 * node, None], out=children)
            node *= 2
        return tree[self.leaves : self.leaves + self.sections]


def span_tree(first: np.ndarray, last: np.ndarray, sections: int) -> SpanTree:
    """The tree of some items, each of which covers the sections from `first` to before `last`."""
    leaves = 1 << max(0, sections - 1).bit_length()
    pairs = []
    for item, (low, high) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        low, high = low + leaves, high + leaves
        while low < high:
            if low % 2:
                pairs.append((low, item))
                low += 1
            if high % 2:
                high -= 1
                pairs.append((high, item))
            low, high = low // 2, high // 2
    node, members = np.array(sorted(pairs)).T
    nodes, begins = np.unique(node, return_index=True)
    return SpanTree(leaves, sections, nodes, members, begins)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Items as rows, sections as columns, and all numbers of bytes in multiples of `unit`.

    Arrays over items: `size`, `alignment`, `fixed` (the offset, or -1), `first` section and the
    one after the `last`, `twin` (an earlier item just like it, or -1). `covers[item, section]`,
    `collides[item, item]`.
    """

    unit: int
    size: np.ndarray
    alignment: np.ndarray
    fixed: np.ndarray
    first: np.ndarray
    last: np.ndarray
    twin: np.ndarray
    covers: np.ndarray
    collides: np.ndarray
    spans: SpanTree

    @functools.cached_property
    def load(self) -> np.ndarray:
        """What each item adds to each section: [section, item]."""
        return np.where(self.covers.T, self.size, 0).astype(self.size.dtype)

    @functools.cached_property
    def mixing(self) -> np.ndarray:
        """Random factors for each item: the sum of factor x offset tells packings apart."""
        return np.random.default_rng(0).integers(1 << 62, size=len(self.size), dtype=np.int64)

    @property
    def far(self) -> int:
        """An offset above every real one."""
        return _FAR[self.size.dtype]


def problem_of(items: Sequence[Item]) -> Problem:
    """The arrays of some items, none of them empty. Memory: their number squared."""
    first, last = (np.array(ends) for ends in section_ranges(items))
    sections = np.arange(last.max())
    covers = (first[:, None] <= sections) & (sections < last[:, None])
    collides = (first[:, None] < last) & (first < last[:, None])
    np.fill_diagonal(collides, False)
    unit = unit_of(items)
    number = _number_type(items, unit)
    return Problem(
        unit=unit,
        size=np.array([item.size // unit for item in items], number),
        alignment=np.array([max(1, item.alignment // unit) for item in items], number),
        fixed=np.array([-1 if i.offset is None else i.offset // unit for i in items], number),
        first=first,
        last=last,
        twin=np.array(_twins(items)),
        covers=covers,
        collides=collides,
        spans=span_tree(first, last, len(sections)),
    )


def section_ranges(items: Sequence[Item]) -> tuple[list[int], list[int]]:
    """First section of every item, and the one after its last."""
    # At equal times ends come before starts: lifetimes are half-open.
    events = sorted(
        [(item.lower, 1, index) for index, item in enumerate(items)]
        + [(item.upper, 0, index) for index, item in enumerate(items)]
    )
    first, last = [0] * len(items), [0] * len(items)
    section, growing = 0, False
    for _, starts, index in events:
        if starts:
            first[index] = section
        else:
            section += growing
            last[index] = section
        growing = bool(starts)
    return first, last


def unit_of(items: Sequence[Item]) -> int:
    """A number that divides all sizes, fixed offsets and alignments over 1: so all offsets too."""
    offsets = (item.offset for item in items if item.offset is not None)
    alignments = (item.alignment for item in items if item.alignment > 1)
    return max(1, math.gcd(*offsets, *alignments, *(item.size for item in items)))


def _number_type(items: Sequence[Item], unit: int) -> type[np.int32] | type[np.int64]:
    """int32 where nothing can overflow: there are half as many bytes to move."""
    highest = max((item.offset or 0 for item in items), default=0)
    highest += sum(item.size + item.alignment for item in items)
    return np.int32 if highest // unit < _FAR[np.dtype(np.int32)] // 4 else np.int64


def _twins(items: Sequence[Item]) -> list[int]:
    """For each item an earlier one with the same lifetime, size and alignment, or -1."""
    latest: dict[tuple[int, int, int, int], int] = {}
    twins = []
    for index, item in enumerate(items):
        like = (item.lower, item.upper, item.size, item.alignment)
        twins.append(-1 if item.offset is not None else latest.get(like, -1))
        if item.offset is None:
            latest[like] = index
    return twins
