"""Run by test_planned_limits.py as its own process: `planned_child.py JSON`.

Answers a prompt with a planned model, once to have everything compiled, then for as many tokens as
asked, without Python's collector. From then on it is in a memory control group, if there is one:
what was taken before is not counted there. Prints one JSON object.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import planned_models as helper

from memsched.machine import NVME
from memsched.plan import Copy
from qwen3vl_jax import Qwen3VL

PROMPT = {"input_ids": np.array([[5, 6, 7, 8]])}
SETTLING = 20  # tokens until the reading is the same for each


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def read_bytes() -> int:
    """What the system read from disk for this process."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def plan_bytes(model: Qwen3VL) -> int:
    """What the plan of one token brings from disk."""
    planned = helper.runner_of(model).plans["decode"]
    arrays = planned.traced.program.arrays
    copies = (action for action in planned.plan.actions if isinstance(action, Copy))
    return sum(arrays[copy.array].nbytes for copy in copies if copy.source == NVME)


def answer(asked: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Tokens one after the other, as `generate` chooses them when it is greedy."""
    model = helper.planned(
        asked["model"],
        "bfloat16",
        machine=asked["machine"],
        device_memory=asked["device_memory"],
    )
    cache = model.new_cache(batch=1, capacity=asked["tokens"] + 8)
    scores, cache = model.prefill(PROMPT, cache)
    resident, told, read = [resident_bytes()], [], 0
    for index in range(tokens):
        told.append(int(np.asarray(scores)[0].argmax()))
        scores, cache = model.decode(np.array(told[-1:], np.int32), cache)
        if index == SETTLING:
            read = read_bytes()
        resident.append(resident_bytes())
    found = {
        "resident_bytes": resident,
        "read_bytes": (read_bytes() - read) / max(1, tokens - 1 - SETTLING),
        "plan_bytes": plan_bytes(model),
        "told": told,
        "ledger_peak_bytes": helper.runner_of(model).executor.ledger_peak_bytes,
    }
    model.close()
    return found


def main(asked: dict[str, Any]) -> None:
    gc.disable()
    with pytest.MonkeyPatch.context() as patch:
        helper.share_traces(patch)
        answer(asked, 2)
        if asked["group"] is not None:
            (Path(asked["group"]) / "cgroup.procs").write_text(str(os.getpid()))
        before = resident_bytes()
        print(json.dumps({"before_bytes": before, **answer(asked, asked["tokens"])}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
