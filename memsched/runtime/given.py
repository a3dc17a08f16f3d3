"""Checks what the caller gives."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from memsched.errors import ProgramError
from memsched.program import ArraySpec

Given = Mapping[str, jax.Array | npt.NDArray[Any]]


def check_given(wanted: Sequence[ArraySpec], given: Given) -> None:
    """All arrays are there and no others, in shape and dtype as planned, and not used up.

    Raises:
        ProgramError: one is not.
    """
    for spec in wanted:
        value = given.get(spec.name)
        if value is None:
            raise ProgramError(
                f"given: {spec.kind} {spec.name!r} is missing; wanted are {len(wanted)} arrays"
            )
        if value.shape != spec.shape or value.dtype != np.dtype(spec.dtype):
            raise ProgramError(
                f"given: {spec.name!r} is {value.shape} {value.dtype}, planned for {spec.shape} "
                f"{spec.dtype}; plan for this shape"
            )
        if isinstance(value, jax.Array) and value.is_deleted():
            raise ProgramError(
                f"given: {spec.name!r} was deleted: an earlier run took it over; give what that "
                "run returned, or a copy"
            )
    if surplus := sorted(given.keys() - {spec.name for spec in wanted}):
        raise ProgramError(
            f"given: {surplus[0]!r} is not an array that the plan takes from its caller; weights "
            "come from the sources"
        )
