"""What plans say and what came of them: text of at most 100 columns, and plain data for JSON."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from memsched.cost import CostModel, Roofline, Span
from memsched.errors import DoesNotFitError
from memsched.machine import Machine
from memsched.plan import Run
from memsched.report import Line, Summary, busy_seconds, comparison_text, summarize
from memsched.report import to_dict as summaries_to_dict
from memsched.report import to_text as summaries_to_text
from memsched.report.text import seconds_text
from memsched.sizes import format_size
from qwen3vl_jax.phases import PREFILL_CHUNK
from qwen3vl_jax.planned.forecast import Forecast, Pass, forecast
from qwen3vl_jax.planned.request import Request
from qwen3vl_jax.planned.runner import Planned, PlannedRunner

PARTS = ("vision", "prefill", "decode")


# ---- a forecast ----


def forecast_text(found: Forecast) -> str:
    """A forecast to read: the request as a whole, then every plan."""
    tokens = {one.work.name: _tokens(found, one) for one in found.passes}
    each = {name: count for name, count in tokens.items() if count}
    return _headline(found) + "\n" + summaries_to_text(found.summaries, each)


def forecast_dict(found: Forecast) -> dict[str, Any]:
    """A forecast as data. Vision and prefill are those of the whole request, decode is one token
    of each row.
    """
    last = summaries_to_dict({"decode": found.summaries["decode"]})
    parts = {part: found.of_part(part) for part in PARTS}
    return {
        "fits": True,
        "smallest_workable": dict(found.smallest_bytes),
        "phases": {part: _part(passes, part) for part, passes in parts.items() if passes},
        "gap": last["gap"],
        "prices": last["prices"],
        "baselines": last["baselines"],
        "arrays": last["arrays"],
        "passes": [
            {"name": one.work.name, "count": one.work.count, "moving_seconds": one.moving_s}
            | summaries_to_dict({"it": one.summary})["phases"]["it"]
            for one in found.passes
        ],
        "tokens_per_s": found.request.batch / found.summaries["decode"].seconds,
        "request_seconds": _request_seconds(found),
        "assumptions": assumptions(found.machine, found.request, found.dtype)
        | {
            "prompt_length": found.request.prompt_length(found.config),
            "max_context": found.request.capacity(found.config),
        },
        "plan_seconds": found.plan_seconds,
        "plan_cpu_seconds": found.plan_cpu_seconds,
    }


def refusal_dict(
    error: DoesNotFitError, machine: Machine, request: Request, dtype: str
) -> dict[str, Any]:
    """What `forecast_dict` would say, of a request that does not fit."""
    return {
        "fits": False,
        "smallest_workable": error.smallest,
        "phases": {},
        "gap": None,
        "prices": {},
        "baselines": {},
        "arrays": [],
        "assumptions": assumptions(machine, request, dtype),
        "plan_seconds": None,
    }


def assumptions(machine: Machine, request: Request, dtype: str) -> dict[str, Any]:
    """What a forecast rests on."""
    return {
        "machine": machine.name,
        "machine_digest": machine.digest,
        "capacity_bytes": {tier.name: tier.capacity_bytes for tier in machine.tiers},
        "bytes_per_s": {f"{link.source}->{link.target}": link.bytes_per_s for link in machine.links}
        | {"compute": machine.compute.bytes_per_s},
        "flops_per_s": machine.compute.flops_per_s,
        "dtype": dtype,
        "request": dataclasses.asdict(request),
        "chunk_tokens": PREFILL_CHUNK,
        "seconds": "the machine's rates; steps and transfers overlap as the plan allows",
        "experts": "all experts of a layer are brought, whoever is chosen",
    }


def _headline(found: Forecast) -> str:
    request, config = found.request, found.config
    count = len(request.images)
    pictures = f" with {count} picture{'s' * (count > 1)}" if count else ""
    lines = [
        f"{config.model_type}, {found.dtype}, on {found.machine.name}",
        f"  {request.prompt_length(config):,} prompt tokens{pictures}, {request.new_tokens:,} new "
        f"ones, {request.batch} at once, room for {request.capacity(config):,} tokens each",
        f"  planned in {found.plan_seconds:.2f} s ({found.plan_cpu_seconds:.2f} s of CPU); "
        f"the whole request takes {seconds_text(_request_seconds(found))}",
        "",
        f"  {'phase':<10}{'passes':>8}{'seconds':>12}{'bound':>12}{'weights moved before':>24}",
    ]
    for part in PARTS:
        passes = found.of_part(part)
        if passes:
            count = sum(one.work.count for one in passes)
            took = sum(one.work.count * one.summary.seconds for one in passes)
            bound = sum(one.work.count * one.summary.bound.seconds for one in passes)
            moving = seconds_text(sum(one.moving_s for one in passes))
            lines.append(
                f"  {part:<10}{count:>8,}{seconds_text(took):>12}{seconds_text(bound):>12}"
                f"{moving:>24}"
            )
    decode = found.summaries["decode"]
    lines += [
        "",
        f"  {request.batch / decode.seconds:,.3g} tokens/s",
        "  the least that would do:",
        *(f"    {name:<8}{format_size(nbytes)}" for name, nbytes in found.smallest_bytes.items()),
    ]
    return "\n".join(lines) + "\n"


def _part(passes: Iterable[Pass], part: str) -> dict[str, Any]:
    """Several passes as one phase; of decode one pass."""
    counted = [(1 if part == "decode" else one.work.count, one.summary) for one in passes]
    peaks: dict[str, int] = {}
    nbytes: dict[str, int] = {}
    for count, summary in counted:
        for tier, use in summary.occupancy.items():
            peaks[tier] = max(peaks.get(tier, 0), use.peak_bytes)
        for link, moved in summary.link_bytes.items():
            nbytes[link] = nbytes.get(link, 0) + count * moved
    return {
        "seconds": sum(count * summary.seconds for count, summary in counted),
        "bound_seconds": sum(count * summary.bound.seconds for count, summary in counted),
        "seconds_p90": None,
        "peak_bytes": peaks,
        "link_bytes": nbytes,
    }


def _tokens(found: Forecast, one: Pass) -> int:
    """Tokens that a pass is for; 0 where that means nothing."""
    places = {"prefill": 0, "decode": 0}
    if one.work.phase not in places:
        return 0
    rows, tokens = one.work.arrays[0].shape[:2]
    return int(rows * tokens)


def _request_seconds(found: Forecast) -> float:
    return sum(one.work.count * one.summary.seconds + one.moving_s for one in found.passes)


# ---- a model ----


@dataclasses.dataclass(frozen=True, slots=True)
class PlanReport:
    """What the plans of a model do, and what came of those that were carried out.

    Before the first call, that is a forecast for an ordinary request.
    """

    runner: PlannedRunner
    request: Request = dataclasses.field(default_factory=Request)
    cost: CostModel = dataclasses.field(default_factory=Roofline)

    def report(self) -> str:
        """Text: every plan, then predicted against measured."""
        summaries = self._summaries()
        if not summaries:
            return forecast_text(self._forecast())
        blocks = [summaries_to_text(summaries)]
        for name, lines in self._measured(summaries).items():
            blocks.append(f"{name}, the newest pass\n" + comparison_text(lines))
        blocks.append("so far\n" + comparison_text(self._totals(summaries)))
        return "\n".join(blocks)

    def to_dict(self) -> dict[str, Any]:
        """The same as data. "measured" has a list of lines for each phase that ran."""
        summaries = self._summaries()
        if not summaries:
            return forecast_dict(self._forecast())
        measured = {**self._measured(summaries), "so far": self._totals(summaries)}
        return summaries_to_dict(summaries) | {
            "measured": {
                name: [dataclasses.asdict(line) for line in lines]
                for name, lines in measured.items()
            }
        }

    def _forecast(self) -> Forecast:
        runner = self.runner
        return forecast(
            runner.config, runner.machine, self.request, dtype=runner.dtype, cost=self.cost
        )

    def _summaries(self) -> dict[str, Summary]:
        machine = self.runner.machine
        return {
            name: summarize(planned.plan, planned.traced.program, machine, self.cost)
            for name, planned in self.runner.plans.items()
        }

    def _measured(self, summaries: Mapping[str, Summary]) -> dict[str, tuple[Line, ...]]:
        plans = self.runner.plans
        return {
            name: pass_lines(plans[name], summaries[name], spans)
            for name, spans in self.runner.spans.items()
            if name in plans and len(spans) == len(plans[name].plan.actions)
        }

    def _totals(self, summaries: Mapping[str, Summary]) -> tuple[Line, ...]:
        """Peaks of all plans together."""
        found = self.runner.executor.ledger_peak_bytes
        planned = {
            tier: max(float(one.occupancy[tier].peak_bytes) for one in summaries.values())
            for tier in found
        }
        return tuple(
            Line(f"{tier} peak", "B", planned[tier], float(peak)) for tier, peak in found.items()
        )


def pass_lines(planned: Planned, summary: Summary, spans: tuple[Span, ...]) -> tuple[Line, ...]:
    """One pass, predicted and measured: its time, and how long each lane was busy."""
    actions = planned.plan.actions
    ends = [span.end_s for span in spans if isinstance(actions[span.index], Run)]
    busy = busy_seconds(planned.plan, spans)
    return (
        Line("a pass", "s", summary.seconds, max(ends, default=0.0)),
        *(
            Line(f"{lane} busy", "s", use.busy_s, busy[lane])
            for lane, use in summary.lanes.items()
            if lane in busy
        ),
    )
