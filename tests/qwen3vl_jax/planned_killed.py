"""Run by test_planned_faults.py as its own process: `planned_killed.py JSON`.

Imports everything once, then forks a child for every conversation. Each of KILLS children gets
SIGKILL at a random moment; two more talk at the same time to their end. Prints one JSON object:
how each ended, what it left in the directory for spilled arrays, and what the last two told.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import planned_models as helper


def start(asked: dict[str, Any], out: Path) -> int:
    """Fork a child that talks; returns its process id. No array exists in this process."""
    child = os.fork()
    if child == 0:
        with contextlib.redirect_stderr(None):
            model = helper.planned(
                asked["model"],
                machine=asked["machine"],
                nvme_dir=asked["nvme_dir"],
                **asked["budgets"],
            )
            prompt = {"input_ids": np.array([asked["prompt"]])}
            out.write_text(json.dumps(helper.told(model, prompt, tokens=asked["tokens"]).tolist()))
            model.close()
        os._exit(0)
    return child


def result(child: int) -> int:
    """Exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(asked: dict[str, Any]) -> None:
    spill, out = Path(asked["nvme_dir"]), Path(asked["out"])
    begin = time.monotonic()
    both = [start(asked, out / f"{index}.json") for index in range(2)]
    ended = [result(child) for child in both]
    seconds = time.monotonic() - begin
    told = [json.loads((out / f"{index}.json").read_text()) for index in range(2)]
    chosen, left = random.Random(0), []
    died = []
    while len(died) < asked["kills"]:
        child = start(asked, out / "killed.json")
        time.sleep(chosen.random() * seconds * 0.7)
        os.kill(child, signal.SIGKILL)
        status = result(child)
        left += [path.name for path in spill.iterdir()] if spill.exists() else []
        if status == 0:
            seconds *= 0.7  # it was faster than the signal: two at a time take longer
        else:
            died.append(status)
    print(json.dumps({"ended": ended, "told": told, "died": died, "left": left}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
