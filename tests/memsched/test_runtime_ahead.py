"""While a step waits for its weights, the disk is given what comes next."""

import dataclasses
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import programs
import pytest
import stored
import tiny_kernels

from memsched.errors import StoreError
from memsched.machine import DEVICE, NVME
from memsched.plan import Copy, Free, Plan, Residence, Run
from memsched.program import Program
from memsched.referee import verify
from memsched.runtime import Executor
from memsched.runtime.operations import RunOp
from memsched.runtime.schedule import SMALL_WORKSPACE_BYTES, schedule
from memsched.stores.blocks import StoredArray
from memsched.stores.reader import Reader

MACHINE = programs.tiny_machine()
PROGRAM = programs.chain(3, 16)
PATIENCE_S = 60.0


def two_slots(program: Program) -> Plan:
    """Three weights through two slots; the third can come once the first step has ended."""
    steps = [step.name for step in program.steps]
    first, second, third = program.of_kind("weight")
    x, *between = [step.reads[0] for step in program.steps]
    home = tuple(Residence(name, NVME) for name in program.of_kind("weight"))
    actions = (
        Copy(first, NVME, DEVICE),
        Copy(second, NVME, DEVICE),
        Run(steps[0]),
        Free(x, DEVICE),
        Run(steps[1]),
        Free(first, DEVICE),
        Copy(third, NVME, DEVICE),
        Free(between[0], DEVICE),
        Free(second, DEVICE),
        Run(steps[2]),
        Free(between[1], DEVICE),
        Free(third, DEVICE),
    )
    return Plan(
        program.digest,
        MACHINE.digest,
        (*home, Residence(x, DEVICE)),
        actions,
        (*home, *(Residence(name, DEVICE) for name in program.outputs)),
        {0: 0, 1: 64, 6: 0},
    )


def carried_out(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], Executor]:
    values = tiny_kernels.given_values(PROGRAM)
    kernels = tiny_kernels.kernels(PROGRAM)
    sources = stored.stored_weights(path / "weights", PROGRAM, values)
    weights = PROGRAM.of_kind("weight")
    given = {name: value for name, value in values.items() if name not in weights}
    with Executor(MACHINE, sources) as executor:
        outcome = executor.run(two_slots(PROGRAM), PROGRAM, kernels, given)
    return outcome.outputs, tiny_kernels.run_directly(PROGRAM, kernels, values), executor


def test_the_next_weight_is_asked_for_while_a_step_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, second, third = PROGRAM.of_kind("weight")
    asked = threading.Event()
    read = Reader.read

    def in_order(self: Reader, name: str, source: StoredArray, target: np.ndarray) -> Future[None]:
        if name == third:
            asked.set()
        if name != second:
            return read(self, name, source, target)
        # The second weight comes when the third has been asked for, and not before.
        late: Future[None] = Future()

        def bring() -> None:
            if not asked.wait(PATIENCE_S):
                late.set_exception(StoreError("the third weight was not asked for meanwhile"))
                return
            read(self, name, source, target).result()
            late.set_result(None)

        threading.Thread(target=bring).start()
        return late

    monkeypatch.setattr(Reader, "read", in_order)
    outputs, wanted, _ = carried_out(tmp_path)
    for name, values in wanted.items():
        np.testing.assert_array_equal(outputs[name], values)


def test_what_is_begun_early_changes_no_peak(tmp_path: Path) -> None:
    outputs, wanted, executor = carried_out(tmp_path)
    for name, values in wanted.items():
        np.testing.assert_array_equal(outputs[name], values)
    assert executor.ledger_peak_bytes == verify(two_slots(PROGRAM), PROGRAM, MACHINE)


@pytest.mark.parametrize(
    ("workspace_bytes", "host", "settles"),
    [
        (SMALL_WORKSPACE_BYTES, None, False),
        (SMALL_WORKSPACE_BYTES + 1, None, True),
        (SMALL_WORKSPACE_BYTES + 1, 1 << 20, False),
    ],
)
def test_large_workspaces_in_main_memory_never_meet(
    workspace_bytes: int, host: int | None, settles: bool
) -> None:
    """XLA:CPU gives a workspace back after its step has ended; the next one must not be there."""
    steps = [dataclasses.replace(step, workspace_bytes=workspace_bytes) for step in PROGRAM.steps]
    program = dataclasses.replace(PROGRAM, steps=tuple(steps))
    machine = programs.tiny_machine(device=1 << 30, host=host)
    made = schedule(two_slots(program), program, machine)
    runs = [op for op in made.ops if isinstance(op, RunOp)]
    assert [op.settles for op in runs] == [False, settles, settles]
    assert [op.follows for op in runs] == [False, not settles, not settles]
