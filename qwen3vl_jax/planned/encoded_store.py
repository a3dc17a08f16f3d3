"""A raw checkpoint in the form that a level chooses for a machine: a store, made once, used again.

It lies in `DIR/encoded-<digest>`, where the digest is of the checkpoint, the dtype, the level and
the budgets; a killed attempt is continued. Codecs are chosen by what the matrices themselves lose.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from memsched.codecs.choice import Choice, Subject
from memsched.codecs.levels import Level
from memsched.cost import CostModel
from memsched.errors import DoesNotFitError
from memsched.machine import NVME, Machine
from qwen3vl_jax.checkpoints.conversion import fingerprint, store_bytes, to_store
from qwen3vl_jax.checkpoints.encodings import NOTHING_ENCODED, Encodings
from qwen3vl_jax.checkpoints.files import sha256
from qwen3vl_jax.checkpoints.opening import described
from qwen3vl_jax.checkpoints.selection import Chooser, Selection, smallest
from qwen3vl_jax.config import Config
from qwen3vl_jax.planned.choosing import Chosen, candidates, chooser_for, chosen
from qwen3vl_jax.planned.forecast import forecast
from qwen3vl_jax.planned.options import NEEDED, NEVER
from qwen3vl_jax.planned.request import Request, usual_split
from qwen3vl_jax.progress import Display

# Room that a choice leaves for a cache, if nobody says for how many tokens.
USUAL_CONTEXT = 640


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where encoded stores lie, how many bytes one may take (None: what is free), and for what
    budgets it is.
    """

    directory: Path
    space_bytes: int | None
    budgets: tuple[object, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """A checkpoint to load, and what it takes of the place; the raw one takes nothing."""

    path: Path
    nbytes: int


class _NothingGainedError(Exception):
    """All matrices are better raw."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Work:
    """What a store is made for."""

    config: Config
    machine: Machine
    cost: CostModel
    request: Request
    dtype: np.dtype
    level: Level
    place: Place

    @property
    def fastest(self) -> Chooser:
        return chooser_for(
            self.config,
            self.machine,
            self.request,
            dtype=self.dtype,
            cost=self.cost,
            level=self.level,
        )

    def nbytes(self, encodings: Encodings) -> int:
        return store_bytes(self.config, lambda entry: self.dtype, encodings)


def encoded_store(
    path: Path,
    config: Config,
    machine: Machine,
    cost: CostModel,
    *,
    dtype: np.dtype,
    level: Level,
    place: Place,
    max_context: int | None,
    kv_blocks: str = NEEDED,
    display: Display,
) -> Made:
    """The store for these budgets, from an earlier run or made now; the checkpoint itself if no
    encoding would make it faster.

    Args:
        kv_blocks: with "never", what is chosen has a plan with a KV cache in one piece, if anything
            has.
        display: shows how far it is, and says what was made, and where.

    Raises:
        DoesNotFitError: it would take more than `place` has.
        StorageError: the disk has less, or another process is making it.
        WeightError, memsched.errors.CodecError: the checkpoint is damaged, or cannot be encoded.
    """
    # Stores for a cache that may be cut are found under the names they always had.
    whole = (NEVER,) if kv_blocks == NEVER else ()
    parts = (fingerprint(path), dtype.name, level, place.budgets, *whole)
    target = place.directory / f"encoded-{sha256(repr(parts).encode())[:16]}"
    request = _request(config, max_context, *whole)
    work = _Work(config, machine, cost, request, dtype, level, place)
    if not target.exists():
        first = next(
            iter(candidates(config, machine, work.request, dtype=dtype, cost=cost, level=level))
        )
        if not first.encodings:
            return Made(path, 0)
        selection = Selection(level, chooser=_chooser(work))
        try:
            with display:
                to_store(path, target, dtype=dtype.name, progress=display, selection=selection)
        except _NothingGainedError:
            display.say(f"no encoding makes {path} faster here: its weights stay as they are")
            return Made(path, 0)
        display.say(_told(work, target))
    nbytes = work.nbytes(described(target)[1])
    _check_space(nbytes, place)
    return Made(target, nbytes)


def _told(work: _Work, target: Path) -> str:
    """What was made, and where."""
    raw_bytes, nbytes = work.nbytes(NOTHING_ENCODED), work.nbytes(described(target)[1])
    return f"encoded {raw_bytes:,} B of weights as {nbytes:,} B in {target}"


def _request(config: Config, max_context: int | None, kv_blocks: str = NEEDED) -> Request:
    """A prompt and an answer for the context that is asked for, or a usual one."""
    tokens = min(max_context or USUAL_CONTEXT, config.text.max_position_embeddings)
    return Request(*usual_split(tokens), max_context=max_context, kv_blocks=kv_blocks)


def _chooser(work: _Work) -> Chooser:
    """The fastest form that has a plan; where it has none, the smallest."""
    fastest, fewest = work.fastest, smallest(work.level)

    def choice(subjects: Sequence[Subject]) -> Choice:
        found = fastest(subjects)
        if not _has_plan(work, chosen(work.config, work.dtype, found)):
            found = fewest(subjects)
        form = chosen(work.config, work.dtype, found)
        if not form.encodings:
            raise _NothingGainedError
        _check_space(work.nbytes(form.encodings), work.place)
        return found

    return choice


def _has_plan(work: _Work, form: Chosen) -> bool:
    try:
        forecast(
            form.config,
            work.machine,
            work.request,
            dtype=work.dtype,
            cost=work.cost,
            encodings=form.encodings,
            plan_seconds=0.0,
        )
    except DoesNotFitError:
        return False
    return True


def _check_space(nbytes: int, place: Place) -> None:
    if place.space_bytes is not None and nbytes > place.space_bytes:
        raise DoesNotFitError(
            f"the encoded weights take {nbytes:,} B of {place.directory}, and --nvme-space allows "
            f"{place.space_bytes:,} B; raise --nvme-space, or make a store elsewhere with "
            "scripts/convert.py --codec auto",
            {NVME: nbytes},
        )
