"""Predicted times, against the runtime's own loop on a clock that only moves when it waits."""

import json
import subprocess
import sys
from pathlib import Path

CHILD = Path(__file__).parent / "fake_clock.py"
ROOT = Path(__file__).parents[2]


def test_the_loop_does_everything_exactly_when_the_simulation_says() -> None:
    # In a process without type checks: the loop is given tiers and arrays that hold nothing.
    environment = {"PYTHONPATH": f"{ROOT}:{CHILD.parent}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, str(CHILD)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {case: first for case, (_, first, differing) in found.items() if differing} == {}
    actions = {case: count for case, (count, _, _) in found.items()}
    assert len(actions) == 12
    # Where not all fits, weights move.
    assert actions["decoder, 2 tiers, a third"] > 2 * actions["decoder, 2 tiers, all fits"]
    assert actions["tower, 2 tiers, a twentieth"] > actions["tower, 2 tiers, all fits"]
