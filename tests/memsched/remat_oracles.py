"""What steps that run again cost at least, by means that the planner knows nothing of.

`exact_seconds` searches all schedules, best first. `two_moments_seconds` is a bound for chains too
long for that: whoever does not lie on the device while the loss is computed, or later while one
stage is undone, runs again.
"""

import heapq
import math
from collections.abc import Iterator, Sequence

import numpy as np

from memsched.passes.needs import Needs

UNIT = 64


class Search:
    """All schedules of a program in a memory. Sets of arrays are numbers, one bit for each.

    The first `again` steps may run any number of times. What is given stays as long as anybody can
    want it, what is wanted at the end for ever. All else may go whenever room is needed.
    """

    def __init__(self, needs: Needs, room: int, again: int) -> None:
        program, names = needs.program, list(needs.program.arrays)
        bit = {name: 1 << place for place, name in enumerate(names)}
        self.room, self.again, self.step_s = room, again, needs.step_s
        self.sizes = [needs.device_bytes[name] for name in names]
        self.reads = [sum(bit[name] for name in step.inputs) for step in program.steps]
        self.writes = [sum(bit[name] for name in step.writes) for step in program.steps]
        self.given = sum(bit[name] for name in program.given)
        self.outputs = sum(bit[name] for name in program.outputs)
        self.count = len(program.steps)
        self.wanted = [self._union(self.reads[done:]) for done in range(self.count + 1)]
        self.useful = [self._useful(done) for done in range(self.count + 1)]
        self.bounds: dict[tuple[int, int], float] = {}
        self.choices: dict[tuple[int, int], list[int]] = {}

    def nbytes(self, held: int) -> int:
        return sum(size for place, size in enumerate(self.sizes) if held >> place & 1)

    def left_s(self, held: int, done: int) -> float:
        """No less than this is left: steps that never ran, and those whose results are missing."""
        if (held, done) not in self.bounds:
            missing, running = self.wanted[done] & ~held, set(range(done, self.count))
            while True:
                more = {i for i in range(self.again) if self.writes[i] & missing} - running
                if not more:
                    break
                running |= more
                missing |= self._union([self.reads[i] & ~held for i in more])
            self.bounds[held, done] = sum(self.step_s[i] for i in running)
        return self.bounds[held, done]

    def after(self, held: int, done: int) -> Iterator[tuple[int, int, int]]:
        """Steps that can run now, and what is held and how many are done then."""
        for step in (*range(min(done, self.again)), done):
            if self.reads[step] & ~held:
                continue
            then, others = done + (step == done), held & ~self.writes[step]
            excess = self.nbytes(others | self.writes[step]) - self.room
            free = others & ~(self.given | self.outputs | self.reads[step])
            for freed in self._frees(free, excess):
                yield step, (others & ~freed | self.writes[step]) & self.useful[then], then

    def _frees(self, items: int, excess: int) -> list[int]:
        """Sets of some arrays that have so many bytes, and no array too many."""
        if (items, excess) not in self.choices:
            places = [place for place in range(len(self.sizes)) if items >> place & 1]
            places.sort(key=lambda place: -self.sizes[place])
            self.choices[items, excess] = list(self._subsets(places, excess))
        return self.choices[items, excess]

    def _subsets(self, places: Sequence[int], excess: int) -> Iterator[int]:
        """The same for arrays from the largest to the smallest."""
        if excess <= 0:
            yield 0
        elif sum(self.sizes[place] for place in places) >= excess:
            for rest in self._subsets(places[1:], excess - self.sizes[places[0]]):
                yield rest | 1 << places[0]
            yield from self._subsets(places[1:], excess)

    def _useful(self, done: int) -> int:
        """What steps to come read, or steps that make that again."""
        found = self.wanted[done] | self.outputs
        for index in reversed(range(self.again)):
            found |= self.reads[index] if self.writes[index] & found else 0
        return found

    @staticmethod
    def _union(sets: Sequence[int]) -> int:
        found = 0
        for one in sets:
            found |= one
        return found


