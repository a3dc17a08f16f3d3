"""How much trying a plan is worth, in simulated actions: the same on every machine and every day.

Clocks would make plans depend on what else a machine does. A planner simulates about 50,000 actions
in a second of one core (2.9 GHz, measured), the lowering of layouts included.
"""

import dataclasses

from memsched.errors import ProgramError

ACTIONS_PER_S = 50_000
# What is tried where nobody is in a hurry. Five times as much found no better plan of five sizes on
# three profiles.
TAIL_ACTIONS, SEARCH_ACTIONS, TUNE_ACTIONS = 15_000, 30_000, 40_000
STARTS = 2
# All that programs of few weights have (`orders`): about half a second.
ORDERS = 14_000
# A plan that others only take hints from is worth this part of it.
HINT = 1 / 40


@dataclasses.dataclass(frozen=True, slots=True)
class Effort:
    """Trying stops when so many actions have been simulated, one plan at least in each part.

    `tail`: spilling the tail, with all sizes of rings. `search`: all other layouts. `tune`: rings
    like those of the best one. `starts` is how many layouts integer programming proposes, `orders`
    how many orders of fetching are tried where there are few weights.
    """

    tail: int = TAIL_ACTIONS
    search: int = SEARCH_ACTIONS
    tune: int = TUNE_ACTIONS
    starts: int = STARTS
    orders: int = ORDERS

    def share(self, part: float) -> "Effort":
        """A part of it; integer programming, which cannot be stopped half way, is left out."""
        if part == 1.0:
            return self
        tail, search, tune = (int(part * one) for one in (self.tail, self.search, self.tune))
        return Effort(tail, search, tune, 0, int(part * self.orders))


def effort_of(plan_seconds: float | None) -> Effort:
    """The effort that takes about so many seconds, and never more than the usual one. Reading a
    program and plans that only give hints come on top.

    Raises:
        ProgramError: the seconds are negative, or no number.
    """
    usual = Effort()
    if plan_seconds is None:
        return usual
    if not plan_seconds >= 0:
        raise ProgramError(f"planning takes 0 seconds or more, not {plan_seconds}: give a limit")
    whole = usual.tail + usual.search + usual.tune
    return usual.share(min(1.0, plan_seconds * ACTIONS_PER_S / whole))
