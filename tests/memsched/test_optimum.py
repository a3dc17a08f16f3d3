"""Plans of small programs against the best of all choices, found by trying every one.

Enumerated: all sets of pinned weights, and for each all orders in which the others are fetched,
round after round, each fetch as soon as the link and enough bytes are free, wherever they lie.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import optimum

import memsched

# A microsecond of a second is rounding.
SAME = 1e-6


def shares(ratios: list[float]) -> list[int]:
    """How many are within rounding, 1 %, 5 % and 10 % of the best."""
    return [sum(ratio < 1 + most for ratio in ratios) for most in (SAME, 0.01, 0.05, 0.1)]


def test_200_small_programs_are_planned_as_well_as_all_choices_allow() -> None:
    # In a process of its own: checking the types of every call takes several times that.
    paths = [Path(optimum.__file__).parent, Path(memsched.__file__).parents[1]]
    done = subprocess.run(
        [sys.executable, optimum.__file__],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(str(path) for path in paths)},
    )
    found = json.loads(done.stdout)
    plans, in_order = found["plans"], found["in order of use"]
    assert len(plans) == len(in_order) == optimum.PROGRAMS == 200
    # Nothing beats what was enumerated.
    assert min(plans) > 1 - SAME
    assert max(plans) < 1 + SAME
    # Where bytes must lie side by side, 183, 188, 191 and 196 were found when this was written.
    arena = found["in an arena"]
    assert min(arena) > 1 - SAME
    assert all(now >= then for now, then in zip(shares(arena), (183, 188, 191, 196), strict=True))
    # Another order than that of use gains in 9 of 200 programs, and at most 3.1 %.
    assert min(in_order) > 1 - SAME
    assert shares(in_order) == [191, 195, 200, 200]
    assert max(in_order) < 1.031
