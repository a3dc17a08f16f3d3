"""The loop: three verbs, one after the other.

A Copy is handed in and goes on in the background. A Run waits only for the arrays that it takes. A
Free waits for the last one who uses what it frees. Nothing else waits, until the plan has ended.

While a Run waits, the weights that follow it are asked for, as far as their places in the arena do
not depend on it: a disk that has nothing to do is not made up for later.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import assert_never

import jax
import numpy as np

from memsched.errors import PlanError
from memsched.machine import DEVICE, NVME
from memsched.program import ArraySpec
from memsched.runtime.flight import Flight
from memsched.runtime.fuse import Kernel
from memsched.runtime.ledger import Ledger
from memsched.runtime.operations import CopyOp, FreeOp, Op, RunOp
from memsched.runtime.record import Record, blame
from memsched.runtime.tiers import Tiers
from memsched.runtime.transfer import Transfer


@dataclasses.dataclass(frozen=True, slots=True)
class Loop:
    """One run of a plan: where things lie, what is under way, what is written down.

    `kernels` are callables by the number of their dispatch. `checked` has the arrays that results
    are compared with; it is empty once a plan has run. `carried` are transfers of earlier plans
    that were under way when it began.
    """

    tiers: Tiers
    ledger: Ledger
    record: Record
    flight: Flight
    kernels: Sequence[Kernel]
    checked: Mapping[str, ArraySpec]
    carried: Sequence[Transfer]
    transfers: list[Transfer] = dataclasses.field(default_factory=list)


def carry_out(loop: Loop, ops: Sequence[Op]) -> None:
    """Carry out all operations; when it returns no step runs, but Copies may be under way.

    Raises:
        Exception: what failed, with a note of the action. Nothing runs any more.
    """
    op: Op | None = None
    try:
        for op in _busy(loop, ops):
            loop.flight.look()
            match op:
                case RunOp():
                    _run(loop, op)
                case CopyOp():
                    _copy(loop, op)
                case FreeOp():
                    _free(loop, op)
                case _:
                    assert_never(op)
        loop.flight.end_all()
    except BaseException as error:
        if op is not None and isinstance(error, Exception):
            blame(error, op.index, op.action)
        loop.flight.abandon()
        raise
    _write_down(loop)


def _busy(loop: Loop, ops: Sequence[Op]) -> Iterator[Op]:
    """The operations in order, but what can be begun before a Run that has to wait comes first."""
    place = 0
    while place < len(ops):
        op = ops[place]
        place += 1
        if isinstance(op, RunOp) and _late(loop, op):
            while place < len(ops) and _is_free_of(op, ops[place]):
                yield ops[place]
                place += 1
        yield op


def _is_free_of(run: RunOp, op: Op) -> bool:
    """Whether `op`, which follows `run`, can go before it: same memory in use, no longer wait."""
    match op:
        case RunOp():
            return False
        case CopyOp():
            return op.offset is not None and op.action.source == NVME
        case FreeOp():
            on_device = op.action.tier == DEVICE and op.offset is not None
            return on_device and op.after_run < run.number
        case _:
            assert_never(op)


def _late(loop: Loop, op: RunOp) -> list[str]:
    """What a Run takes and is still on its way."""
    arriving = loop.tiers.arriving[DEVICE]
    if not arriving:
        return []
    return [name for name in op.inputs if name in arriving and not arriving[name].done]


def _run(loop: Loop, op: RunOp) -> None:
    if loop.tiers.arriving[DEVICE]:
        _await_inputs(loop, op)
    if op.updates:
        for name in op.updates:
            loop.tiers.leave(DEVICE, name)
    held = loop.tiers.values[DEVICE]
    inputs = [held[name] for name in op.inputs]
    loop.flight.make_room(op)
    start_s = time.perf_counter()
    results = loop.kernels[op.number](*inputs)
    if loop.checked:
        _check(op, inputs, results, loop.checked)
    loop.flight.began(op, results, start_s)
    held.update(zip(op.results, results, strict=True))
    loop.ledger.change(DEVICE, op.made_bytes, op.passing_bytes)


def _await_inputs(loop: Loop, op: RunOp) -> None:
    if _late(loop, op):
        # The step ahead ends first, or no later than this one can begin: so its end is seen.
        loop.flight.end_all()
    for name in op.inputs:
        if name in loop.tiers.arriving[DEVICE]:
            loop.tiers.arrive(DEVICE, name)


def _copy(loop: Loop, op: CopyOp) -> None:
    loop.transfers.append(loop.tiers.copy(op))
    loop.ledger.change(op.action.target, op.taken_bytes)


def _free(loop: Loop, op: FreeOp) -> None:
    start_s = time.perf_counter()
    loop.flight.end(op.after_run)
    loop.tiers.free(op)
    loop.ledger.change(op.action.tier, -op.freed_bytes)
    loop.record.busy(op.index, start_s, time.perf_counter())


def _check(
    op: RunOp, inputs: Sequence[jax.Array], results: object, arrays: Mapping[str, ArraySpec]
) -> None:
    """A kernel gives what the program says it does: all sizes in the plan rest on that."""
    if not isinstance(results, tuple) or len(results) != len(op.results):
        raise PlanError(
            f"kernel {op.calls[0].kernel!r} must return a tuple of {len(op.results)} arrays "
            f"({', '.join(op.results)}); it returned {type(results).__name__}"
        )
    for name, result in zip(op.results, results, strict=True):
        wanted = (arrays[name].shape, np.dtype(arrays[name].dtype))
        if (result.shape, np.dtype(result.dtype)) != wanted:
            raise PlanError(
                f"kernel {op.calls[0].kernel!r} returned {result.shape} {result.dtype} for "
                f"{name!r}, wanted {wanted[0]} {wanted[1]}; trace the function anew"
            )
        if any(result is taken for taken in inputs):
            raise PlanError(
                f"kernel {op.calls[0].kernel!r} returned one of its inputs as {name!r}: freeing "
                "one would free the other; jit the kernel"
            )


def _write_down(loop: Loop) -> None:
    """The spans of all Copies: within a lane one begins when all before have ended.

    One that ends before an earlier one takes no time of its own: they were read side by side.
    """
    free_s: dict[tuple[str, str], float] = {}
    now_s = time.perf_counter()
    for transfer in loop.carried:
        end_s = transfer.times_s[1] or now_s
        free_s[_lane(transfer)] = max(end_s, free_s.get(_lane(transfer), 0.0))
    loop.record.carried_end_s = max([loop.record.start_s, *free_s.values()])
    for transfer in loop.transfers:
        lane = _lane(transfer)
        start_s, end_s = transfer.times_s
        # One that has ended without its time written down ends now: the thread is about to do it.
        end_s = end_s or now_s
        start_s = min(max(start_s, free_s.get(lane, 0.0)), end_s)
        loop.record.busy(transfer.op.index, start_s, end_s)
        free_s[lane] = max(end_s, free_s.get(lane, 0.0))


def _lane(transfer: Transfer) -> tuple[str, str]:
    return transfer.op.action.source, transfer.op.action.target
