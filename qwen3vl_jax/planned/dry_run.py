"""What a script prints of a plan: before a run, and of the run."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memsched.aot import Compiler
from memsched.cost import CostModel
from memsched.errors import DoesNotFitError, ProgramError
from memsched.machine import NVME, Machine
from memsched.plan_json import plan_digest
from memsched.profiles import load_machine
from memsched.report import summarize
from memsched.report.page import page
from memsched.report.perfetto import perfetto
from memsched.report.rendering import Group, RenderableType, plain, show
from memsched.whole_file import check_target, write_whole
from qwen3vl_jax import console
from qwen3vl_jax.checkpoints.encodings import NOTHING_ENCODED, Encodings
from qwen3vl_jax.checkpoints.opening import described
from qwen3vl_jax.checkpoints.selection import level_of
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.model import Qwen3VL
from qwen3vl_jax.parameters import named_dtype
from qwen3vl_jax.planned.batches import Batches, batches_text, batches_view
from qwen3vl_jax.planned.chapters import forecast_chapters, forecast_cover, run_form
from qwen3vl_jax.planned.choosing import Chosen, candidates
from qwen3vl_jax.planned.forecast import Forecast, explained, forecast
from qwen3vl_jax.planned.forecast_data import assumptions, forecast_dict, refusal_dict
from qwen3vl_jax.planned.forecast_text import forecast_view
from qwen3vl_jax.planned.loading import Budgets, check_blocks, machine_and_cost
from qwen3vl_jax.planned.reporting import PlanReport
from qwen3vl_jax.planned.request import Request, request_of
from qwen3vl_jax.planned.runner import PlannedRunner
from qwen3vl_jax.planned.saving import plans_text
from qwen3vl_jax.planned.tally import MOVING

TRACE = ".perfetto.json"
FORMATS = (".json", ".txt", ".html", TRACE)


@dataclasses.dataclass(frozen=True, slots=True)
class DryRun:
    """A forecast, or why there is none, and it as data; the batches that it was chosen from."""

    data: dict[str, Any]
    found: Forecast | None
    error: DoesNotFitError | ProgramError | None = None
    batches: Batches | None = None


def dry_run(
    config: Config,
    request: Request,
    budgets: Budgets,
    *,
    dtype: str | None,
    compiler: Compiler | None = None,
    encodings: Encodings = NOTHING_ENCODED,
) -> DryRun:
    """What a request would take; opens no weight.

    Args:
        compiler: says what workspace steps take; by default it is estimated.
        encodings: of weights that rest encoded.

    Raises:
        UsageError: a request or a budget that makes no sense.
    """
    request.capacity(config)
    machine, cost = planned_machine(budgets)
    chosen = named_dtype(dtype or config.dtype)
    asked = _Asked(request, machine, cost, chosen, budgets, compiler)
    refused: DoesNotFitError | ProgramError | None = None
    for choice in _choices(config, encodings, asked):
        try:
            found = _forecast(choice, asked)
        except (DoesNotFitError, ProgramError) as error:
            refused = error
        else:
            return DryRun(forecast_dict(found) | _codecs_dict(choice, budgets.level), found)
    assert refused is not None
    smallest = refused.smallest if isinstance(refused, DoesNotFitError) else {}
    how = asked.dtype.name, asked.cost
    said = assumptions(config, machine, request, *how, compiled=compiler is not None)
    return DryRun(refusal_dict(smallest, said), None, refused)


@dataclasses.dataclass(frozen=True, slots=True)
class _Asked:
    """What a forecast is made for."""

    request: Request
    machine: Machine
    cost: CostModel
    dtype: np.dtype
    budgets: Budgets
    compiler: Compiler | None


def _choices(config: Config, encodings: Encodings, asked: _Asked) -> Iterable[Chosen]:
    """How the model may rest, best first. What is encoded already stays as it is."""
    level = level_of(asked.budgets.level)
    if encodings or not level.codecs:
        return (Chosen(config, encodings),)
    return candidates(
        config, asked.machine, asked.request, dtype=asked.dtype, cost=asked.cost, level=level
    )


def _forecast(choice: Chosen, asked: _Asked) -> Forecast:
    found = forecast(
        choice.config,
        asked.machine,
        asked.request,
        dtype=asked.dtype,
        cost=asked.cost,
        compiler=asked.compiler,
        encodings=choice.encodings,
        plan_seconds=asked.budgets.plan_seconds,
    )
    return explained(found, choice.reasons) if choice.reasons else found


def _codecs_dict(choice: Chosen, level: str) -> dict[str, Any]:
    """What was chosen by a level, as data."""
    if not choice.reasons:
        return {}
    budget = level_of(level).error_budget
    return {
        "level": level,
        "error_budget": budget,
        "predicted_error": choice.predicted_error,
        "codec_assumptions": "sensitivities by role, errors as of normal numbers",
    }


def planned_machine(budgets: Budgets) -> tuple[Machine, CostModel]:
    """The machine of some budgets, and its cost model. One of a file is not this one, and has all
    its disk.

    Raises:
        UsageError: blocks of KV caches are wanted of this machine, and no place for them is named.
    """
    if budgets.machine is None:
        check_blocks(budgets)
    machine, cost = machine_and_cost(budgets)
    if budgets.machine is not None and budgets.nvme_space is None:
        space = load_machine(Path(budgets.machine)).tier(NVME).capacity_bytes
        machine = machine.with_capacities({NVME: space})
    return machine, cost


def dry_run_of(
    path: Path,
    dtype: str | None,
    inputs: Mapping[str, Any],
    new_tokens: int,
    budgets: Mapping[str, Any],
) -> DryRun:
    """What a checkpoint would take for a processor's arrays and an answer of so many tokens."""
    (config, encodings), limits = described(path), Budgets(**budgets)
    room = {"max_context": limits.max_context}
    request = request_of(config, inputs, new_tokens, **room, **limits.forms)
    return dry_run(config, request, limits, dtype=dtype, encodings=encodings)


