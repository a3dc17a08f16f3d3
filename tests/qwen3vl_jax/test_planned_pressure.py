"""Memory that a model gives back is the system's, as the system counts it."""

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_factory as factory
import numpy as np
import planned_models as helper
import pytest
from control_groups import control_group

from memsched.pressure.observation import margin_bytes
from qwen3vl_jax import Qwen3VL

CHILD = Path(__file__).with_name("adapt_child.py")
ROOT = Path(__file__).parents[2]
HIGH_BYTES = 84_000_000  # holds the model of 67 MB
LOW_BYTES = 32_000_000
# Weights that leave: what is above the low budget, of 67 MB and a cache of 4 MB.
GIVEN_BYTES = 36_000_000
BESIDE_BYTES = 8 << 20  # what streaming takes beside its budget: 2 MB were measured
FIRST_LIMIT_BYTES = 2 << 30
# All that it could give is 31 to 33 MB, and a margin of 7 MB stays free.
LOWERED_BYTES = 24_000_000
MOST_STEPS = 100


@dataclasses.dataclass(frozen=True)
class Ran:
    """What the child found, and the limit of its group at the end; None without one."""

    resident_bytes: list[int]
    optimisers: list[str]
    told: list[int]
    budgets: list[int]
    lowered_bytes: int | None
    checkpoint: Path


def lowered(group: Path, answered: Callable[[], None]) -> int | None:
    """Lowers a group's limit, step by step, to below what it holds now; by how much below.

    A step is less than the margin of such a limit: nobody could answer a larger one in time. After
    each the process has some tokens for its answer, however long they take (`answered`). Version 1
    refuses a limit below what cannot be reclaimed; version 2 would end the process.
    """
    limit, usage = group / "memory.limit_in_bytes", group / "memory.usage_in_bytes"
    if not limit.exists():
        return None
    held = int(usage.read_text())
    nbytes, last = held + 2 * margin_bytes(held), held - LOWERED_BYTES
    for _ in range(MOST_STEPS):
        if nbytes < last + 4096:
            return LOWERED_BYTES
        with contextlib.suppress(OSError):  # it holds too much yet
            limit.write_text(str(max(last, nbytes - margin_bytes(held) // 2)))
        nbytes = int(limit.read_text())
        answered()
    raise AssertionError("the process did not give memory back")


@pytest.fixture(scope="module")
def ran(
    tmp_path_factory: pytest.TempPathFactory,
    alone: Callable[[], contextlib.AbstractContextManager[None]],
) -> Ran:
    folder = tmp_path_factory.mktemp("pressure")
    factory.checkpoint(folder / "hf", dtype="bfloat16", **helper.SETTINGS)
    store = helper.store_of(folder / "hf", folder / "store")
    # A process that gives memory back too late is killed.
    with alone(), control_group(FIRST_LIMIT_BYTES) as group:
        asked = {
            "model": str(store),
            "machine": str(helper.machine_file(folder, 2)),
            "high": HIGH_BYTES,
            "low": LOW_BYTES,
            "group": None if group is None else str(group),
        }
        with subprocess.Popen(
            [sys.executable, str(CHILD), json.dumps(asked)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            first = child.stdout.readline()
            taken = None
            if group is not None and first:
                taken = lowered(group, functools.partial(_some_tokens, child))
            child.stdin.close()
            second = child.stdout.readline()
    assert child.returncode == 0, "killed: out of memory" if child.returncode == -9 else "failed"
    found: dict[str, Any] = json.loads(first) | json.loads(second)
    return Ran(**found, lowered_bytes=taken, checkpoint=folder / "hf")


def _some_tokens(child: "subprocess.Popen[str]") -> None:
    """Lets the child decode some tokens, and waits for them."""
    assert child.stdin is not None
    assert child.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        print(file=child.stdin, flush=True)
    assert child.stdout.readline().strip().isdecimal(), f"ended with {child.wait()}"


def test_a_lower_budget_gives_pages_back_before_the_call_returns(ran: Ran) -> None:
    everything, at_once, later, again = ran.resident_bytes
    assert everything - at_once >= GIVEN_BYTES
    assert everything - later >= GIVEN_BYTES - BESIDE_BYTES
    assert again - later >= GIVEN_BYTES - BESIDE_BYTES, "it did not come back"


def test_planning_while_memory_is_short_loads_no_optimiser(ran: Ran) -> None:
    assert ran.optimisers == [], "36 MB more, in a budget that was just lowered"


def test_a_model_in_a_group_whose_limit_is_lowered_is_not_killed(ran: Ran) -> None:
    if ran.lowered_bytes is None:
        pytest.skip("no control group of version 1 can be made: its limit cannot be lowered here")
    assert ran.budgets, "it never adapted"
    assert min(ran.budgets) <= HIGH_BYTES - ran.lowered_bytes


def test_the_tokens_are_the_unplanned_ones(ran: Ran) -> None:
    model = Qwen3VL.from_pretrained(ran.checkpoint, dtype="bfloat16", vocab_blocks=4)
    inputs = {"input_ids": np.array([[5, 6, 7, 8]])}
    told = helper.told(model, inputs, tokens=len(ran.told))
    assert told[0, 4:].tolist() == ran.told
