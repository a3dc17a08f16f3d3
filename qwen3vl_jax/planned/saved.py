"""Plans in a file: what a dry run decided, for a run of the same request to carry out.

{"format": "qwen3vl plans", "version": 2, "request": "512 prompt tokens, ...",
"forms": {"block_slots": null, "chunk_tokens": 512},
"granularity": {"experts_per_step": null, "split_dense": true},
"weights": ["language_model.norm.weight", ...],
"phases": [
{"phase": "decode", "shapes": [[[1, 1, 2048], "bfloat16"], ...], "plan": {...}}],
"report": {...}}

A plan is as memsched/plan_json.py writes it; the report is that of `--report x.json`. Nothing in a
file is believed: every plan is compared with the program that is traced from the model, verified
on this machine, and refused with one line otherwise.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from memsched.errors import DoesNotFitError, PlanError
from memsched.machine import NVME, Machine
from memsched.plan import Copy, Plan
from memsched.plan_json import LARGEST_TEXT, LONGEST_NAME, from_values, parse
from memsched.program import ArraySpec, Program
from memsched.referee import verify
from memsched.sizes import LARGEST_BYTES
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.layer_steps import Granularity
from qwen3vl_jax.planned.options import ALWAYS, AUTO, MOST_CHUNK

FORMAT = "qwen3vl plans"
VERSION = 2
MOST_PHASES = 1000
ANEW = "write a fitting one with --dry-run --save-plan"

_KEYS = ["format", "forms", "granularity", "phases", "report", "request", "version", "weights"]

# Shape and dtype of every array that a phase takes.
Shapes = tuple[tuple[tuple[int, ...], str], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class SavedPlans:
    """What a file holds. `weights` are all that any of its phases reads, in order.

    `granularity` is into which steps layers were cut: other steps would need other plans. Its KV
    cache is in blocks of `block_slots`, if that is not None.
    """

    path: Path
    request: str
    chunk_tokens: int
    block_slots: int | None
    granularity: Granularity
    weights: tuple[str, ...]
    plans: Mapping[tuple[str, Shapes], Plan]

    def plan_of(self, phase: str, arrays: Any, program: Program, machine: Machine) -> Plan:
        """The plan of a phase for arrays of these shapes, right for this program and machine.

        Raises:
            UsageError: it has none, or it was made for something else.
            DoesNotFitError: this machine has less memory than the plan takes.
            PlanError: the plan breaks a rule.
        """
        plan = self.plans.get((phase, shapes_of(arrays)))
        if plan is None:
            raise self.missing(phase)
        if plan.program != program.digest:
            raise UsageError(
                f"{self.path}: its plan for {phase} is for another model or version; {ANEW}"
            )
        if strange := _tiers(plan) - {tier.name for tier in machine.tiers}:
            raise UsageError(
                f"{self.path}: its plan for {phase} moves to {min(strange)!r}, which machine "
                f"{machine.name!r} has not; {ANEW}"
            )
        try:
            peaks = verify(plan, program, machine.with_capacities(_boundless(machine)))
        except PlanError as error:
            raise PlanError(f"{self.path}: {phase}: {error}") from error
        for tier in machine.tiers:
            if peaks[tier.name] > tier.capacity_bytes:
                raise DoesNotFitError(
                    f"{self.path}: its plan for {phase} takes {peaks[tier.name]:,} B of "
                    f"{tier.name} {'space' if tier.name == NVME else 'memory'}, not "
                    f"{tier.capacity_bytes:,} B; {ANEW}",
                    peaks,
                )
        return plan

    def check_forms(self, kv_blocks: str, chunk: int | str) -> None:
        """Whether a run may take the form of the cache and the chunk that the file has.

        Raises:
            UsageError: it may not.
        """
        if self.block_slots is not None:
            raise UsageError(
                f"{self.path}: its KV cache is in blocks of {self.block_slots:,} tokens, for which "
                "runs plan anew at every border; leave --plan away"
            )
        if kv_blocks == ALWAYS:
            raise UsageError(
                f"{self.path}: its KV cache is in one piece; drop --kv-blocks {ALWAYS}"
            )
        if chunk not in (AUTO, self.chunk_tokens):
            raise UsageError(
                f"{self.path}: is for chunks of {self.chunk_tokens:,} tokens, not of {chunk:,}; "
                f"add --chunk {self.chunk_tokens}, or {ANEW}"
            )

    def missing(self, phase: str) -> UsageError:
        """That there is no plan for these shapes of a phase."""
        return UsageError(
            f"{self.path}: has no plan for {phase} with these shapes, it is for {self.request}; "
            f"{ANEW}"
        )

    def known(self, specs: Mapping[str, ArraySpec]) -> dict[str, ArraySpec]:
        """All weights that the phases share, as the programs of the plans know them.

        Raises:
            UsageError: the model has no such weight.
        """
        for name in self.weights:
            if name not in specs:
                raise UsageError(f"{self.path}: is for a model with a weight {name!r}; {ANEW}")
        return {name: specs[name] for name in self.weights}


def shapes_of(arrays: Any) -> Shapes:
    """Shapes and dtypes of the leaves of a phase's arrays."""
    return tuple((tuple(leaf.shape), np.dtype(leaf.dtype).name) for leaf in jax.tree.leaves(arrays))