def check_reports(paths: Iterable[Path], formats: Sequence[str] = FORMATS) -> None:
    """Before anything is done.

    Raises:
        UsageError: a file name that is of no format of ours.
        StoreError: nothing can be written there.
    """
    for path in paths:
        if _format(path) not in formats:
            raise UsageError(
                f"--report {path}: no {_format(path) or 'file without an ending'} is written here; "
                f"end the name in {', '.join(formats)}"
            )
        check_target(path)


def _format(path: Path) -> str:
    """The ending of a name that says what is written."""
    return TRACE if path.name.endswith(TRACE) else path.suffix


def write_report(path: Path, report: PlanReport) -> None:
    """Text, data, page or trace, as the file's name says."""
    if _format(path) == TRACE:
        content = report.perfetto()
    elif path.suffix == ".html":
        content = report.html()
    else:
        content = report.report() if path.suffix == ".txt" else _json(report.to_dict())
    write_whole(path, content)


def print_dry_run(
    dry: DryRun, *, reports: Iterable[Path], save_plan: Path | None, as_json: bool
) -> int:
    """Writes a forecast to stdout and to files; of a refusal only JSON, and says what is not there.

    Raises:
        DoesNotFitError, ProgramError: there is no forecast; its JSON has been written.
    """
    unwritten = [] if save_plan is None else [save_plan]
    for report in reports:
        if dry.found is not None or _format(report) == ".json":
            write_whole(report, _dry_report(report, dry))
        else:
            unwritten.append(report)
    if as_json:
        print(json.dumps(dry.data), flush=True)
    if dry.found is None:
        assert dry.error is not None
        if unwritten:
            names = ", ".join(map(str, unwritten))
            console.say(f"not written, as a refused request has no plan to show: {names}")
        raise dry.error
    if save_plan is not None:
        write_whole(save_plan, plans_text(dry.found))
    if not as_json:
        show(_view(dry, dry.found))
    return 0


def _dry_report(path: Path, dry: DryRun) -> str:
    kind = _format(path)
    if dry.found is None or kind == ".json":
        return _json(dry.data)
    if kind == ".txt":
        return plain(_view(dry, dry.found))
    chapters, cover = forecast_chapters(dry.found), forecast_cover(dry.found)
    if dry.batches is not None:
        cover = dataclasses.replace(cover, lines=(*cover.lines, batches_text(dry.batches)))
    return perfetto(chapters) if kind == TRACE else page(chapters, cover)


def _view(dry: DryRun, found: Forecast) -> RenderableType:
    """What is printed: which batches there were, and the forecast of the best."""
    if dry.batches is None:
        return forecast_view(found)
    return Group(batches_view(dry.batches), forecast_view(found))


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=1) + "\n"


def run_figures(model: Qwen3VL) -> dict[str, Any]:
    """What plans say and did, for a script's JSON; nothing of a model without plans."""
    runner = model.runner
    if not isinstance(runner, PlannedRunner):
        return {}
    decode = next((plan for name, plan in runner.plans.items() if name == "decode"), None)
    return {
        "peak_bytes": runner.executor.ledger_peak_bytes,
        "read_bytes": runner.executor.read_bytes,
        "written_bytes": runner.executor.written_bytes,
        "predicted": predicted_figures(runner, PlanReport(runner).cost),
        "kv_form": run_form(runner),
        "plan_digest": plan_digest(decode.plan) if decode else None,
    }


def predicted_figures(runner: PlannedRunner, cost: CostModel) -> dict[str, Any]:
    """What the passes that were carried out should have taken, by their plans. Loading takes
    nothing: weights stay in their files.
    """
    seconds = {"load": 0.0, "vision": 0.0, "prefill": 0.0, "decode": 0.0}
    peaks: dict[str, int] = {}
    nbytes = {"read_bytes": 0, "written_bytes": 0}
    token_s = None
    for tally in runner.tallies.values():
        read, written = tally.planned_bytes
        nbytes["read_bytes"] += tally.passes * read
        nbytes["written_bytes"] += tally.passes * written
        if tally.phase == MOVING:
            continue  # beside computing
        found = summarize(tally.plan, tally.program, runner.machine, cost)
        part = {"scores": "prefill", "verify": "decode"}.get(tally.phase, tally.phase)
        seconds[part] = seconds.get(part, 0.0) + tally.passes * found.seconds
        token_s = found.seconds if tally.phase == "decode" else token_s
        for tier, use in found.occupancy.items():
            peaks[tier] = max(peaks.get(tier, 0), use.peak_bytes)
    return {
        "seconds": seconds,
        "decode_tokens_per_s": None if token_s is None else 1 / token_s,
        "peak_bytes": peaks,
        **nbytes,
    }
