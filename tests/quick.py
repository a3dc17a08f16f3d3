"""How quick something is, on a machine that has other things to do."""

import math
import time
from collections.abc import Callable

REFERENCE_S = 0.03  # of `_work`, on a core of 2.4 to 3 GHz


def least_s(
    measure: Callable[[], float],
    enough_s: float,
    *,
    most_s: float = math.inf,
    attempts: int = 5,
) -> float:
    """The least of some measurements; the first one below `enough_s` is enough.

    What else a machine does only adds to one, for a moment; work that is slow is slow every time. A
    race is lost only now and then: where there may be one, no attempt may take more than `most_s`,
    which is so long that a slow and busy machine keeps it.
    """
    taken_s: list[float] = []
    while len(taken_s) < attempts and min(taken_s, default=math.inf) >= enough_s:
        taken_s.append(measure())
        assert taken_s[-1] <= most_s, (
            f"attempt {len(taken_s)} of {attempts} took {taken_s[-1]:.1f} s, at most {most_s:g} s "
            f"are allowed; all took {', '.join(f'{one:.1f}' for one in taken_s)} s"
        )
    return min(taken_s)


def slowness() -> float:
    """How many times as long as there a core takes here and now; 1 at least.

    What computes in Python is divided by it: a limit in seconds is one on such a core.
    """
    taken_s = []
    for _ in range(3):
        start_s = time.process_time()
        _work()
        taken_s.append(time.process_time() - start_s)
    return max(1.0, min(taken_s) / REFERENCE_S)


def _work() -> int:
    """As a planner works: tuples, strings and numbers, in more memory than is near."""
    found: dict[tuple[int, str], int] = {}
    for number in range(60_000):
        key = number * 7919 % 10007, str(number)
        found[key] = found.get(key, 0) + number
    return sum(sorted(found.values()))
