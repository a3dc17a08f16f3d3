"""Run by test_planned_long.py as its own process: `long_child.py JSON`.

Takes in a prompt whose KV cache is larger than the memory, and some tokens more, without Python's
collector: once to have everything compiled, then measured. Prints one JSON object.
"""

import gc
import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import planned_models as helper

from qwen3vl_jax import long_cache

BLOCK = 256
AFTER = 5  # tokens that follow the prompt
SAMPLE_S = 0.005


class Watched:
    """The most memory that the process held while this was open."""

    def __enter__(self) -> "Watched":
        self.most_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._ended.wait(SAMPLE_S):
            self.most_bytes = max(self.most_bytes, process.memory_info().rss)


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    count = asked["tokens"]
    budgets = {name: asked[name] for name in ("machine", "device_memory", "nvme_dir")}
    model = helper.planned(asked["model"], max_context=count + 2 * AFTER, **budgets)
    executor = helper.runner_of(model).executor
    prompt = np.random.default_rng(0).integers(5, 9, (1, count))
    cache = model.new_cache(batch=1, capacity=count + AFTER)
    scores, cache = model.prefill({"input_ids": prompt}, cache)
    for _ in range(AFTER):
        scores, cache = model.decode(np.asarray(scores).argmax(-1).astype(np.int32), cache)
    blocks = [block for layer in cache.full for block in layer]
    sealed = sum(block.size * block.dtype.itemsize for block in blocks)
    found = {
        "cache_bytes": sealed + cache.nbytes,
        "sealed_bytes": sealed,
        "ledger_peak_bytes": executor.ledger_peak_bytes,
        "spilled_bytes": [executor.spilled_bytes],
    }
    del blocks, cache
    model.new_cache(batch=1, capacity=1)
    found["spilled_bytes"].append(executor.spilled_bytes)
    model.close()
    return found


def main(asked: dict[str, Any]) -> None:
    gc.disable()
    long_cache.SMALLEST_BLOCK, long_cache.BLOCK_BYTES = BLOCK, 1
    with pytest.MonkeyPatch.context() as patch:
        helper.share_traces(patch)
        answer(asked)
        before = psutil.Process().memory_info().rss
        with Watched() as watched:
            found = answer(asked)
        print(json.dumps(found | {"taken_bytes": watched.most_bytes - before}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
