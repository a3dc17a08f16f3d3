"""What a script prints of a plan: before a run, and of the run."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memsched.errors import DoesNotFitError
from memsched.machine import NVME
from memsched.plan_json import plan_digest
from memsched.profiles import load_machine
from qwen3vl_jax.config import Config, load_config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.model import Qwen3VL
from qwen3vl_jax.parameters import named_dtype
from qwen3vl_jax.planned.forecast import forecast
from qwen3vl_jax.planned.loading import Budgets, this_machine
from qwen3vl_jax.planned.reporting import (
    PlanReport,
    forecast_dict,
    forecast_text,
    refusal_dict,
)
from qwen3vl_jax.planned.request import Request, request_of
from qwen3vl_jax.planned.runner import PlannedRunner

FORMATS = (".json", ".txt")


@dataclasses.dataclass(frozen=True, slots=True)
class DryRun:
    """A forecast as data and as text. `error` says why there is none."""

    data: dict[str, Any]
    text: str
    error: DoesNotFitError | None = None


def dry_run(config: Config, request: Request, budgets: Budgets, *, dtype: str | None) -> DryRun:
    """What a request would take; opens no weight.

    Raises:
        UsageError: a request or a budget that makes no sense.
    """
    chosen = named_dtype(config.dtype if dtype is None else dtype)
    request.capacity(config)
    machine = this_machine(budgets)
    if budgets.machine is not None and budgets.nvme_space is None:
        # A machine that is not this one has all its disk, without a directory of this one.
        space = load_machine(Path(budgets.machine)).tier(NVME).capacity_bytes
        machine = machine.with_capacities({NVME: space})
    try:
        found = forecast(config, machine, request, dtype=chosen)
    except DoesNotFitError as error:
        data = refusal_dict(error, machine, request, chosen.name)
        return DryRun(data, f"{error}\n", error)
    return DryRun(forecast_dict(found), forecast_text(found))


def dry_run_of(
    path: Path,
    dtype: str | None,
    inputs: Mapping[str, Any],
    new_tokens: int,
    budgets: Mapping[str, Any],
) -> DryRun:
    """What a checkpoint would take for a processor's arrays and an answer of so many tokens."""
    config = load_config(path)
    request = request_of(config, inputs, new_tokens)
    return dry_run(config, request, Budgets(**budgets), dtype=dtype)


def check_report(path: Path | None) -> None:
    """Raises UsageError for a file name that is of no format of ours."""
    if path is not None and path.suffix not in FORMATS:
        raise UsageError(f"--report {path}: a name that ends in {' or '.join(FORMATS)} is wanted")


def write_report(path: Path, data: dict[str, Any], text: str) -> None:
    """The text or the data, as the file's name says."""
    path.write_text(json.dumps(data, indent=1) + "\n" if path.suffix == ".json" else text)


def print_dry_run(found: DryRun, *, report: Path | None, as_json: bool) -> int:
    """Writes a forecast to stdout and to a file.

    Raises:
        DoesNotFitError: there is no forecast; its JSON has been written.
    """
    if report is not None:
        write_report(report, found.data, found.text)
    if as_json:
        print(json.dumps(found.data), flush=True)
    if found.error is not None:
        raise found.error
    if not as_json:
        print(found.text, end="", flush=True)
    return 0


def run_figures(model: Qwen3VL) -> dict[str, Any]:
    """What plans say and did, for a script's JSON; nothing of a model without plans."""
    runner = model.runner
    if not isinstance(runner, PlannedRunner):
        return {}
    phases = PlanReport(runner).to_dict()["phases"]
    decode = next((plan for name, plan in runner.plans.items() if name == "decode"), None)
    return {
        "peak_bytes": runner.executor.ledger_peak_bytes,
        "written_bytes": runner.executor.written_bytes,
        "predicted": {
            "seconds": {name: phase["seconds"] for name, phase in phases.items()},
            "decode_tokens_per_s": 1 / phases["decode"]["seconds"] if decode else None,
            "peak_bytes": {name: phase["peak_bytes"] for name, phase in phases.items()},
        },
        "plan_digest": plan_digest(decode.plan) if decode else None,
    }
