"""Pinned weights of several phases in one pile, of which each phase keeps the lower part.

Who is kept in a small phase is kept in the larger ones too, at the same offset. So going from
phase to phase moves only the difference, and each phase has its ring on top of what it keeps.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

Choose = Callable[[Sequence[str], int], frozenset[str]]


@dataclasses.dataclass(frozen=True, slots=True)
class Stack:
    """Layers of weights, the lowest first. A phase keeps whole layers, from the bottom."""

    layers: tuple[tuple[str, ...], ...]
    sizes: Mapping[str, int]

    @property
    def names(self) -> tuple[str, ...]:
        """All weights, the lowest first."""
        return tuple(name for layer in self.layers for name in layer)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(self.sizes[name] for name in self.names)

    @property
    def offsets(self) -> dict[str, int]:
        """Where each weight lies."""
        offsets, end = {}, 0
        for name in self.names:
            offsets[name] = end
            end += self.sizes[name]
        return offsets

    def split(self, budget_bytes: int, choose: Choose) -> tuple["Stack", tuple[str, ...]]:
        """The stack with a border between layers at a budget or below, and all that lies under it.

        Args:
            budget_bytes: what the lower part may take.
            choose: picks from the layer that does not fit as a whole those that fit and stay.
        """
        under: tuple[str, ...] = ()
        for index, layer in enumerate(self.layers):
            room = budget_bytes - sum(self.sizes[name] for name in under)
            if sum(self.sizes[name] for name in layer) > room:
                kept = choose(layer, room)
                low = tuple(name for name in layer if name in kept)
                high = tuple(name for name in layer if name not in kept)
                halves = tuple(half for half in (low, high) if half)
                layers = (*self.layers[:index], *halves, *self.layers[index + 1 :])
                return dataclasses.replace(self, layers=layers), under + low
            under += layer
        return self, under
