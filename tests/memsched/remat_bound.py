"""Whether any schedule of a chain can take less than a time, for chains too long for a search.

A mixed integer program after P. Jain and others, Checkmate, 2020. It asks less than every schedule
keeps, so where it has no solution there is no schedule. The moments are the loss and then each way
back. Between two of them a stage runs, once or more often, or it does not; and
- what lies there at a moment lay there at the one before, or its stage ran in between;
- a stage that ran has found the state that it reads in the same way;
- what lies there at a moment has room beside what is read and written then;
- while a stage ran there was room for what lay there at both moments and was not made in between.

What comes out for many chains (an hour): `PYTHONPATH=. python tests/memsched/remat_bound.py`.
"""

import argparse
import itertools
import math
import time
from collections.abc import Mapping, Sequence

import numpy as np
from remat_chains import needs_of, rooms, there_and_back
from remat_oracles import ChainUnits
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from memsched.passes.needs import Needs
from memsched.passes.remat import best_order

# So many nodes of a search by branch and bound: a proof takes seconds, or is not found.
MOST_NODES = 2000
# What HiGHS means by a program without a solution.
INFEASIBLE = 2
# Tried one after another, as shares of what the best takes.
GAPS = (0.01, 0.005, 0.001)
ROUNDING = 1e-6

# What it is, the moment, the stage or the state. "run": in between this moment and the one before.
# "state" and "tape" lie there at a moment, "state before" and "tape before" also ever since.
Key = tuple[str, int, int]


class Model:
    """Inequalities between variables that are 0 or 1; those that are not asked for are 0."""

    def __init__(self, chain: ChainUnits) -> None:
        self.chain = chain
        self.places: dict[Key, int] = {}
        self.rows: list[tuple[Mapping[Key, float], float]] = []
        self.ones: set[Key] = set()
        last = chain.layers
        self._ask([("state", last, i) for i in range(1, last + 1)])
        self._ask([("tape", last, i) for i in range(last)])
        self._always(("state", last, last))
        self.at_most(self._lying(last), chain.room - chain.back[last])
        for moment in reversed(range(last)):
            self._add_moment(moment)

    def at_most(self, terms: Mapping[Key, float], limit: float) -> None:
        """A weighted sum is at most so much."""
        known = {key: weight for key, weight in terms.items() if key in self.places}
        self.rows.append((known, limit))

    def _ask(self, keys: list[Key]) -> None:
        for key in keys:
            self.places[key] = len(self.places)

    def _always(self, key: Key) -> None:
        self.ones.add(key)

    def _add_moment(self, moment: int) -> None:
        """A way back, and what ran since the moment before."""
        chain, stages = self.chain, range(moment + 1)
        states = range(1, moment + 1 + chain.reads_result)
        self._ask([("state", moment, i) for i in states])
        self._ask([(what, moment, i) for what in ("tape", "tape before", "run") for i in stages])
        self._ask([("state before", moment, i) for i in states])
        self._always(("tape", moment, moment))
        for state in range(max(1, moment), states.stop):
            self._always(("state", moment, state))
        gradients = sum(chain.gradient[moment:])
        there = chain.back[moment + 1] + chain.back[moment] + gradients
        self.at_most(self._lying(moment), chain.room - there)
        for i in stages:
            self._made_or_kept("tape", moment, i, i)
            if i:
                found: Key = ("state", moment + 1, i)
                ran: Key = ("run", moment, i - 1)
                self.at_most({("run", moment, i): 1, found: -1, ran: -1}, 0)
            self._has_room(moment, i)
        for i in states:
            self._made_or_kept("state", moment, i, i - 1)

    def _made_or_kept(self, what: str, moment: int, i: int, stage: int) -> None:
        """What lies there lay there before or was made; without having been made, all the time."""
        now, earlier, ran = (what, moment, i), (what, moment + 1, i), ("run", moment, stage)
        self.at_most({now: 1, earlier: -1, ran: -1}, 0)
        if earlier in self.places:
            kept = (f"{what} before", moment, i)
            self.at_most({now: 1, earlier: 1, ran: -1, kept: -1}, 1)

    def _has_room(self, moment: int, stage: int) -> None:
        """While a stage runs before a moment, there is room for what is kept besides."""
        chain = self.chain
        kept = self._lying(moment, " before")
        for key in (("tape", stage), ("state", stage), ("state", stage + 1)):
            kept.pop((f"{key[0]} before", moment, key[1]), None)
        own = chain.state[stage] + chain.state[stage + 1] + chain.tape[stage]
        there = chain.back[moment + 1] + sum(chain.gradient[moment + 1 :])
        self.at_most({**kept, ("run", moment, stage): own}, chain.room - there)

    def _lying(self, moment: int, since: str = "") -> dict[Key, float]:
        """What may lie there at a moment, and its units."""
        chain = self.chain
        states = range(1, min(moment + 1, chain.layers) + 1)
        lying = {(f"state{since}", moment, i): float(chain.state[i]) for i in states}
        stages = range(min(moment + 1, chain.layers))
        tapes = {(f"tape{since}", moment, i): float(chain.tape[i]) for i in stages}
        return lying | tapes


