"""Copies and Frees of weights, each with its place between the steps."""

import dataclasses
from typing import NamedTuple

from memsched.plan import Copy, Free, Residence


class Move(NamedTuple):
    """A Copy with its slot, if its target is an arena, or a Free."""

    action: Copy | Free
    slot: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Moves:
    """What weights do: moves before each step and after the last one, between two states."""

    entry: tuple[Residence, ...]
    before: tuple[tuple[Move, ...], ...]
    exit: tuple[Residence, ...]
