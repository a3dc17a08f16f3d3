"""Codecs of a model's matrices for the machine that it is to run on.

What decides is a token's pass: its time by the bound of `memsched.bound`, within the level's budget
of error. Prompts and pictures follow; they read the same matrices over the same links.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from memsched.bound.choosing import choose_placed
from memsched.bound.kinds import Variants
from memsched.codecs.choice import RAW, Choice, Subject
from memsched.codecs.levels import Level
from memsched.cost import CostModel
from memsched.machine import DEVICE, Machine
from memsched.program import ArraySpec, Program
from qwen3vl_jax.checkpoints.encodings import (
    HEAD,
    NOTHING_ENCODED,
    Encoding,
    Encodings,
    as_encoded,
    encodings_of,
    with_own_head,
)
from qwen3vl_jax.checkpoints.expectation import expected_subjects
from qwen3vl_jax.checkpoints.experts_alike import Group, apart, together
from qwen3vl_jax.checkpoints.selection import Chooser, matrices, smallest
from qwen3vl_jax.config import Config
from qwen3vl_jax.phases import phases
from qwen3vl_jax.planned.granularity import choose_granularity, vocab_rows
from qwen3vl_jax.planned.long_requests import cache_of
from qwen3vl_jax.planned.programs import trace_phase
from qwen3vl_jax.planned.request import Request
from qwen3vl_jax.planned.skeleton import shape_network
from qwen3vl_jax.weights import row_blocks


@dataclasses.dataclass(frozen=True, slots=True)
class Chosen:
    """A model as it runs with what was chosen, and why each matrix is what it is.

    Without a choice, `reasons` are empty.
    """

    config: Config
    encodings: Encodings
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)
    predicted_error: float = 0.0


def candidates(
    config: Config,
    machine: Machine,
    request: Request,
    *,
    dtype: np.dtype,
    cost: CostModel,
    level: Level,
) -> Iterator[Chosen]:
    """What to encode, from shapes alone; the next one is for where that does not fit after all.

    The fastest by the bound; then the smallest.
    """
    subjects = expected_subjects(config, dtype, level)
    for chooser in (
        chooser_for(config, machine, request, dtype=dtype, cost=cost, level=level),
        smallest(level),
    ):
        yield chosen(config, dtype, chooser(subjects))


def chosen(config: Config, dtype: np.dtype, choice: Choice) -> Chosen:
    """A choice as encodings."""
    codecs = {one.name: one.codec for one in choice.arrays if one.codec != RAW}
    encodings = encodings_of(config, codecs, lambda entry: dtype) if codecs else NOTHING_ENCODED
    reasons = {one.name: one.reason for one in choice.arrays}
    return Chosen(as_encoded(config, encodings), encodings, reasons, choice.predicted_error)


def chooser_for(
    config: Config,
    machine: Machine,
    request: Request,
    *,
    dtype: np.dtype,
    cost: CostModel,
    level: Level,
) -> Chooser:
    """Chooses what makes a token of a request fastest; the fewest bytes if nothing else fits."""
    program = _decode_program(config, machine, request, dtype)
    fewest = smallest(level)

    def choice(subjects: Sequence[Subject]) -> Choice:
        groups = together(subjects)
        found = choose_placed(
            [group.subject for group in groups],
            _variants(config, program, groups, dtype),
            machine,
            cost,
            error_budget=level.error_budget,
            smallest_saving=level.smallest_saving,
        )
        return fewest(subjects) if found is None else apart(found, groups)

    return choice


def _decode_program(config: Config, machine: Machine, request: Request, dtype: np.dtype) -> Program:
    """A token's pass with raw weights; its head is its own, as an encoded one would be."""
    own, rows = with_own_head(config), vocab_rows(config, dtype)
    granularity = choose_granularity(own, dtype, machine.tier(DEVICE).capacity_bytes)
    network = shape_network(own, dtype=dtype, vocab_rows=rows)
    cache = cache_of(request, own, dtype, request.capacity(own))
    return trace_phase(phases(own, granularity)["decode"], network, cache.decode()).program


def _variants(
    config: Config, program: Program, groups: Sequence[Group], dtype: np.dtype
) -> Variants:
    """The program with all matrices in one codec, for every codec of the groups."""
    blocks = row_blocks(config.text.vocab_size, vocab_rows(config, dtype))
    shapes = {entry.path: entry.shape for entry in matrices(config)}
    parts = {group.subject.name: tuple(member.name for member in group.members) for group in groups}
    parts[HEAD] = tuple(f"{HEAD}.{block}" for block in range(len(blocks)))
    arrays: dict[str, dict[str, ArraySpec]] = {}
    for group in groups:
        name = group.subject.name
        rows = blocks if name == HEAD else (None,) * len(parts[name])
        for candidate in group.subject.candidates:
            found = arrays.setdefault(candidate.codec, dict(program.arrays))
            shape = shapes[group.members[0].name]
            for part, of_part in zip(parts[name], rows, strict=True):
                form = _packed(candidate.codec, shape, dtype.name, of_part)
                found[part] = ArraySpec(part, *form, "weight")
    encoded = {codec: dataclasses.replace(program, arrays=found) for codec, found in arrays.items()}
    return Variants(program, encoded, parts)


@functools.cache
def _packed(
    codec: str, shape: tuple[int, ...], dtype: str, rows: tuple[int, int] | None
) -> tuple[tuple[int, ...], str]:
    return Encoding(codec, shape, dtype).part(rows).packed
