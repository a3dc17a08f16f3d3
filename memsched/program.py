"""What has to be computed: named arrays, and the steps that read and write them.

A `Program` is data. It holds no callables and no buffers, so it can be planned, hashed and printed
on a machine that has neither the weights nor the accelerator.
"""

import dataclasses
import functools
import hashlib
import json
import math
import operator
from collections.abc import Mapping
from typing import Literal, get_args

import ml_dtypes  # noqa: F401  numpy then knows bfloat16 and its like by name
import numpy as np

Kind = Literal["weight", "cache", "feature", "embedding", "input", "activation"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One named array.

    Weights are never written. Caches are given, written in place and given back. Features,
    embeddings and inputs are given for one run; activations are made by a step.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of the values, unencoded."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One kernel call.

    The kernel takes `reads`, then `updates`, in this order, and returns `writes`, then `updates`.
    What it updates it consumes: such a step runs once. `workspace_bytes` is what it allocates
    beyond all of these while it runs.
    """

    name: str
    kernel: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    updates: tuple[str, ...] = ()
    flops: int = 0
    workspace_bytes: int = 0

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the kernel takes."""
        return self.reads + self.updates

    @property
    def results(self) -> tuple[str, ...]:
        """What the kernel returns."""
        return self.writes + self.updates


@dataclasses.dataclass(frozen=True)
class Program:
    """Steps in a valid order, over arrays. `outputs` must rest where it computes at the end.

    An output that is also given is one that was updated in place.
    """

    arrays: Mapping[str, ArraySpec]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]

    def step(self, name: str) -> Step:
        """The step of this name."""
        return self._steps[name]

    @functools.cached_property
    def _steps(self) -> dict[str, Step]:
        return {step.name: step for step in self.steps}

    @functools.cached_property
    def given(self) -> tuple[str, ...]:
        """Arrays that no step makes: they exist before the first one."""
        made = {name for step in self.steps for name in step.writes}
        return tuple(name for name in self.arrays if name not in made)

    def of_kind(self, *kinds: Kind) -> tuple[str, ...]:
        """Names of the arrays of some kinds, in order."""
        return tuple(name for name, array in self.arrays.items() if array.kind in kinds)

    @functools.cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that change with anything in the program."""
        body = {
            "arrays": [_ARRAY_FIELDS(array) for array in self.arrays.values()],
            "steps": [_STEP_FIELDS(step) for step in self.steps],
            "outputs": self.outputs,
        }
        return hashlib.sha256(json.dumps(body).encode()).hexdigest()[:16]


# What `dataclasses.astuple` gives, without the copies: twenty times as fast.
_ARRAY_FIELDS, _STEP_FIELDS = (
    operator.attrgetter(*(field.name for field in dataclasses.fields(kind)))
    for kind in (ArraySpec, Step)
)
