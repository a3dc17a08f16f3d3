"""What is copied beside steps, in the program that gives the bound.

While a step runs, a lane brings something or it does not. What it brings takes room from its first
byte, beside all that the step holds; what it does not bring then it brings while no step runs, and
that makes the pass longer. How much of the steps' time passes beside which copies is left open, and
so is their order: whatever a schedule does, there are such shares.
"""

import dataclasses

from memsched.bound.masses import Masses

# Other steps may be taken to run while anything is copied: that makes the bound lower, not wrong.
MOST_WINDOWS = 8
# So many shares make the program large; without any it takes no account of them.
MOST_FLIGHTS = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Flight:
    """Weights of one class that come by a lane while steps of a window run: a share of their time.

    `window` and `weight` are places in the lists of `Masses`.
    """

    lane: str
    window: int
    weight: int


def lanes(masses: Masses) -> dict[str, list[float]]:
    """The lanes by which weights come, and how long all of each class take."""
    found = {masses.arrival_lane: [one.count * one.arrival_s for one in masses.weights]}
    if masses.staging_lane is not None:
        found[masses.staging_lane] = [one.count * one.staging_s for one in masses.weights]
    return found


def flights(masses: Masses) -> tuple[Flight, ...]:
    """All that there can be beside the windows that take longest."""
    longest = sorted(range(len(masses.windows)), key=lambda one: -masses.windows[one].seconds)
    found = tuple(
        Flight(lane, window, weight)
        for lane, copies in lanes(masses).items()
        for window in longest[:MOST_WINDOWS]
        for weight in range(len(copies))
    )
    return found if len(found) <= MOST_FLIGHTS else ()
