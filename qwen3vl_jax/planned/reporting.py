"""What the plans of a model say, and what came of them: text and plain data."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from memsched.cost import CostModel, Span
from memsched.cost.learned import describe
from memsched.plan import Run
from memsched.report import Line, Summary, busy_seconds, comparison_text, summarize
from memsched.report import to_dict as summaries_to_dict
from memsched.report import to_text as summaries_to_text
from memsched.report.chapter import Chapter
from qwen3vl_jax.planned.chapters import (
    forecast_chapters,
    forecast_cover,
    run_assumptions,
    run_chapters,
    run_cover,
    run_form,
)
from qwen3vl_jax.planned.forecast import Forecast, forecast, other_ways, with_codecs
from qwen3vl_jax.planned.forecast_data import BESIDE_THE_PLAN, forecast_dict
from qwen3vl_jax.planned.forecast_text import forecast_text
from qwen3vl_jax.planned.request import Request
from qwen3vl_jax.planned.runner import PlannedRunner
from qwen3vl_jax.planned.tally import Tally
from qwen3vl_jax.planned.turns import Planned
from qwen3vl_jax.prompt_cache import PromptCache

# The phase that is carried out most.
ANSWER = "decode"


@dataclasses.dataclass(frozen=True, slots=True)
class PlanReport:
    """What the plans of a model do, and what came of those that were carried out.

    Before the first call, that is a forecast for an ordinary request.
    """

    runner: PlannedRunner
    request: Request = dataclasses.field(default_factory=Request)
    prompt_cache: PromptCache | None = None

    @property
    def cost(self) -> CostModel:
        """What the plans were made with."""
        return self.runner.cost

    def report(self) -> str:
        """Text: every plan, then predicted against measured."""
        summaries = self._summaries()
        if not summaries:
            return forecast_text(self._forecast())
        said = (
            f"times: {describe(self.cost)}\n{run_form(self.runner)}\n"
            f"main memory beside the plan: {BESIDE_THE_PLAN}\n"
        )
        blocks = [said, summaries_to_text(summaries)]
        for name, lines in self._measured(summaries).items():
            blocks.append(f"{name}, the newest pass\n" + comparison_text(lines))
        blocks.append("so far\n" + comparison_text(self._totals(summaries)))
        if self.prompt_cache is not None:
            blocks.append(self.prompt_cache.text() + "\n")
        return "\n".join(blocks)

    def to_dict(self) -> dict[str, Any]:
        """The same as data. "measured" has a list of lines for each phase that ran."""
        summaries = self._summaries()
        if not summaries:
            return forecast_dict(self._forecast())
        measured = {**self._measured(summaries), "so far": self._totals(summaries)}
        kept = {} if self.prompt_cache is None else {"prompt_cache": self.prompt_cache.to_dict()}
        return (
            summaries_to_dict(summaries)
            | kept
            | {"assumptions": run_assumptions(self.runner, self.cost)}
            | {
                "measured": {
                    name: [dataclasses.asdict(line) for line in lines]
                    for name, lines in measured.items()
                }
            }
        )

    def html(self) -> str:
        """A page to look at: one file, which loads nothing."""
        from memsched.report.page import page

        summaries = self._summaries()
        if not summaries:
            found = self._forecast()
            return page(forecast_chapters(found), forecast_cover(found))
        cover = run_cover(self.runner, self.cost)
        if self.prompt_cache is not None:
            said = self.prompt_cache.text().splitlines()
            cover = dataclasses.replace(cover, lines=(*cover.lines, *said))
        return page(self._chapters(summaries), cover)

    def perfetto(self) -> str:
        """A trace for Perfetto and chrome://tracing, as JSON text."""
        from memsched.report.perfetto import perfetto

        summaries = self._summaries(other_ways_too=False)  # a trace does not show them
        if not summaries:
            return perfetto(forecast_chapters(self._forecast()))
        return perfetto(self._chapters(summaries))

    def _chapters(self, summaries: Mapping[str, Summary]) -> list[Chapter]:
        return run_chapters(self.runner, self.cost, summaries, self._measured(summaries))

    def _forecast(self) -> Forecast:
        runner = self.runner
        kv_blocks, chunk = runner.allowed
        return forecast(
            runner.config,
            runner.machine,
            dataclasses.replace(self.request, kv=runner.kv, kv_blocks=kv_blocks, chunk=chunk),
            dtype=runner.dtype,
            cost=self.cost,
            encodings=runner.encodings,
            plan_seconds=runner.plan_seconds,
        )

    def _summaries(self, *, other_ways_too: bool = True) -> dict[str, Summary]:
        """Of every plan; that of the answer comes last, with what plainer ways would take."""
        runner, found = self.runner, {}
        for name, planned in sorted(runner.plans.items(), key=lambda item: item[0] == ANSWER):
            traced = planned.traced
            others: Mapping[str, float | None] = {}
            if name == ANSWER and other_ways_too:
                others = other_ways(traced, runner.machine, self.cost, runner.plan_seconds)
            found[name] = summarize(planned.plan, traced.program, runner.machine, self.cost, others)
        return {name: with_codecs(summary, runner.encodings) for name, summary in found.items()}

    def _measured(self, summaries: Mapping[str, Summary]) -> dict[str, tuple[Line, ...]]:
        plans = self.runner.plans
        return {
            name: (
                *pass_lines(plans[name], summaries[name], spans),
                *disk_lines(self.runner.tallies.get(id(plans[name].plan))),
            )
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


def disk_lines(tally: Tally | None) -> tuple[Line, ...]:
    """Bytes of the disk in a pass: as planned, and the mean of all passes of this plan. Weights
    that were on their way when the first one began are among them.
    """
    if tally is None or not tally.passes:
        return ()
    read, written = tally.planned_bytes
    return (
        Line("read_bytes", "B", float(read), tally.read_bytes / tally.passes),
        Line("written_bytes", "B", float(written), tally.written_bytes / tally.passes),
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
