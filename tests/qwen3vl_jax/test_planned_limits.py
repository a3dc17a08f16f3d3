"""Budgets and reading of a planned model, as the system counts them."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoint_factory as factory
import numpy as np
import planned_models as helper
import pytest

from memsched.stores.direct import open_direct
from qwen3vl_jax import Qwen3VL

CHILD = Path(__file__).with_name("planned_child.py")
ROOT = Path(__file__).parents[2]
DEVICE_BYTES = 32_000_000
# Beside the budget: buffers of reads, spans, pages of the allocator and of read table rows.
BESIDE_BYTES = 20_000_000
TOKENS = 200
MOST_GROWTH_BYTES = 65_536  # of ten tokens
BUFFERS_BYTES = 4 * (4 << 20)  # of as many reads as may be under way
ROPE = {"mrope_interleaved": True, "mrope_section": [12, 10, 10], "rope_type": "default"}
SETTINGS: dict[str, Any] = {
    "text": {
        "head_dim": 64,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "max_position_embeddings": 4096,
        "num_attention_heads": 8,
        "num_hidden_layers": 8,
        "num_key_value_heads": 4,
        "rope_parameters": ROPE | {"rope_theta": 5000000},
        "vocab_size": 8192,
    },
    "vision": {"out_hidden_size": 512},
}


@dataclasses.dataclass(frozen=True)
class Ran:
    """What the child found, and the most that its control group held, if there was one."""

    found: dict[str, Any]
    group_peak_bytes: int | None
    weights_bytes: int
    checkpoint: Path


@contextlib.contextmanager
def control_group(limit_bytes: int) -> Iterator[Path | None]:
    """A memory control group with this limit; None where none can be made."""
    group = next((found for parent in _parents() if (found := _made(parent, limit_bytes))), None)
    try:
        yield group
    finally:
        if group is not None:
            _removed(group)


def _parents() -> Iterator[Path]:
    """Where groups of version 1 and 2 may be made: at the top, and where this process is."""
    own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for top, controller in (("/sys/fs/cgroup/memory", "memory"), ("/sys/fs/cgroup", "")):
        for _, controllers, path in own:
            if controller in controllers.split(","):
                yield from (Path(top), Path(top) / path.strip("/"))


def _made(parent: Path, limit_bytes: int) -> Path | None:
    group = parent / f"planned-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        return None
    for name in ("memory.limit_in_bytes", "memory.max"):
        with contextlib.suppress(OSError):
            if (group / name).exists():
                (group / name).write_text(str(limit_bytes))
                return group
    group.rmdir()
    return None


def _peak_bytes(group: Path) -> int | None:
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        if (group / name).exists():
            return int((group / name).read_text())
    return None


def _removed(group: Path) -> None:
    for _ in range(100):
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.05)  # its last process has ended, but has not left
        else:
            return


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """200 tokens of a model of 67 MB within 32 MB."""
    folder = tmp_path_factory.mktemp("limits")
    tensors = factory.checkpoint(folder / "hf", dtype="bfloat16", **SETTINGS)
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
        peak = None if group is None else _peak_bytes(group)
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
    resident = np.array(ran.found["resident_bytes"][3:])
    assert len(resident) > 15
    # Keeping one token's scores would be 32,768 B each; a buffer that is made late is made once.
    assert np.median(np.diff(resident)) <= MOST_GROWTH_BYTES
    assert resident[-1] - resident[0] <= BUFFERS_BYTES


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
