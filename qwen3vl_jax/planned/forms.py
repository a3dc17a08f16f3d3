"""In which form a KV cache is, and in what chunks a prompt is read, where users leave it to plans.

Both change the rounding of an answer, so nothing is chosen that was not left open, and what is
chosen must not depend on how long plans are tried or on who asks: all compare quick plans of the
same passes. Pictures count as their tokens; the vision tower takes as long whatever is chosen.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

from memsched.cost import CostModel, plan_seconds
from memsched.errors import DoesNotFitError, ProgramError
from memsched.machine import DEVICE, NVME, Machine
from memsched.plan import Residence
from qwen3vl_jax.buckets import PREFILL_CHUNK
from qwen3vl_jax.checkpoints.encodings import Encodings
from qwen3vl_jax.config import Config
from qwen3vl_jax.planned.granularity import choose_granularity, vocab_blocks
from qwen3vl_jax.planned.long_requests import (
    borders_s,
    cache_of,
    full_bytes,
    in_blocks,
    with_blocks,
)
from qwen3vl_jax.planned.options import ALWAYS, AUTO, FASTER, NEEDED, NEVER
from qwen3vl_jax.planned.request import Request
from qwen3vl_jax.planned.turns import moving_s, planned_together
from qwen3vl_jax.planned.works import Tracer, chunks_of, traced_request, works_of

# Those of a request, for all its forms.
Tracers = Callable[[Request], Tracer]
# The usual one first, then rising: of equally fast ones the first is taken.
CHUNKS = (PREFILL_CHUNK, *(1 << power for power in range(7, 13) if 1 << power != PREFILL_CHUNK))
# Blocks so many times as large as usual: fewer borders, but a token waits longer for one.
TIMES = (1, 4, 16)
# As long as runs try plans: with more, SciPy's optimisers take memory that a run may lack.
CHOICE_S = 1.0
MOST_TRACERS = 16
# What `blocks_worth_naming_s` looks at, and what it names.
LARGE_SHARE, WORTH_NAMING = 0.25, 0.02


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """A model on a machine: what predictions are made for."""

    config: Config
    machine: Machine
    dtype: np.dtype
    cost: CostModel
    encodings: Encodings

    def tracers(self) -> Tracers:
        """Tracers that remember what the newest requests were traced to."""

        @functools.lru_cache(maxsize=MOST_TRACERS)
        def tracer(request: Request) -> Tracer:
            return traced_request(self.config, request, self.dtype, None, self.encodings)

        return tracer


def choose(setting: Setting, request: Request, tracers: Tracers | None = None) -> Request:
    """The request with a form of its KV cache and a chunk, as fast as it allows by prediction; as
    it is, if it leaves nothing open.

    Forms are compared by the seconds from the first pass to the last, read in usual chunks; other
    chunks are tried with the fastest one, and with those that have no plan otherwise. Where nothing
    has a plan, something is returned that has none.

    Raises:
        UsageError: the model takes no context as long as this.
        DoesNotFitError: a cache is to be in blocks, and the disk has no space for them.
    """
    if request.decided:
        return request
    tracers = tracers or setting.tracers()

    @functools.cache
    def seconds(one: Request) -> float:
        return request_s(setting, _as_text(setting.config, one), tracers)

    allowed = forms(setting, request)
    for alike in allowed:
        found = _fastest(alike, seconds)
        if request.chunk == AUTO:
            worth = [one for one in alike if one == found or math.isinf(seconds(one))]
            chunked = [one for form in worth for one in _chunked(setting.config, form)]
            found = _fastest(chunked, seconds)
        if found is not None:
            return _settled(found)
    return _settled(allowed[0][0])


def _settled(request: Request) -> Request:
    """A request that leaves nothing open any more."""
    kv_blocks = NEVER if request.kv_blocks == NEVER else NEEDED
    return dataclasses.replace(request, kv_blocks=kv_blocks)


def _fastest(alike: Sequence[Request], seconds: Callable[[Request], float]) -> Request | None:
    """The first of those with the fewest seconds; None if none has a plan. One alone is taken
    without a look.
    """
    if len(alike) == 1:
        return alike[0]
    best = min(alike, key=seconds)
    return best if seconds(best) < math.inf else None


def forms(setting: Setting, request: Request) -> tuple[tuple[Request, ...], ...]:
    """The forms of the cache that a request allows, read in usual chunks if these are open: any of
    the first ones, the preferred first; then, where none of these has a plan, any of the next.

    Raises:
        DoesNotFitError: it is to be in blocks, and the disk has no space for them.
    """
    if request.chunk == AUTO:
        request = dataclasses.replace(request, chunk=PREFILL_CHUNK)
    what = setting.config, setting.dtype, setting.machine
    found = [with_blocks(request, *what, times) for times in TIMES]
    blocks = tuple(cut for cut in found if cut is not None)
    if request.kv_blocks == FASTER:
        return ((request, *blocks),)
    if request.kv_blocks == ALWAYS:
        _check_space(setting, request)
        return (blocks[:1] or (request,),)
    return ((request,), blocks[:1]) if blocks and request.kv_blocks != NEVER else ((request,),)


def _check_space(setting: Setting, request: Request) -> None:
    cut = in_blocks(request, setting.config, setting.dtype)
    nbytes = 0 if cut is None else full_bytes(cut, setting.config, setting.dtype)
    if nbytes > (has_bytes := setting.machine.tier(NVME).capacity_bytes):
        raise DoesNotFitError(
            f"full blocks of this KV cache take {nbytes:,} B of disk, not {has_bytes:,} B; raise "
            "--nvme-space, or drop --kv-blocks always",
            {NVME: nbytes},
        )


def _chunked(config: Config, request: Request) -> tuple[Request, ...]:
    """The request with each chunk that cuts its prompt in another way."""
    found: dict[tuple[int, ...], Request] = {}
    for tokens in CHUNKS:
        made = dataclasses.replace(request, chunk=tokens)
        found.setdefault(tuple(chunks_of(config, made)), made)
    return tuple(found.values())


def _as_text(config: Config, request: Request) -> Request:
    """The request with all of its prompt as text."""
    tokens = request.prompt_length(config)
    return dataclasses.replace(request, prompt_tokens=tokens, images=(), frames=())


def blocks_worth_naming_s(setting: Setting, request: Request, taken_s: float) -> float | None:
    """Predicted seconds of a request with its cache in blocks, if these are clearly fewer than it
    takes now. Looked at is one form, and only where the cache takes much of the device: that is
    where it gains, and so planning an ordinary request takes no longer.
    """
    config, dtype, machine = setting.config, setting.dtype, setting.machine
    tokens = request.capacity(config)
    cache_bytes = cache_of(request, config, dtype, tokens).cache_bytes
    large = cache_bytes > machine.tier(DEVICE).capacity_bytes * LARGE_SHARE
    if request.block_slots is not None or request.grids(config) or not large:
        return None
    cut = with_blocks(request, config, dtype, machine, TIMES[-1])
    seconds = math.inf if cut is None else request_s(setting, cut, setting.tracers())
    return seconds if seconds < taken_s * (1 - WORTH_NAMING) else None


def request_s(setting: Setting, request: Request, tracers: Tracers) -> float:
    """Predicted seconds from all weights in files to the last token, by quick plans; infinitely
    many where there is no plan.
    """
    config, machine, cost = setting.config, setting.machine, setting.cost
    size = config, setting.dtype, machine.tier(DEVICE).capacity_bytes, setting.encodings
    traced = tracers(request)(choose_granularity(*size), vocab_blocks(*size))
    programs = {name: one.program for name, one in traced.items()}
    try:
        plans = planned_together(programs, machine, cost, CHOICE_S)
    except (DoesNotFitError, ProgramError):
        return math.inf
    tokens = request.prompt_length(config) + request.new_tokens
    seconds = borders_s(request, config, setting.dtype, machine, cost, tokens)
    before: tuple[Residence, ...] = ()
    for work in works_of(config, request, setting.dtype):
        plan, program = plans[work.name], programs[work.name]
        seconds += moving_s(before, program, plan, machine, cost)
        seconds += work.count * plan_seconds(plan, program, machine, cost)
        before = plan.exit
    return seconds
