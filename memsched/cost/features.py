"""What of an action decides how long it takes: numbers that mean the same for every model."""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from memsched.machine import Machine
from memsched.plan import Copy
from memsched.program import ArraySpec, Program, Step

# The most rows of each class but the last. Few rows are multiplied in other ways than many, and the
# speed jumps between them.
ROW_CLASSES = (1, 8, 16, 32, 64, 128, 256)
CODES = "uint8"  # the dtype of encoded weights
NUMBERS_IN_A_BYTE = 2
_CARRIED = ("weight", "cache")


@dataclasses.dataclass(frozen=True, slots=True)
class RunFeatures:
    """A step as the processor sees it.

    `kind` is its kernel, whatever the shapes. `dtype` is that of most bytes of its weights, uint8
    of encoded ones. `rows` is how many vectors it passes through its weights. `weight_flops` are
    spent on products with weights, `other_flops` on others. `weight_bytes` are touched: of a
    table from which rows are looked up, next to nothing. `value_bytes` are all arrays that are
    neither weights nor caches. Workspace is not among them: it says as much about what lies idle
    as about the step.
    """

    kind: str
    dtype: str
    rows: int
    weight_flops: int
    other_flops: int
    weight_bytes: int
    cache_bytes: int
    value_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class CopyFeatures:
    """A transfer over one link, in requests of the link's block size."""

    link: str
    nbytes: int
    blocks: int


def run_features(step: Step, program: Program) -> RunFeatures:
    """The features of a step.

    A weight that is read takes part in at least one multiplication and addition: so flops limit
    how many of its bytes are touched. A byte of codes has up to two numbers.
    """
    specs = [program.arrays[name] for name in (*step.inputs, *step.writes)]
    weights = [spec for spec in specs if spec.kind == "weight"]
    values = [spec for spec in specs if spec.kind not in _CARRIED]
    dtype = _dtype(weights) or _dtype(specs[: len(step.inputs)]) or _dtype(specs) or "float32"
    itemsize = np.dtype(dtype).itemsize
    held_bytes = sum(spec.nbytes for spec in weights)
    weight_bytes = min(held_bytes, step.flops // 2 * itemsize)
    rows = max((math.prod(spec.shape[:-1]) for spec in values if _is_float(spec)), default=1)
    numbers = NUMBERS_IN_A_BYTE * weight_bytes if dtype == CODES else weight_bytes // itemsize
    weight_flops = min(step.flops, 2 * rows * numbers)
    return RunFeatures(
        kind=step.kernel.partition("#")[0],
        dtype=dtype,
        rows=max(1, rows),
        weight_flops=weight_flops,
        other_flops=step.flops - weight_flops,
        weight_bytes=weight_bytes,
        cache_bytes=sum(spec.nbytes for spec in specs if spec.kind == "cache"),
        value_bytes=sum(spec.nbytes for spec in values),
    )


def copy_features(action: Copy, program: Program, machine: Machine) -> CopyFeatures:
    """The features of a transfer."""
    link = machine.link(action.source, action.target)
    nbytes = program.arrays[action.array].nbytes
    block_bytes = link.block_bytes if link else max(1, nbytes)
    return CopyFeatures(f"{action.source}->{action.target}", nbytes, -(-nbytes // block_bytes))


def commonest_dtype(specs: Iterable[ArraySpec]) -> str:
    """The dtype with the most bytes of some arrays, of which there is at least one."""
    nbytes: dict[str, int] = {}
    for spec in specs:
        nbytes[spec.dtype] = nbytes.get(spec.dtype, 0) + spec.nbytes
    return min(nbytes, key=lambda name: (-nbytes[name], name))


def row_class(rows: int) -> int:
    """0 for 1 row, 1 for 2 to 8, and so on, up to the number of `ROW_CLASSES`."""
    return sum(rows > most for most in ROW_CLASSES)


def _is_float(spec: ArraySpec) -> bool:
    return np.dtype(spec.dtype).kind in "fV"


def _dtype(specs: Iterable[ArraySpec]) -> str | None:
    """The dtype of the floats, or codes, with the most bytes; None where there are none."""
    found = [
        spec for spec in specs if _is_float(spec) or (spec.kind == "weight" and spec.dtype == CODES)
    ]
    return commonest_dtype(found) if found else None
