"""A forecast as plain data, for JSON."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from memsched.aot import Workspace
from memsched.calibration.resident import PROCESS_BYTES
from memsched.cost import CostModel
from memsched.cost.learned import describe
from memsched.machine import Machine
from memsched.report import Summary
from memsched.report import to_dict as summaries_to_dict
from qwen3vl_jax.config import Config
from qwen3vl_jax.planned.forecast import Forecast, Pass
from qwen3vl_jax.planned.request import Request

PARTS = ("vision", "prefill", "decode")
# The first as `benchmark.capped.OWN_BYTES` and more for pictures, the second as
# `scripts/calibrate.py --evaluate` shows.
BESIDE_THE_PLAN = (
    f"Python, JAX, programs 0.35 to 0.5 GB, buffers {PROCESS_BYTES / 1e6:.0f} MB at most (measured)"
)


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
        "prices": rate_gains(found),
        "dual_prices": last["dual_prices"],
        "baselines": last["baselines"],
        "arrays": last["arrays"],
        "passes": [
            {"name": one.work.name, "count": one.work.count, "moving_seconds": one.moving_s}
            | summaries_to_dict({"it": one.summary})["phases"]["it"]
            for one in found.passes
        ],
        "tokens_per_s": tokens_per_s(found),
        "first_token_seconds": first_token_seconds(found),
        "request_seconds": found.seconds,
        "request_seconds_in_blocks": found.in_blocks_s,
        "assumptions": forecast_assumptions(found)
        | {
            "prompt_length": found.request.prompt_length(found.config),
            "max_context": found.request.capacity(found.config),
        },
        "plan_seconds": found.plan_seconds,
        "plan_cpu_seconds": found.plan_cpu_seconds,
        "workspaces": workspaces(found),
    }


def workspaces(found: Forecast) -> list[dict[str, Any]]:
    """What XLA assigns to every kind of step, and what our estimate was; the largest first.

    Empty if nothing was compiled. `ratio` is None where nothing was expected.
    """
    rows = [
        {
            "pass": one.work.name,
            "step": workspace.kernel,
            "estimated_bytes": workspace.estimated_bytes,
            "compiled_bytes": workspace.compiled_bytes,
            "ratio": _ratio(workspace),
        }
        for one in found.passes
        for workspace in one.traced.compiled
    ]
    return sorted(rows, key=lambda row: -row["compiled_bytes"])


def _ratio(workspace: Workspace) -> float | None:
    if not workspace.estimated_bytes:
        return None
    return workspace.compiled_bytes / workspace.estimated_bytes


def workspace_source(machine: Machine, *, compiled: bool) -> str:
    """Where the workspaces of steps come from."""
    if not compiled or machine.target is None:
        return "estimated from each step's equations as XLA computes them on a CPU"
    capability = machine.target.compute_capability
    return f"XLA's own, of every step compiled for CUDA compute capability {capability}"


def refusal_dict(smallest: Mapping[str, int], said: Mapping[str, Any]) -> dict[str, Any]:
    """What `forecast_dict` would say, of a refused request with these `assumptions`.

    `smallest` can be empty.
    """
    return {
        "fits": False,
        "smallest_workable": dict(smallest),
        "phases": {},
        "gap": None,
        "prices": {},
        "dual_prices": None,
        "baselines": {},
        "arrays": [],
        "assumptions": dict(said),
        "plan_seconds": None,
        "workspaces": [],
    }


def forecast_assumptions(found: Forecast) -> dict[str, Any]:
    """What a forecast rests on."""
    asked = found.config, found.machine, found.request, found.dtype, found.cost
    return assumptions(*asked, compiled=is_compiled(found))


def is_compiled(found: Forecast) -> bool:
    """Whether its workspaces are those of XLA."""
    return any(one.traced.compiled for one in found.passes)


def assumptions(
    config: Config,
    machine: Machine,
    request: Request,
    dtype: str,
    cost: CostModel,
    *,
    compiled: bool,
) -> dict[str, Any]:
    """The same of any request, whether it fits or not."""
    text = config.text
    experts = f", {text.num_experts} experts" if text.num_experts else ""
    return {
        "model": f"{config.model_type}, {text.num_hidden_layers} layers of "
        f"{text.hidden_size:,}{experts}",
        "machine": machine.name,
        "machine_digest": machine.digest,
        "capacity_bytes": {tier.name: tier.capacity_bytes for tier in machine.tiers},
        "bytes_per_s": {f"{link.source}->{link.target}": link.bytes_per_s for link in machine.links}
        | {"compute": machine.compute.bytes_per_s},
        "flops_per_s": machine.compute.flops_per_s,
        "dtype": dtype,
        "request": dataclasses.asdict(request),
        "chunk_tokens": request.chunk_tokens if request.decided else request.chunk,
        "kv_form": request.form_text,
        "seconds": describe(cost),
        "prices": "tokens/s by the bound: 1 GB more of a tier; disk, bus, compute twice as fast",
        "workspace": workspace_source(machine, compiled=compiled),
        "process": BESIDE_THE_PLAN,
        "experts": "all experts of a layer are brought, whoever is chosen",
    }


def _part(passes: Sequence[Pass], part: str) -> dict[str, Any]:
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
        "seconds_p90": _seconds_p90(counted),
        "peak_bytes": peaks,
        "link_bytes": nbytes,
    }


def _seconds_p90(counted: Iterable[tuple[int, Summary]]) -> float | None:
    """Seconds that nine of ten times are enough; None of a machine that was not calibrated."""
    total_s = 0.0
    for count, summary in counted:
        if summary.seconds_p90 is None:
            return None
        total_s += count * summary.seconds_p90
    return total_s


def request_text(found: Forecast) -> str:
    """What was asked, in one line."""
    request, config = found.request, found.config
    count = len(request.images) + len(request.frames)
    pictures = f" with {count} picture{'s' * (count > 1)}" if count else ""
    return (
        f"{request.prompt_length(config):,} prompt tokens{pictures}, {request.new_tokens:,} new "
        f"ones, {request.batch} at once, room for {request.capacity(config):,} tokens each"
    )


def tokens_per_s(found: Forecast) -> float:
    """Of all rows together."""
    return found.request.batch / found.summaries["decode"].seconds


def first_token_seconds(found: Forecast) -> float:
    """From all weights in files to the scores of each row's first new token."""
    before = [one for one in found.passes if one.work.part != "decode"]
    passes_s = sum(one.work.count * one.summary.seconds + one.moving_s for one in before)
    return passes_s + found.borders_s(found.request.prompt_length(found.config))


def rate_gains(found: Forecast) -> dict[str, float]:
    """Tokens/s that the bound of decoding allows more, by what there is more of (`what_if`)."""
    now_s, rows = found.passes[-1].summary.bound.seconds, found.request.batch
    return {
        name: rows / (now_s - gain) - rows / now_s if now_s > gain else 0.0
        for name, gain in found.gains_s.items()
    }


def tokens_of(one: Pass) -> int:
    """Tokens that a pass is for; 0 where that means nothing."""
    if one.work.phase not in ("prefill", "decode"):
        return 0
    rows, tokens = one.work.arrays[0].shape[:2]
    return int(rows * tokens)
