"""From a plan to operations: a pure function, done once per plan."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import assert_never

from memsched.machine import DEVICE, HOST, NVME, Machine, rounded
from memsched.plan import Copy, Free, Plan, Residence, Run
from memsched.program import ArraySpec, Program
from memsched.runtime.fuse import fused
from memsched.runtime.operations import Call, CopyOp, FreeOp, Op, Rests, RunOp, Schedule
from memsched.runtime.ranges import Range, size, union

# Workspaces of at most this may meet: what a dispatch ahead saves is worth more.
SMALL_WORKSPACE_BYTES = 4 << 20


def arena_tier(machine: Machine) -> str:
    """The tier whose weights lie at planned offsets."""
    return DEVICE if machine.device_is_host else HOST


def schedule(plan: Plan, program: Program, machine: Machine, *, fuse: bool = False) -> Schedule:
    """Make a verified plan ready.

    Args:
        fuse: make neighbouring Runs one dispatch.
    """
    ops: Iterable[Op] = _ops(plan, program, machine)
    if fuse:
        ops = fused(tuple(ops))
    ranges = union(_arena_ranges(plan, program, machine))
    start_bytes = dict.fromkeys((tier.name for tier in machine.tiers), 0)
    start_bytes[arena_tier(machine)] = size(ranges)
    weights_before, weights_after = _weights(plan.entry, program), _weights(plan.exit, program)
    if weights_after == weights_before:
        # One object: a plan that follows itself is then compared in no time.
        weights_after = weights_before
    given = [rest for rest in plan.entry if not _is_weight(rest, program)]
    for rest in (*weights_before.values(), *given):
        if rest.offset is None:
            spec = program.arrays[rest.array]
            start_bytes[rest.tier] += _taken_bytes(spec, rest.tier, machine)
    return Schedule(
        ops=_ordered(tuple(ops), on_heap=machine.device_is_host),
        ranges=ranges,
        weights_before=weights_before,
        weights_after=weights_after,
        given=tuple(program.arrays[rest.array] for rest in given),
        returned=tuple(rest.array for rest in plan.exit if not _is_weight(rest, program)),
        start_bytes=start_bytes,
        actions=len(plan.actions),
    )


def _ops(plan: Plan, program: Program, machine: Machine) -> Iterator[Op]:
    offsets = {(rest.array, rest.tier): rest.offset for rest in plan.entry}
    for index, action in enumerate(plan.actions):
        match action:
            case Run():
                yield _run_op(index, action, program, machine)
            case Copy():
                spec, offset = program.arrays[action.array], plan.slots.get(index)
                taken = _taken_bytes(spec, action.target, machine) if offset is None else 0
                offsets[action.array, action.target] = offset
                yield CopyOp(index, action, spec, offset, taken)
            case Free():
                spec = program.arrays[action.array]
                offset = offsets.pop((action.array, action.tier), None)
                freed = _taken_bytes(spec, action.tier, machine) if offset is None else 0
                yield FreeOp(index, action, offset, freed)
            case _:
                assert_never(action)


def _run_op(index: int, action: Run, program: Program, machine: Machine) -> RunOp:
    step = program.step(action.step)
    made = sum(_taken_bytes(program.arrays[name], DEVICE, machine) for name in step.writes)
    call = Call(step.kernel, step.inputs, step.results)
    return RunOp(
        index,
        action,
        (call,),
        step.inputs,
        step.results,
        step.updates,
        made,
        step.workspace_bytes,
    )


def _ordered(ops: tuple[Op, ...], *, on_heap: bool) -> tuple[Op, ...]:
    """The same with dispatches counted, and with what waits for which of them.

    Args:
        on_heap: workspaces come from the heap of this process.
    """
    runs = [op for op in ops if isinstance(op, RunOp)]
    last_use: dict[str, int] = {}
    ordered: list[Op] = []
    number = 0
    for op in ops:
        if isinstance(op, RunOp):
            before = runs[number - 1] if number else None
            after = runs[number + 1] if number + 1 < len(runs) else None
            settles = on_heap and before is not None and _is_large(before) and _is_large(op)
            last_use |= dict.fromkeys(op.inputs + op.results, number)
            ordered.append(
                dataclasses.replace(
                    op,
                    number=number,
                    witness=_witness(op, after) or 0,
                    follows=before is not None and not settles and _follows(before, op),
                    settles=settles,
                )
            )
            number += 1
        elif isinstance(op, FreeOp) and op.action.tier == DEVICE:
            ordered.append(dataclasses.replace(op, after_run=last_use.get(op.action.array, -1)))
        else:
            ordered.append(op)
    return tuple(ordered)


def _witness(op: RunOp, after: RunOp | None) -> int | None:
    """A result that the next dispatch does not consume: one can wait for it later on."""
    consumed = after.updates if after else ()
    kept = [place for place, name in enumerate(op.results) if name not in consumed]
    return kept[0] if kept else None


def _follows(before: RunOp, op: RunOp) -> bool:
    """Whether it may be dispatched while the one ahead runs.

    It takes a result of that one, so the two never run side by side; and it leaves another result,
    so that one can still tell when the first has ended.
    """
    return bool(set(before.results) & set(op.inputs)) and _witness(before, op) is not None


def _is_large(op: RunOp) -> bool:
    return op.passing_bytes > SMALL_WORKSPACE_BYTES


def _arena_ranges(plan: Plan, program: Program, machine: Machine) -> Iterator[Range]:
    places = [(rest.array, rest.offset) for rest in plan.entry if rest.offset is not None]
    for index, offset in plan.slots.items():
        action = plan.actions[index]
        if isinstance(action, Copy):
            places.append((action.array, offset))
    for name, offset in places:
        yield offset, offset + _taken_bytes(program.arrays[name], arena_tier(machine), machine)


def _weights(rests: tuple[Residence, ...], program: Program) -> Rests:
    return {
        (rest.array, rest.tier): rest
        for rest in rests
        if rest.tier != NVME and _is_weight(rest, program)
    }


def _is_weight(rest: Residence, program: Program) -> bool:
    return program.arrays[rest.array].kind == "weight"


def _taken_bytes(spec: ArraySpec, tier: str, machine: Machine) -> int:
    return rounded(spec.nbytes, machine.tier(tier).alignment_bytes)