def exact_seconds(needs: Needs, room: int, again: int, below: float = math.inf) -> float:
    """Least seconds of all schedules in a memory; infinite if none takes less than `below`.

    A search that always goes on where the least is to be expected in all (A*).
    """
    search = Search(needs, room, again)
    best = {(search.given, 0): 0.0}
    heap = [(search.left_s(search.given, 0), 0.0, search.given, 0)]
    while heap:
        least, spent, held, done = heapq.heappop(heap)
        if least >= below or done == search.count:
            return math.inf if least >= below else spent
        if spent > best[held, done]:
            continue
        for step, after, then in search.after(held, done):
            seconds = spent + search.step_s[step]
            if seconds < best.get((after, then), math.inf) - 1e-12:
                best[after, then] = seconds
                entry = (seconds + search.left_s(after, then), seconds, after, then)
                heapq.heappush(heap, entry)
    return math.inf


def two_moments_seconds(needs: Needs, room: int, layers: int, *, reads_result: bool) -> float:
    """A bound for chains of `there_and_back`: the best for the loss and one more moment each."""
    chain = ChainUnits(needs, room, layers, reads_result)
    return sum(needs.step_s) + max(chain.again_s(stage) for stage in range(1, layers - 1))


# The room that something takes at the first moment and at the second, and its seconds.
Option = tuple[int, int, float]


class ChainUnits:
    """A chain of `there_and_back`, its sizes in units."""

    def __init__(self, needs: Needs, room: int, layers: int, reads_result: bool) -> None:
        size = {name: nbytes // UNIT for name, nbytes in needs.device_bytes.items()}
        self.layers, self.there_s, self.reads_result = layers, needs.step_s[:layers], reads_result
        self.room = room // UNIT - size["x"]
        self.state = [0, *(size[f"state{i + 1}"] for i in range(layers))]
        self.tape = [size[f"tape{i}"] for i in range(layers)]
        self.back = [0, *(size[f"back{i + 1}"] for i in range(layers))]
        self.gradient = [size[f"gradient{i}"] for i in range(layers)]

    def again_s(self, stage: int) -> float:
        """Least seconds of what runs again, by the room while the loss runs and `stage` is undone.

        Of the states before `stage` that lie there at the loss, `start` is the last one: from there
        on all stages run in between.
        """
        at_loss = self.room - self.state[-1] - self.back[-1]
        undone = self.state[stage] + self.tape[stage] + self.back[stage + 1] + self.back[stage]
        undone += self.state[stage + 1] if self.reads_result else 0
        then = self.room - undone - sum(self.gradient[stage:])
        if min(at_loss, then) < 0:
            return math.inf
        return min(
            _cheapest([self._options(i, stage, start) for i in range(self.layers)], at_loss, then)
            for start in range(stage + 1)
        )

    def _options(self, i: int, stage: int, start: int) -> list[Option]:
        """What can become of what stage i makes: it lies there, at either moment, or is made."""
        seconds, tape = self.there_s[i], self.tape[i]
        made = tape + (self.state[i + 1] if i + 1 < self.layers else 0)
        if i >= stage:
            return [(made, 0, 0.0), (0, 0, seconds)]
        later = tape + (self.state[i + 1] if i + 1 < stage else 0)
        if i >= start:
            return [(0, later, seconds), (0, 0, 2 * seconds)]
        least = self.state[start] if i + 1 == start else 0
        return [(made, later, 0.0), (least, 0, seconds)]


def _cheapest(items: Sequence[Sequence[Option]], first: int, second: int) -> float:
    """Least seconds with one option of each item, in so much room at two moments."""
    least = np.zeros((first + 1, second + 1))
    for options in items:
        after = np.full_like(least, math.inf)
        for one, other, seconds in options:
            if one <= first and other <= second:
                rest = least[: first + 1 - one, : second + 1 - other]
                np.minimum(after[one:, other:], rest + seconds, out=after[one:, other:])
        least = after
    return float(least[-1, -1])
