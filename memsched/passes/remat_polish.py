"""How much memory an order of steps needs, and changes that save time without needing more."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from memsched.passes.remat_order import Order, repeatable, stays
from memsched.program import Program

# Looking for a better order ends after so many were measured: under a second for 60 steps.
MOST_TRIES = 1500
# A run that is put in brings its makers along, so many of them one behind the other.
DEEPEST = 3


@dataclasses.dataclass(frozen=True)
class Runs:
    """A program, with the bytes of the arrays that count and the seconds of its steps.

    `reads` and `writes` are, step by step, the arrays that count.
    """

    program: Program
    sizes: Mapping[str, int]
    step_s: tuple[float, ...]
    reads: tuple[tuple[str, ...], ...]
    writes: tuple[tuple[str, ...], ...]
    again: frozenset[int]
    maker: Mapping[str, int]
    given: tuple[str, ...]
    stays: tuple[str, ...]


def read_runs(program: Program, sizes: Mapping[str, int], step_s: Sequence[float]) -> Runs:
    """Reads a program once, for many orders. Arrays without a size count nothing."""
    again = repeatable(program)
    return Runs(
        program=program,
        sizes=sizes,
        step_s=tuple(step_s),
        reads=tuple(_counted(step.inputs, sizes) for step in program.steps),
        writes=tuple(_counted(step.writes, sizes) for step in program.steps),
        again=again,
        maker={name: index for index in again for name in program.steps[index].writes},
        given=_counted(program.given, sizes),
        stays=_counted(stays(program), sizes),
    )


def _counted(names: Sequence[str], sizes: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(name for name in dict.fromkeys(names) if name in sizes)


def compute_s(runs: Runs, order: Order) -> float:
    """Seconds of all steps of an order."""
    return sum(runs.step_s[index] for index in order)


def peak_bytes(runs: Runs, order: Order) -> int:
    """The most that is needed at once when each array is freed right after its last reader."""
    return read_lives(runs, order).peak_bytes()


@dataclasses.dataclass(frozen=True)
class _Lives:
    """What is held when, in an order. An array and the place where it is made are one version.

    `sources` are the versions that each place reads, `readers` the places that read a version (the
    end of the order, for what stays), `before` is where an array was made before. `held_bytes`
    counts what each place takes, its workspace included.
    """

    runs: Runs
    order: Order
    sources: tuple[tuple[tuple[str, int], ...], ...]
    readers: Mapping[tuple[str, int], Sequence[int]]
    before: Mapping[tuple[str, int], int]
    held_bytes: npt.NDArray[np.int64]

    def peak_bytes(self) -> int:
        """The most that is needed at once."""
        return self._most(self.held_bytes)

    def peak_without(self, place: int) -> int:
        """The same if a repeated run is left out."""
        held, sizes = self.held_bytes.copy(), self.runs.sizes
        held[place] = 0
        for name in self.runs.writes[self.order[place]]:
            if self.readers[name, place]:
                # Its readers read the version before, which has to stay until then.
                held[self._end(name, self.before[name, place]) + 1 : place] += sizes[name]
        for name, made in self.sources[place]:
            *others, last = made, *self.readers[name, made]
            if last == place:
                held[others[-1] + 1 : place] -= sizes[name]
        return self._most(held)

    def _end(self, name: str, made: int) -> int:
        """The place of the last reader of a version, or where it is made if there is none."""
        readers = self.readers[name, made]
        return readers[-1] if readers else made

    def _most(self, held: npt.NDArray[np.int64]) -> int:
        given = sum(self.runs.sizes[name] for name in self.runs.given)
        return max(given, int(held.max(initial=0)))


def read_lives(runs: Runs, order: Order) -> _Lives:
    made_at = dict.fromkeys(runs.given, -1)
    readers: dict[tuple[str, int], list[int]] = {(name, -1): [] for name in runs.given}
    before: dict[tuple[str, int], int] = {}
    sources = []
    for place, index in enumerate(order):
        read = tuple((name, made_at[name]) for name in runs.reads[index])
        for version in read:
            readers[version].append(place)
        sources.append(read)
        for name in runs.writes[index]:
            before[name, place] = made_at.get(name, -1)
            made_at[name] = place
            readers[name, place] = []
    for name in runs.stays:
        readers[name, made_at[name]].append(len(order))
    change = [0] * (len(order) + 2)
    for (name, made), places in readers.items():
        # What is given and never read need not be there.
        if places or made >= 0:
            change[max(made, 0)] += runs.sizes[name]
            change[(places[-1] if places else made) + 1] -= runs.sizes[name]
    workspaces = [runs.program.steps[index].workspace_bytes for index in order]
    held = np.cumsum(np.array(change[: len(order)], dtype=np.int64)) + np.array(
        workspaces, np.int64
    )
    return _Lives(runs, order, tuple(sources), readers, before, held)


def polished(runs: Runs, order: Order, room_bytes: int) -> Order:
    """An order at least as fast that keeps within a memory, as the given one does.

    Repeated runs are left out that the memory does without; then others are put in, one with its
    makers at a time, as long as that lets more be left out than came in.
    """
    best, tries = pruned(runs, order, room_bytes), 0
    improved = True
    while improved and tries < MOST_TRIES:
        improved = False
        for other, fresh in _with_more(runs, best):
            tries += len(other) - len(runs.step_s)
            found = pruned(runs, other, room_bytes, fresh)
            faster = compute_s(runs, found) < compute_s(runs, best) * (1 - 1e-9)
            if faster and peak_bytes(runs, found) <= room_bytes:
                best, improved = found, True
                break
            if tries >= MOST_TRIES:
                break
    return best


def fitted(runs: Runs, order: Order, room_bytes: int) -> Order | None:
    """An order with more repeated runs that keeps within a memory, or None if none is found."""
    most, tries = peak_bytes(runs, order), 0
    while most > room_bytes and tries < MOST_TRIES:
        found = [(peak_bytes(runs, other), other) for other, _ in _with_more(runs, order)]
        tries += len(found)
        least, other = min(found, default=(most, order))
        if least >= most:
            return None
        most, order = least, other
    return order if most <= room_bytes else None


def pruned(runs: Runs, order: Order, room_bytes: int, fresh: range = range(0)) -> Order:
    """The order without the repeated runs that nobody needs or that a memory does without.

    Those at the places `fresh` are left out last: others may be left out because of them.
    """
    order, late = _without_idle(runs, order, [place in fresh for place in range(len(order))])
    places, lives = repeated(order), read_lives(runs, order)
    # The longest first; what is left out moves those behind it.
    while places:
        place = max(places, key=lambda at: (not late[at], runs.step_s[order[at]], at))
        places.remove(place)
        if lives.peak_without(place) <= room_bytes:
            fewer, marks = order[:place] + order[place + 1 :], late[:place] + late[place + 1 :]
            order, late = _without_idle(runs, fewer, marks)
            places, lives = repeated(order), read_lives(runs, order)
    return order


def repeated(order: Order) -> list[int]:
    """Places of the runs that are not the first of their step."""
    seen: set[int] = set()
    places = []
    for place, index in enumerate(order):
        if index in seen:
            places.append(place)
        seen.add(index)
    return places


def _without_idle(runs: Runs, order: Order, late: list[bool]) -> tuple[Order, list[bool]]:
    """Leaves out repeated runs whose results nobody reads, and their marks."""
    again = set(repeated(order))
    wanted = set(runs.program.outputs)
    kept: list[int] = []
    for place in range(len(order) - 1, -1, -1):
        step = runs.program.steps[order[place]]
        if place not in again or not wanted.isdisjoint(step.writes):
            kept.append(place)
            wanted.difference_update(step.writes)
            wanted.update(step.inputs)
    kept.reverse()
    return tuple(order[place] for place in kept), [late[place] for place in kept]


def _with_more(runs: Runs, order: Order) -> Iterator[tuple[Order, range]]:
    """Orders with one run more before a reader of its results, and with some of its makers.

    Also the places of these.
    """
    for place, index in enumerate(order):
        makers = [runs.maker[name] for name in runs.reads[index] if name in runs.maker]
        for made in dict.fromkeys(makers):
            more: tuple[int, ...] = (made,)
            for _ in range(DEEPEST):
                yield order[:place] + more + order[place:], range(place, place + len(more))
                before = [runs.maker[n] for n in runs.reads[more[0]] if n in runs.maker]
                if not before:
                    break
                more = (before[0], *more)