def read_plans(path: Path) -> SavedPlans:
    """Plans of a file, of the right form.

    Raises:
        PlanError: it is no such file, or of another version.
    """
    values = read_object(path)
    if (values.get("format"), values.get("version")) != (FORMAT, VERSION):
        raise PlanError(f"{path}: no plans of version {VERSION}; {ANEW}")
    if sorted(values) != _KEYS:
        raise PlanError(f"{path}: has the keys {ascii(sorted(values))[:80]}, wanted are {_KEYS}")
    request, weights, phases = values["request"], values["weights"], values["phases"]
    if not isinstance(request, str) or len(request) > LONGEST_NAME or not request.isprintable():
        raise PlanError(f"{path}: request must be one line of text")
    if not isinstance(weights, list) or not all(isinstance(name, str) for name in weights):
        raise PlanError(f"{path}: weights must be a list of names")
    if not isinstance(phases, list) or len(phases) > MOST_PHASES:
        raise PlanError(f"{path}: phases must be a list of at most {MOST_PHASES:,} plans")
    plans = {}
    for index, row in enumerate(phases):
        try:
            key, plan = _phase(row)
        except PlanError as error:
            raise PlanError(f"{path}: phases[{index}]: {error}") from error
        plans[key] = plan
    granularity = _granularity(values["granularity"], path)
    return SavedPlans(
        path, request, *_forms(values["forms"], path), granularity, tuple(weights), plans
    )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        PlanError: there is none, or it is too large.
    """
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_TEXT + 1).decode()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        raise PlanError(
            f"{path}: no JSON file; name one that --save-plan or --report has written"
        ) from None
    try:
        return parse(text)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def read_report(path: Path) -> dict[str, Any]:
    """The report in a file of `--report x.json`, or in one of `--save-plan`.

    Raises:
        PlanError: it is neither.
    """
    values = read_object(path)
    report = values.get("report") if values.get("format") == FORMAT else values
    if not isinstance(report, dict) or "phases" not in report:
        raise PlanError(f"{path}: no report; name a file of --report x.json or --save-plan")
    return report


def _forms(value: Any, path: Path) -> tuple[int, int | None]:
    match value:
        case {"chunk_tokens": int() as chunk, "block_slots": None | int() as slots} if (
            len(value) == 2
            and not any(isinstance(count, bool) for count in (chunk, slots))
            and 0 < chunk <= MOST_CHUNK
            and (slots is None or slots > 0)
        ):
            return chunk, slots
    raise PlanError(f"{path}: forms must have chunk_tokens and block_slots")


def _granularity(value: Any, path: Path) -> Granularity:
    match value:
        case {"experts_per_step": None | int() as experts, "split_dense": bool() as split} if (
            len(value) == 2 and not isinstance(experts, bool) and (experts is None or experts > 0)
        ):
            return Granularity(split, experts)
    raise PlanError(f"{path}: granularity must have experts_per_step and split_dense")


def _phase(row: Any) -> tuple[tuple[str, Shapes], Plan]:
    if not isinstance(row, dict) or sorted(row) != ["phase", "plan", "shapes"]:
        raise PlanError("must have phase, shapes and plan")
    if not isinstance(row["phase"], str) or not isinstance(row["plan"], dict):
        raise PlanError("phase must be a name, and plan an object")
    return (row["phase"], _shapes(row["shapes"])), from_values(row["plan"])


def _shapes(value: Any) -> Shapes:
    found = []
    for item in value if isinstance(value, list) else [None]:
        match item:
            case [[*shape], str() as dtype] if all(type(axis) is int for axis in shape):
                found.append((tuple(shape), dtype))
            case _:
                raise PlanError(f"shapes must be like [[[1, 2], 'int32']]: {ascii(item)[:80]}")
    return tuple(found)


def _tiers(plan: Plan) -> set[str]:
    tiers = {rest.tier for rest in plan.entry + plan.exit}
    for action in plan.actions:
        if isinstance(action, Copy):
            tiers |= {action.source, action.target}
    return tiers


def _boundless(machine: Machine) -> dict[str, int]:
    return {tier.name: LARGEST_BYTES for tier in machine.tiers}
