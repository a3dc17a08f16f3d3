"""What a request would take on some machine, from a config.json alone: no weight is opened.

A request is passed through the same phases, in the same shapes, as the model itself would use.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memsched.aot import Compiler
from memsched.collector import uncollected
from memsched.cost import CostModel, Roofline
from memsched.cost.contention import BesideCopies
from memsched.errors import DoesNotFitError
from memsched.machine import DEVICE, NVME, Machine
from memsched.passes.baselines import baselines
from memsched.plan import Plan
from memsched.referee import verify
from memsched.report import Summary, summarize
from memsched.report.what_if import gains_s
from qwen3vl_jax.checkpoints.encodings import NOTHING_ENCODED, Encodings
from qwen3vl_jax.config import Config
from qwen3vl_jax.layer_steps import Granularity
from qwen3vl_jax.planned.budgets import smallest_budgets
from qwen3vl_jax.planned.forms import Setting, Tracers, blocks_worth_naming_s, choose
from qwen3vl_jax.planned.granularity import choose_granularity, finest, vocab_blocks, vocab_rows
from qwen3vl_jax.planned.long_requests import borders_s, with_blocks
from qwen3vl_jax.planned.options import NEVER
from qwen3vl_jax.planned.programs import Traced
from qwen3vl_jax.planned.request import Request
from qwen3vl_jax.planned.turns import moving_s, planned_together
from qwen3vl_jax.planned.works import Work, traced_request, works_of

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
    encodings: Encodings
    granularity: Granularity
    passes: tuple[Pass, ...]
    smallest_bytes: Mapping[str, int]
    plan_seconds: float
    plan_cpu_seconds: float

    @functools.cached_property
    def seconds(self) -> float:
        """From all weights in files to the last token."""
        passes_s = sum(one.work.count * one.summary.seconds + one.moving_s for one in self.passes)
        return passes_s + self.borders_s(
            self.request.prompt_length(self.config) + self.request.new_tokens
        )

    @functools.cached_property
    def in_blocks_s(self) -> float | None:
        """`seconds` with the KV cache in blocks, where that is worth naming."""
        what = self.config, self.machine, np.dtype(self.dtype), self.cost, self.encodings
        return blocks_worth_naming_s(Setting(*what), self.request, self.seconds)

    def borders_s(self, tokens: int) -> float:
        """Seconds that so many tokens of each row spend at borders of blocks of their cache."""
        what = self.config, np.dtype(self.dtype), self.machine, self.cost
        return borders_s(self.request, *what, tokens)

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
    tracers: Tracers | None = None,
    compiler: Compiler | None = None,
    encodings: Encodings = NOTHING_ENCODED,
    plan_seconds: float | None = None,
) -> Forecast:
    """Plans a request, and predicts what its plans and some plainer ways take. What the request
    leaves open is chosen first (`forms.choose`).

    Args:
        tracers: what gives the passes of a request as programs; by default they are traced anew.
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
    setting = Setting(config, machine, dtype, cost, encodings)
    request = choose(setting, request, tracers)
    works = works_of(config, request, dtype)
    if tracers is None:
        tracer = traced_request(config, request, dtype, compiler, encodings)
    else:
        tracer = tracers(request)
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
        cut = with_blocks(request, config, dtype, machine)
        if cut is None or request.kv_blocks == NEVER:
            raise _refusal(smallest.checked(), machine, never_cut=cut is not None) from None
        how: dict[str, Any] = {"cost": cost, "compiler": compiler, "encodings": encodings}
        how |= {"tracers": tracers, "plan_seconds": plan_seconds}
        return forecast(config, machine, cut, dtype=dtype, **how)
    found = _passes(works, traced, plans, machine, cost, encodings, plan_seconds)
    taken_s = time.perf_counter() - started_s[0], time.process_time() - started_s[1]
    return Forecast(
        *(config, machine, request, dtype.name, cost, encodings, granularity, found),
        *(smallest.nbytes, *taken_s),
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
        moved_s = moving_s(before, one.program, plan, machine, cost)
        found.append(Pass(work, one, plan, summary, moved_s))
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


def _refusal(smallest: Mapping[str, int], machine: Machine, *, never_cut: bool) -> DoesNotFitError:
    """Names every tier that is too small, and what works.

    Args:
        never_cut: whether its cache could be in blocks, were it allowed.
    """
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
    way = ", or drop --kv-blocks never" if never_cut else ""
    return DoesNotFitError(f"this request needs at least {wanted}; raise {flags}{way}", smallest)
