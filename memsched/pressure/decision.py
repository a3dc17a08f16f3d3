"""Which budget to change to, after a look at the system's memory. Nothing here reads anything.

Less at once, more slowly: memory that another program wants and does not get may end a process,
while too small a budget only costs time, and every change costs a new plan and the weights that it
reads. So a budget is raised only after it was calm for a while, to half of what was free all the
time, and never for a small gain.
"""

import dataclasses

from memsched.pressure.observation import Observation

CALM_S = 10.0  # also the window over which the kernel averages stalls
# Android's lmkd acts when some task waited 7 to 20 % of a second; systemd-oomd kills above 60 %.
STALLED_PERCENT = 10.0
STALLED_PART = 8  # of what the next pass takes is given back while tasks stall
CUSHION_PART = 32  # of the ceiling stays free below the margin, or the next look lowers again
STEP_PART = 16  # of the ceiling is the least for which a raise is worth a new plan
PAGE_BYTES = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """What is known between two looks.

    Attributes:
        ceiling_bytes: what the user allows; never more.
        budget_bytes: what is in force.
        floor_bytes: what was found to be the least that works.
        used_bytes: what of it is in use now, between two passes.
        needed_bytes: the most that the next pass takes.
        calm_since_s: since when there was enough for a larger budget.
        least_spare_bytes: the least that was free since then.
        lowered_s: when the budget was lowered the last time.
        alarms: of the last look; None before the first.
    """

    ceiling_bytes: int
    budget_bytes: int
    floor_bytes: int = 0
    used_bytes: int = 0
    needed_bytes: int = 0
    calm_since_s: float | None = None
    least_spare_bytes: int = 0
    lowered_s: float | None = None
    alarms: int | None = None


def budget_for(seen: Observation, state: State) -> int | None:
    """The budget to change to; None if the one in force should stay."""
    room = state.used_bytes + seen.spare_bytes
    if room < state.needed_bytes:
        return _lower(room - state.ceiling_bytes // CUSHION_PART, state)
    if _squeezed(seen, state):
        return _lower(state.needed_bytes - state.needed_bytes // STALLED_PART, state)
    if state.calm_since_s is None or seen.time_s - state.calm_since_s < CALM_S:
        return None
    return _raised(min(seen.spare_bytes, state.least_spare_bytes), state)


def following(seen: Observation, state: State, budget_bytes: int | None) -> State:
    """What is known after a look, and after the budget was changed if it was."""
    seen_before = dataclasses.replace(state, alarms=seen.alarms)
    if budget_bytes is not None:
        lower = budget_bytes < state.budget_bytes
        return dataclasses.replace(
            seen_before,
            budget_bytes=budget_bytes,
            calm_since_s=None,
            lowered_s=seen.time_s if lower else state.lowered_s,
        )
    if _squeezed(seen, state) or _raised(seen.spare_bytes, state) is None:
        return dataclasses.replace(seen_before, calm_since_s=None)
    if state.calm_since_s is None:
        return dataclasses.replace(
            seen_before, calm_since_s=seen.time_s, least_spare_bytes=seen.spare_bytes
        )
    least = min(seen.spare_bytes, state.least_spare_bytes)
    return dataclasses.replace(seen_before, least_spare_bytes=least)


def _squeezed(seen: Observation, state: State) -> bool:
    """Whether memory is short, though no limit is near."""
    if state.alarms is not None and seen.alarms > state.alarms:
        return True
    if seen.stalled_percent is None or seen.stalled_percent < STALLED_PERCENT:
        return False
    # What was stalled before the budget was lowered is in the average for a while.
    return state.lowered_s is None or seen.time_s - state.lowered_s >= CALM_S


def _lower(wanted_bytes: int, state: State) -> int | None:
    wanted = max(wanted_bytes // PAGE_BYTES * PAGE_BYTES, state.floor_bytes)
    return wanted if wanted < min(state.needed_bytes, state.budget_bytes) else None


def _raised(spare_bytes: int, state: State) -> int | None:
    wanted = min(state.ceiling_bytes, state.used_bytes + spare_bytes // 2)
    if wanted < state.ceiling_bytes:
        wanted -= wanted % PAGE_BYTES
    enough = wanted - state.budget_bytes >= state.ceiling_bytes // STEP_PART
    return wanted if enough and wanted > state.budget_bytes else None
