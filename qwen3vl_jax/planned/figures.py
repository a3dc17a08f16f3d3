"""What a planned model did, and what its disk and its control groups allow: for measurements."""

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable
from pathlib import Path

from memsched.detection.disk_rate import file_blocks, measure_reading
from memsched.detection.memory_limits import own_groups
from memsched.machine import NVME
from memsched.plan import Copy
from memsched.report.comparison import busy_seconds
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.model import Qwen3VL
from qwen3vl_jax.planned.runner import PlannedRunner

__all__ = ["PassFigures", "disk_reader", "last_pass", "ledger_peak_bytes", "own_groups"]


@dataclasses.dataclass(frozen=True, slots=True)
class PassFigures:
    """One pass of a phase.

    Seconds in which steps ran, bytes that its plan reads from disk, bytes of all its weights.
    """

    compute_s: float
    plan_bytes: int
    weight_bytes: int


def last_pass(model: Qwen3VL, phase: str) -> PassFigures:
    """The newest pass of a phase.

    Raises:
        UsageError: the model has no plans.
    """
    runner = planned_runner(model)
    planned = runner.plans[phase]
    program = planned.traced.program
    arrays = program.arrays
    read = {name for step in program.steps for name in step.reads}
    return PassFigures(
        busy_seconds(planned.plan, runner.spans[phase])["compute"],
        sum(
            arrays[action.array].nbytes
            for action in planned.plan.actions
            if isinstance(action, Copy) and action.source == NVME
        ),
        sum(arrays[name].nbytes for name in read if arrays[name].kind == "weight"),
    )


def ledger_peak_bytes(model: Qwen3VL) -> dict[str, int]:
    """The most that a planned model has had in each tier, by its own count."""
    return planned_runner(model).executor.ledger_peak_bytes


def planned_runner(model: Qwen3VL) -> PlannedRunner:
    """The runner of a model that has plans.

    Raises:
        UsageError: it has none.
    """
    runner = model._runner
    if not isinstance(runner, PlannedRunner):
        raise UsageError("this model has all its weights in memory; load it with a budget")
    return runner


def disk_reader(files: Iterable[Path], *, seed: int = 0) -> Callable[[float], float]:
    """A function that reads blocks of some files for so many seconds, and says bytes per second.

    It takes them in a random order, and goes on where it stopped: what a disk keeps in a memory of
    its own would not be found there by a model either.

    Raises:
        UsageError: there is nothing to read.
    """
    blocks = file_blocks(sorted(files))
    if not blocks:
        raise UsageError("there are no files to measure the disk with; make the checkpoint anew")
    random.Random(seed).shuffle(blocks)
    order = itertools.cycle(blocks)
    return lambda seconds: measure_reading(order, seconds=seconds)
