"""Who leaves when room is needed: rules that look ahead, and rules that look back.

Reading is cyclic, so the future is known: `Belady` (1966) lets go what is read last. The others
look back, as caches at run time must. On a cycle larger than the memory they let go exactly what is
needed next; they are here to be compared with.
"""

import bisect
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Protocol, runtime_checkable


@runtime_checkable
class Policy(Protocol):
    """Chooses who leaves. It is told of every use, arrival and departure."""

    def used(self, name: str, step: int) -> None:
        """A weight that is there is read by a step."""
        ...

    def came(self, name: str, nbytes: int) -> None:
        """A weight has come."""
        ...

    def victim(self, names: Collection[str], step: int) -> str:
        """The one of these that leaves before a step."""
        ...

    def left(self, name: str) -> None:
        """A weight has left."""
        ...


PolicyMaker = Callable[[Mapping[str, tuple[int, ...]], int, int], Policy]


class Belady:
    """Lets go what is read furthest in the future, be it the weight that came last (bypass)."""

    def __init__(self, uses: Mapping[str, tuple[int, ...]], steps: int, _capacity: int) -> None:
        self._uses = uses
        self._steps = steps

    def used(self, name: str, step: int) -> None:
        """Nothing to remember."""

    def came(self, name: str, nbytes: int) -> None:
        """Nothing to remember."""

    def victim(self, names: Collection[str], step: int) -> str:
        """The one read furthest in the future."""
        return max(names, key=lambda name: (self._next_use(name, step), name))

    def left(self, name: str) -> None:
        """Nothing to remember."""

    def _next_use(self, name: str, step: int) -> int:
        turn, place = divmod(step, self._steps)
        uses = self._uses[name]
        at = bisect.bisect_left(uses, place)
        later = uses[at] if at < len(uses) else uses[0] + self._steps
        return later + turn * self._steps


class Lru:
    """Lets go what was read longest ago."""

    def __init__(self, _uses: Mapping[str, tuple[int, ...]], _steps: int, _capacity: int) -> None:
        self._order: OrderedDict[str, None] = OrderedDict()

    def used(self, name: str, step: int) -> None:
        """Becomes the youngest."""
        self._order.move_to_end(name)

    def came(self, name: str, nbytes: int) -> None:
        """Is the youngest."""
        self._order[name] = None

    def victim(self, names: Collection[str], step: int) -> str:
        """The oldest."""
        return next(name for name in self._order if name in names)

    def left(self, name: str) -> None:
        """Is forgotten."""
        del self._order[name]


class Clock:
    """Second chance: a hand goes round and lets go the first that was not read since last time."""

    def __init__(self, _uses: Mapping[str, tuple[int, ...]], _steps: int, _capacity: int) -> None:
        self._read: OrderedDict[str, bool] = OrderedDict()

    def used(self, name: str, step: int) -> None:
        """Gets a second chance."""
        self._read[name] = True

    def came(self, name: str, nbytes: int) -> None:
        """Waits behind all others."""
        self._read[name] = False

    def victim(self, names: Collection[str], step: int) -> str:
        """The first without a second chance."""
        while True:
            name = next(iter(self._read))
            if name in names and not self._read[name]:
                return name
            self._read[name] = self._read[name] and name not in names
            self._read.move_to_end(name)

    def left(self, name: str) -> None:
        """Is forgotten."""
        del self._read[name]


class Adaptive:
    """Adapts between those read once and those read often, by what it regrets.

    Source: N. Megiddo and D. Modha, ARC: a self-tuning, low overhead replacement cache, 2003; with
    sizes in bytes.
    """

    def __init__(self, _uses: Mapping[str, tuple[int, ...]], _steps: int, capacity: int) -> None:
        self._capacity = capacity
        self._target = 0.0
        self._held: tuple[OrderedDict[str, int], ...] = (OrderedDict(), OrderedDict())
        self._ghosts: tuple[OrderedDict[str, int], ...] = (OrderedDict(), OrderedDict())

    def used(self, name: str, step: int) -> None:
        """Belongs to those read often."""
        for held in self._held:
            if name in held:
                self._held[1][name] = held.pop(name)
                self._held[1].move_to_end(name)
                return

    def came(self, name: str, nbytes: int) -> None:
        """Shifts the balance if it was let go not long ago."""
        once, often = (max(1, sum(ghosts.values())) for ghosts in self._ghosts)
        if name in self._ghosts[0]:
            del self._ghosts[0][name]
            self._target = min(self._capacity, self._target + nbytes * max(1.0, often / once))
            self._held[1][name] = nbytes
        elif name in self._ghosts[1]:
            del self._ghosts[1][name]
            self._target = max(0.0, self._target - nbytes * max(1.0, once / often))
            self._held[1][name] = nbytes
        else:
            self._held[0][name] = nbytes

    def victim(self, names: Collection[str], step: int) -> str:
        """The oldest of the side that is larger than its target."""
        first = 0 if sum(self._held[0].values()) > self._target else 1
        sides = (self._held[first], self._held[1 - first])
        return next(name for held in sides for name in held if name in names)

    def left(self, name: str) -> None:
        """Is remembered for a while, without its bytes."""
        for held, ghosts in zip(self._held, self._ghosts, strict=True):
            if name in held:
                ghosts[name] = held.pop(name)
                while sum(ghosts.values()) > self._capacity:
                    ghosts.popitem(last=False)


POLICIES: Mapping[str, PolicyMaker] = {
    "belady": Belady,
    "lru": Lru,
    "clock": Clock,
    "adaptive": Adaptive,
}
