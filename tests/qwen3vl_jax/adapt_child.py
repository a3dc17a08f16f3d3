"""Run by test_planned_pressure.py as its own process: `adapt_child.py JSON`.

Decodes with a planned model, from the start in a memory control group if there is one. First its
budget is lowered and raised by the call; then it adapts by itself: for every line of its input it
decodes some tokens and prints how many it has, until the input ends. Prints one JSON object after
each part.
"""

import contextlib
import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

import planned_models as helper

from memsched.errors import DoesNotFitError
from memsched.stores.heap import give_back
from qwen3vl_jax import Qwen3VL
from qwen3vl_jax.planned.adapt import INTERVAL_S, adapting

PROMPT = {"input_ids": np.array([[5, 6, 7, 8]])}
MOST_TOKENS = 900
FAR_TOO_LOW_BYTES = 1_000_000
SETTLING = 5
TOKENS_A_LINE = 8
PR_SET_THP_DISABLE = 41
TOKEN_S = 2 * INTERVAL_S  # by the clock that it adapts by: a look before every token


class Decoding:
    """Greedy decoding, token after token. `told` has them all."""

    def __init__(self, model: Qwen3VL) -> None:
        self.model = model
        cache = model.new_cache(batch=1, capacity=MOST_TOKENS + 8)
        self.scores, self.cache = model.prefill(PROMPT, cache)
        self.told: list[int] = []

    def tokens(self, count: int) -> None:
        for _ in range(count):
            self.told.append(int(np.asarray(self.scores)[0].argmax()))
            self.scores, self.cache = self.model.decode(
                np.array(self.told[-1:], np.int32), self.cache
            )


def resident_bytes() -> int:
    give_back()
    return int(psutil.Process().memory_info().rss)


def by_call(model: Qwen3VL, decoding: Decoding, low: int, high: int) -> dict[str, Any]:
    """What is resident with everything, right after a lower budget, later, and raised again.

    In between a budget is refused.
    """
    decoding.tokens(SETTLING)
    found = [resident_bytes()]
    model.set_memory(device_memory=low)
    found.append(resident_bytes())
    with contextlib.suppress(DoesNotFitError):
        model.set_memory(device_memory=FAR_TOO_LOW_BYTES)
    decoding.tokens(SETTLING)
    found.append(resident_bytes())
    model.set_memory(device_memory=high)
    decoding.tokens(SETTLING)
    found.append(resident_bytes())
    return {"resident_bytes": found, "optimisers": sorted({"scipy"} & set(sys.modules))}


def by_pressure(model: Qwen3VL, decoding: Decoding) -> dict[str, Any]:
    """What was done while the group's limit was lowered from outside, before every line."""
    with adapting(model, clock=lambda: TOKEN_S * len(decoding.told)) as adaptation:
        while sys.stdin.readline():
            decoding.tokens(TOKENS_A_LINE)
            print(len(decoding.told), flush=True)
    return {"told": decoding.told, "budgets": [c.after_bytes for c in adaptation.changes]}


def without_huge_pages() -> None:
    """The arrays here are smaller than huge pages. Of one that is given back in part, the system
    counts the whole until it runs short; then it mostly, not always, finds the rest in time.
    """
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)


def main(asked: dict[str, Any]) -> None:
    without_huge_pages()
    if asked["group"] is not None:
        (Path(asked["group"]) / "cgroup.procs").write_text(str(os.getpid()))
    model = helper.planned(
        asked["model"], "bfloat16", machine=asked["machine"], device_memory=asked["high"]
    )
    decoding = Decoding(model)
    print(json.dumps(by_call(model, decoding, asked["low"], asked["high"])), flush=True)
    print(json.dumps(by_pressure(model, decoding)), flush=True)
    model.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
