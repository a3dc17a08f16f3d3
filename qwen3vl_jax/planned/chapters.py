"""Plans of a forecast or of a model as chapters: what pages and traces are made of."""

from collections.abc import Mapping, Sequence

from memsched.cost import CostModel
from memsched.cost.learned import describe
from memsched.report import Line, Summary
from memsched.report.chapter import Chapter, Cover
from memsched.report.timeline import usual_spans
from qwen3vl_jax.planned.forecast import Forecast
from qwen3vl_jax.planned.forecast_data import (
    BESIDE_THE_PLAN,
    first_token_seconds,
    forecast_assumptions,
    request_text,
    tokens_of,
    workspaces,
)
from qwen3vl_jax.planned.request import form_text
from qwen3vl_jax.planned.runner import PlannedRunner


def forecast_chapters(found: Forecast) -> list[Chapter]:
    """One for each pass, in order."""
    machine, cost = found.machine, found.cost
    chapters = []
    compiled = workspaces(found)
    for one in found.passes:
        plan, program = one.plan, one.traced.program
        last = one is found.passes[-1]
        chapters.append(
            Chapter(
                name=one.work.name,
                plan=plan,
                program=program,
                machine=machine,
                summary=one.summary,
                predicted=usual_spans(plan, program, machine, cost),
                count=one.work.count,
                tokens=tokens_of(one),
                moving_s=one.moving_s,
                gains_s=found.gains_s if last else {},
                workspaces=[row for row in compiled if row["pass"] == one.work.name],
            )
        )
    return chapters


def forecast_cover(found: Forecast) -> Cover:
    """What is said of the whole request."""
    said = forecast_assumptions(found)
    words = {name: value for name, value in said.items() if isinstance(value, str)}
    return Cover(
        title=f"{found.config.model_type}, {found.dtype}, on {found.machine.name}",
        lines=(request_text(found),),
        first_token_s=first_token_seconds(found),
        total_s=found.seconds,
        smallest_bytes=found.smallest_bytes,
        assumptions=words,
    )


def run_chapters(
    runner: PlannedRunner,
    cost: CostModel,
    summaries: Mapping[str, Summary],
    lines: Mapping[str, Sequence[Line]],
) -> list[Chapter]:
    """One for each plan of a model; those that ran have what was measured beside it."""
    chapters = []
    for name, summary in summaries.items():
        planned = runner.plans[name]
        plan, program = planned.plan, planned.traced.program
        chapters.append(
            Chapter(
                name=name,
                plan=plan,
                program=program,
                machine=runner.machine,
                summary=summary,
                predicted=usual_spans(plan, program, runner.machine, cost),
                measured=runner.spans[name] if name in lines else (),
                lines=lines.get(name, ()),
            )
        )
    return chapters


def run_form(runner: PlannedRunner) -> str:
    """How the newest KV cache lies, and in what chunks its prompts are read."""
    cache = runner.timetable.cache
    return form_text(None if cache is None else cache.block_slots, runner.chunk_tokens)


def run_assumptions(runner: PlannedRunner, cost: CostModel) -> dict[str, str]:
    """What the numbers of a run rest on."""
    return {
        "seconds": describe(cost),
        "kv_form": run_form(runner),
        "process": BESIDE_THE_PLAN,
    }


def run_cover(runner: PlannedRunner, cost: CostModel) -> Cover:
    """What is said of a model."""
    return Cover(
        title=f"{runner.config.model_type}, {runner.dtype.name}, on {runner.machine.name}",
        lines=("after a run; measured are the newest passes",),
        assumptions=run_assumptions(runner, cost),
    )
