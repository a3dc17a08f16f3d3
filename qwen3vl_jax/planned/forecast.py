"""What a request would take on some machine, from a config.json alone: no weight is opened.

A request is passed through the same phases, in the same shapes, as the model itself would use.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from memsched.aot import Compiler
from memsched.collector import uncollected
from memsched.cost import CostModel, Roofline
from memsched.cost import plan_seconds as seconds_of
from memsched.cost.contention import BesideCopies
from memsched.errors import DoesNotFitError
from memsched.machine import DEVICE, NVME, Machine
from memsched.passes.baselines import baselines
from memsched.passes.bridge import bridge
from memsched.plan import Plan, Residence
from memsched.referee import verify
from memsched.report import Summary, summarize
from memsched.report.what_if import gains_s
from qwen3vl_jax.checkpoints.encodings import NOTHING_ENCODED, Encodings
from qwen3vl_jax.config import Config
from qwen3vl_jax.layer_steps import Granularity
from qwen3vl_jax.planned.budgets import smallest_budgets
from qwen3vl_jax.planned.granularity import choose_granularity, finest, vocab_blocks, vocab_rows
from qwen3vl_jax.planned.long_requests import with_blocks
from qwen3vl_jax.planned.programs import Traced
from qwen3vl_jax.planned.request import Request
from qwen3vl_jax.planned.turns import planned_together
from qwen3vl_jax.planned.works import Tracer, Work, traced_request, works_of

# The way that is not among the predicted ones where it does not fit.
RESIDENT = "resident"


@dataclasses.dataclass(frozen=True, slots=True)
class Pass:
    """Some work with its plan.

    `moving_s` is what it takes to bring weights from where the pass before leaves them to where
    this plan expects them; the first one finds them all in files.
    """

    work: Work
    traced: Traced
    plan: Plan
    summary: Summary
    moving_s: float


@dataclasses.dataclass(frozen=True)
class Forecast:
    """A request in plans: all passes in their order, the last one decodes a token for each row.

    `plan_seconds` is what planning took, `plan_cpu_seconds` the same without waiting for a core.
    """

    config: Config
    machine: Machine
    request: Request
    dtype: str
    cost: CostModel
    granularity: Granularity
    passes: tuple[Pass, ...]
    smallest_bytes: Mapping[str, int]
    plan_seconds: float
    plan_cpu_seconds: float

    def of_part(self, part: str) -> tuple[Pass, ...]:
        """The passes of "vision", "prefill" or "decode"."""
        return tuple(one for one in self.passes if one.work.part == part)

    @property
    def summaries(self) -> dict[str, Summary]:
        """The plans in numbers, by name."""
        return {one.work.name: one.summary for one in self.passes}

    @functools.cached_property
    def gains_s(self) -> Mapping[str, float]:
        """Seconds that the bound of decoding falls, by what there is more of (`what_if`)."""
        last = self.passes[-1]
        return gains_s(last.summary, last.plan, last.traced.program, self.machine, self.cost)


@uncollected()
def forecast(
    config: Config,
    machine: Machine,
    request: Request,
    *,
    dtype: np.dtype,
    cost: CostModel | None = None,
    tracer: Tracer | None = None,
    compiler: Compiler | None = None,
    encodings: Encodings = NOTHING_ENCODED,
    plan_seconds: float | None = None,
) -> Forecast:
    """Plans a request, and predicts what its plans and some plainer ways take.

    Args:
        tracer: what `traced_request` gave for this request, to plan it again without tracing.
        compiler: says what workspace steps take; by default it is estimated.
        encodings: of weights that rest encoded.
        plan_seconds: as for `compile_phases`.

    Raises:
        DoesNotFitError: a phase has no plan within the budgets. `smallest` then has budgets that
            work, for each tier that has less.
        ProgramError: an array is larger than a tier takes, or XLA cannot compile a step.
        UsageError: the model takes no context as long as this.
    """
    started_s = time.perf_counter(), time.process_time()
    cost = cost or Roofline()
    works = works_of(config, request, dtype)
    tracer = tracer or traced_request(config, request, dtype, compiler, encodings)
    device_bytes = machine.tier(DEVICE).capacity_bytes
    granularity = choose_granularity(config, dtype, device_bytes, encodings)
    traced = tracer(granularity, vocab_blocks(config, dtype, device_bytes, encodings))
    programs = {name: one.program for name, one in traced.items()}
    # The least works with the finest steps, which are chosen with so little.
    rows = vocab_rows(config, dtype)
    fine = {name: one.program for name, one in tracer(finest(config), rows).items()}
    smallest = smallest_budgets(fine, machine, cost)
    try:
        plans = planned_together(programs, machine, cost, plan_seconds)
    except DoesNotFitError:
        in_blocks = with_blocks(request, config, dtype, machine)
        if in_blocks is None:
            raise _refusal(smallest.checked(), machine) from None
        how: dict[str, Any] = {"cost": cost, "compiler": compiler, "encodings": encodings}
        return forecast(config, machine, in_blocks, dtype=dtype, plan_seconds=plan_seconds, **how)
    found = _passes(works, traced, plans, machine, cost, encodings, plan_seconds)
    taken_s = time.perf_counter() - started_s[0], time.process_time() - started_s[1]
    return Forecast(
        config, machine, request, dtype.name, cost, granularity, found, smallest.nbytes, *taken_s
    )


def _passes(
    works: Sequence[Work],
    traced: Mapping[str, Traced],
    plans: Mapping[str, Plan],
    machine: Machine,
    cost: CostModel,
    encodings: Encodings,
    plan_seconds: float | None,
) -> tuple[Pass, ...]:
    """All passes with their plans, verified and summed up."""
    found: list[Pass] = []
    for work in works:
        one, plan = traced[work.name], plans[work.name]
        verify(plan, one.program, machine)
        others = other_ways(one, machine, cost, plan_seconds) if work is works[-1] else {}
        summary = with_codecs(summarize(plan, one.program, machine, cost, others), encodings)
        before = found[-1].plan.exit if found else ()
        moving_s = _moving_s(before, one, plan, machine, cost)
        found.append(Pass(work, one, plan, summary, moving_s))
    return tuple(found)


def with_codecs(summary: Summary, encodings: Encodings) -> Summary:
    """A summary that says in which codec each weight rests; to a plan all bytes are the same."""
    if not encodings:
        return summary
    uses = tuple(
        dataclasses.replace(use, codec=found.codec) if found else use
        for use in summary.arrays
        for found in (encodings.get(use.name) or encodings.get(use.name.rpartition(".")[0]),)
    )
    return dataclasses.replace(summary, arrays=uses)


def explained(found: Forecast, reasons: Mapping[str, str]) -> Forecast:
    """A forecast that says why matrices have their codecs, where these were chosen."""
    passes = tuple(
        dataclasses.replace(one, summary=_with_reasons(one.summary, reasons))
        for one in found.passes
    )
    return dataclasses.replace(found, passes=passes)


def _with_reasons(summary: Summary, reasons: Mapping[str, str]) -> Summary:
    uses = tuple(
        dataclasses.replace(use, codec_reason=reason) if reason else use
        for use in summary.arrays
        for reason in (reasons.get(use.name) or reasons.get(use.name.rpartition(".")[0]),)
    )
    return dataclasses.replace(summary, arrays=uses)


def other_ways(
    traced: Traced, machine: Machine, cost: CostModel, plan_seconds: float | None
) -> dict[str, float | None]:
    """Seconds of plainer ways; None where all would have to stay, and cannot."""
    found = baselines(
        traced.program,
        machine,
        BesideCopies(cost),
        predicted_by=cost,
        plan_seconds=plan_seconds,
    )
    return {RESIDENT: None, **{name: way.seconds for name, way in found.items()}}


def _moving_s(
    before: Iterable[Residence], traced: Traced, plan: Plan, machine: Machine, cost: CostModel
) -> float:
    """Seconds to bring weights to where a plan expects them."""
    weights = {name: spec for name, spec in traced.program.arrays.items() if spec.kind == "weight"}
    home = [Residence(name, NVME) for name in weights]
    now, then = (
        [rest for rest in rests if rest.tier != NVME and rest.array in weights]
        for rests in (before, plan.entry)
    )
    order = list(dict.fromkeys(itertools.chain(*(s.reads for s in traced.program.steps))))
    program, moves = bridge([*home, *now], [*home, *then], weights, machine, order)
    return seconds_of(moves, program, machine, cost)


def _refusal(smallest: Mapping[str, int], machine: Machine) -> DoesNotFitError:
    """Names every tier that is too small, and what works."""
    short = {
        name: nbytes
        for name, nbytes in smallest.items()
        if machine.tier(name).capacity_bytes < nbytes
    }
    wanted = " and ".join(
        f"{nbytes:,} B of {name} memory, not {machine.tier(name).capacity_bytes:,} B"
        for name, nbytes in short.items()
    )
    flags = " and ".join(f"--{name}-{'space' if name == NVME else 'memory'}" for name in short)
    return DoesNotFitError(f"this request needs at least {wanted}; raise {flags}", smallest)
