"""How far decoding is from what no schedule can beat, for a model on a machine."""

import dataclasses
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from memsched.cost import CostModel, plan_seconds
from memsched.errors import DoesNotFitError
from memsched.machine import DEVICE, Machine
from memsched.passes.compile import compile_phases
from memsched.program import Program
from memsched.report import lower_bound
from qwen3vl_jax.config import Config
from qwen3vl_jax.layer_steps import Granularity
from qwen3vl_jax.phases import phases
from qwen3vl_jax.planned.granularity import choose_granularity, vocab_blocks
from qwen3vl_jax.planned.programs import trace_phase
from qwen3vl_jax.planned.request import Request
from qwen3vl_jax.planned.skeleton import shape_network
from qwen3vl_jax.planned.works import works_of
from qwen3vl_jax.weights import Rows

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, slots=True)
class Gap:
    """Predicted seconds of a new token and their bound; what it took to plan and to bound.

    `lane` sets the bound. The last two are seconds of a core.
    """

    seconds: float
    bound_s: float
    lane: str
    planned_s: float
    bounded_s: float

    @property
    def share(self) -> float:
        """The seconds above the bound, as a share of it."""
        return self.seconds / self.bound_s - 1


def decode_program(
    config: Config, request: Request, dtype: np.dtype, granularity: Granularity, rows: Rows
) -> Program:
    """The program of a new token of a request, alone."""
    network = shape_network(config, dtype=dtype, vocab_rows=rows)
    work = works_of(config, request, dtype)[-1]
    return trace_phase(phases(config, granularity)[work.phase], network, work.arrays).program


def decode_gap(
    config: Config, request: Request, dtype: np.dtype, machine: Machine, cost: CostModel
) -> Gap | None:
    """Plans a new token alone; None if a tier is too small."""
    device_bytes = machine.tier(DEVICE).capacity_bytes
    granularity = choose_granularity(config, dtype, device_bytes)
    rows = vocab_blocks(config, dtype, device_bytes)
    program = decode_program(config, request, dtype, granularity, rows)
    try:
        plans, planned_s = _timed(lambda: compile_phases({"decode": program}, machine, cost))
    except DoesNotFitError:
        return None
    plan = plans["decode"]
    bound, bounded_s = _timed(lambda: lower_bound(plan, program, machine, cost))
    seconds = plan_seconds(plan, program, machine, cost)
    return Gap(seconds, bound.seconds, bound.lane, planned_s, bounded_s)


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    started = time.process_time()
    return work(), time.process_time() - started
