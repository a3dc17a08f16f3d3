"""Budgets and reading of a planned model, as the system counts them."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoint_factory as factory
import numpy as np
import planned_models as helper
import pytest
from control_groups import control_group, peak_bytes

from memsched.stores.direct import open_direct
from qwen3vl_jax import Qwen3VL

CHILD = Path(__file__).with_name("planned_child.py")
ROOT = Path(__file__).parents[2]
DEVICE_BYTES = 32_000_000
# Beside the budget: buffers of reads, spans, pages of the allocator and of read table rows.
BESIDE_BYTES = 20_000_000
TOKENS = 341
SETTLING, FLOOR = 20, 40  # tokens
# Keeping the scores would be 32,768 B a token. Measured on a busy machine: 400 to 3,700 B a token.
MOST_GROWTH_BYTES = 12_288 * FLOOR
BUFFERS_BYTES = 4 * (4 << 20)  # of as many reads as may be under way


@dataclasses.dataclass(frozen=True)
class Ran:
    """What the child found, and the most that its control group held, if there was one."""

    found: dict[str, Any]
    group_peak_bytes: int | None
    weights_bytes: int
    checkpoint: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Many tokens of a model of 67 MB within 32 MB."""
    folder = tmp_path_factory.mktemp("limits")
    tensors = factory.checkpoint(folder / "hf", dtype="bfloat16", **helper.SETTINGS)
    store = helper.store_of(folder / "hf", folder / "store")
    with control_group(DEVICE_BYTES + BESIDE_BYTES) as group:
        asked = {
            "model": str(store),
            "machine": str(helper.machine_file(folder, 2)),
            "device_memory": DEVICE_BYTES,
            "tokens": TOKENS,
            "group": None if group is None else str(group),
        }
        done = subprocess.run(
            [sys.executable, str(CHILD), json.dumps(asked)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            timeout=500,
        )
        peak = None if group is None else peak_bytes(group)
    assert done.returncode == 0, "killed: out of memory" if done.returncode == -9 else "failed"
    found = json.loads(done.stdout.splitlines()[-1])
    return Ran(found, peak, sum(array.nbytes for array in tensors.values()), folder / "hf")


def test_a_process_takes_its_budget_and_a_constant(ran: Ran) -> None:
    limit = DEVICE_BYTES + BESIDE_BYTES
    assert ran.weights_bytes > limit, "the whole model would not be noticed"
    taken = max(ran.found["resident_bytes"]) - ran.found["before_bytes"]
    assert taken <= limit
    if ran.group_peak_bytes is not None:
        # It cannot be above: then the kernel had ended the child.
        assert DEVICE_BYTES // 2 < ran.group_peak_bytes <= limit


def test_the_ledger_stays_within_the_budget(ran: Ran) -> None:
    assert 0.9 * DEVICE_BYTES < ran.found["ledger_peak_bytes"]["device"] <= DEVICE_BYTES


def test_nothing_grows_from_token_to_token_without_the_collector(ran: Ran) -> None:
    resident = np.array(ran.found["resident_bytes"][1 + SETTLING :])
    # A buffer of 4 MB comes and goes with the reads that are under way, and may be made late. It
    # moves one floor or two; what is kept of every token raises them all.
    floors = resident[: len(resident) // FLOOR * FLOOR].reshape(-1, FLOOR).min(axis=1)
    assert len(floors) >= 8
    assert np.median(np.diff(floors)) <= MOST_GROWTH_BYTES, floors
    assert floors[-1] - floors[0] <= BUFFERS_BYTES + len(floors) * MOST_GROWTH_BYTES, floors


def test_the_system_reads_what_the_plan_says(ran: Ran) -> None:
    with contextlib.closing(open_direct(ran.checkpoint / "config.json", os.O_RDONLY)) as file:
        if not file.direct:
            pytest.skip("the directory of temporary files has no O_DIRECT: the cache hides reads")
    planned, read = ran.found["plan_bytes"], ran.found["read_bytes"]
    assert planned > 10_000_000
    assert abs(read - planned) <= 0.01 * planned + 4_000_000


def test_the_tokens_are_the_unplanned_ones(ran: Ran) -> None:
    model = Qwen3VL.from_pretrained(ran.checkpoint, dtype="bfloat16", vocab_blocks=4)
    inputs = {"input_ids": np.array([[5, 6, 7, 8]])}
    told = helper.told(model, inputs, tokens=20)
    assert told[0, 4:].tolist() == ran.found["told"][:20]