def none_below(needs: Needs, room: int, layers: int, seconds: float, *, reads_result: bool) -> bool:
    """Whether it is proven that no schedule of a chain of `there_and_back` takes less than a time.

    True also if there is no schedule at all in that memory. False if a search of `MOST_NODES` nodes
    does not tell, or if the program has a solution, be that a schedule or not.
    """
    again_s = seconds - sum(needs.step_s)
    if again_s <= 0:
        return True
    model = Model(ChainUnits(needs, room, layers, reads_result))
    cost = {key: needs.step_s[key[2]] / again_s for key in model.places if key[0] == "run"}
    model.at_most(cost, 1 - ROUNDING)
    count = len(model.places)
    low, whole = np.zeros(count), np.zeros(count)
    for key, place in model.places.items():
        low[place] = key in model.ones
        whole[place] = " " not in key[0]
    entries = [
        (weight, row, model.places[key])
        for row, (terms, _) in enumerate(model.rows)
        for key, weight in terms.items()
    ]
    weights, rows, columns = zip(*entries, strict=True)
    matrix = csr_array((weights, (rows, columns)), shape=(len(model.rows), count))
    found = milp(
        np.zeros(count),
        constraints=LinearConstraint(matrix, -np.inf, [limit for _, limit in model.rows]),
        bounds=Bounds(low, np.ones(count)),
        integrality=whole,
        options={"node_limit": MOST_NODES},
    )
    return bool(found.status == INFEASIBLE)


def proven_gap(
    needs: Needs, room: int, layers: int, gaps: Sequence[float], *, reads_result: bool
) -> float:
    """The last of falling gaps within which the order that is found is proven to be the best.

    Infinite if not even the first one is proven.
    """
    order = best_order(needs, room)
    if order is None:
        nothing = none_below(needs, room, layers, math.inf, reads_result=reads_result)
        return 0.0 if nothing else math.inf
    found, proven = sum(needs.step_s[index] for index in order), math.inf
    for gap in gaps:
        if not none_below(needs, room, layers, found / (1 + gap), reads_result=reads_result):
            break
        proven = gap
    return proven


def main() -> None:
    """Prints, for rooms and numbers of stages, how far from the best orders can be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", type=int, nargs="+", default=[10, 14, 20, 24, 29])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.3, 0.4, 0.5, 0.7, 1.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--gaps", type=float, nargs="+", default=GAPS)
    asked = parser.parse_args()
    for layers, share in itertools.product(asked.stages, asked.shares):
        start, found = time.process_time(), []
        for seed, result, loose in itertools.product(range(asked.seeds), *2 * [[True, False]]):
            needs = needs_of(there_and_back(seed, layers, reads_result=result, loose=loose))
            (room,) = rooms(needs, (share,))
            found.append(proven_gap(needs, room, layers, asked.gaps, reads_result=result))
        within = [f"{sum(one <= gap for one in found)} within {gap:.1%}" for gap in asked.gaps]
        spent_s = time.process_time() - start
        print(
            f"{layers} stages, room {share}: of {len(found)} chains {', '.join(within)}; "
            f"{spent_s:.0f} CPU-seconds",
            flush=True,
        )


if __name__ == "__main__":
    main()
