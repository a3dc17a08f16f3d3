"""Plans of a forecast as a file that `saved` reads, and a model that carries such a file out."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from memsched.plan_json import to_json
from qwen3vl_jax.model import Qwen3VL
from qwen3vl_jax.planned.forecast import Forecast
from qwen3vl_jax.planned.forecast_data import forecast_dict, request_text
from qwen3vl_jax.planned.loading import planned_runner
from qwen3vl_jax.planned.request import request_of
from qwen3vl_jax.planned.saved import FORMAT, VERSION, SavedPlans, shapes_of
from qwen3vl_jax.planned.works import works_of


def adopt(model: Qwen3VL, saved: SavedPlans, inputs: Mapping[str, Any], new_tokens: int) -> None:
    """Lets a planned model answer one request by the plans of a file, all checked at once.

    Raises:
        UsageError: the plans are for another request or model.
        DoesNotFitError: this machine has less memory than they take.
        PlanError: a plan breaks a rule.
    """
    runner, config = planned_runner(model), model.config
    saved.check_forms(*runner.allowed)
    limits = {"max_context": runner.max_context, "kv": runner.kv, "chunk": saved.chunk_tokens}
    request = request_of(config, inputs, new_tokens, **limits)
    works = works_of(config, request, runner.dtype)
    for work in works:
        if (work.phase, shapes_of(work.arrays)) not in saved.plans:
            raise saved.missing(work.phase)
    runner.follow(saved.chunk_tokens)
    runner.expect(request.batch, request.capacity(config))
    for work in works:
        runner.adopt(work.phase, work.arrays, saved)


def plans_text(found: Forecast) -> str:
    """All plans of a forecast, as the text of a file."""
    rows = []
    for one in found.passes:
        shapes = json.dumps(shapes_of(one.work.arrays))
        head = f'{{"phase": {json.dumps(one.work.phase)}, "shapes": {shapes}, "plan": '
        rows.append(f"{head}{to_json(one.plan).rstrip()}}}")
    weights = found.passes[-1].traced.program.of_kind("weight")
    forms = {
        "block_slots": found.request.block_slots,
        "chunk_tokens": found.request.chunk_tokens,
    }
    return (
        f'{{"format": {json.dumps(FORMAT)}, "version": {VERSION}, '
        f'"request": {json.dumps(request_text(found))},\n'
        f'"forms": {json.dumps(forms)},\n'
        f'"granularity": {json.dumps(dataclasses.asdict(found.granularity))},\n'
        f'"weights": {json.dumps(weights)},\n'
        '"phases": [\n' + ",\n".join(rows) + f'],\n"report": {json.dumps(forecast_dict(found))}}}\n'
    )
