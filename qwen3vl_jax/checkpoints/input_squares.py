"""Mean squares of the inputs of encoded matrices, to which their codes are fitted.

The error of a column then counts as much as what it is multiplied with. A store keeps them in
`input_squares.safetensors`, a float32 [in] for each matrix that is fitted so: its codes can be made
again of the original.

Source of the idea: the importance matrix of llama.cpp.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from memsched.codecs import Fitted, parse_codec
from qwen3vl_jax.checkpoints.encodings import Encodings
from qwen3vl_jax.checkpoints.files import read_small, sha256, sync_directory, write_synced
from qwen3vl_jax.checkpoints.hf_layout import Planned, new_header
from qwen3vl_jax.checkpoints.manifest import MANIFEST_BYTES, StoredFile
from qwen3vl_jax.checkpoints.opening import Checkpoint
from qwen3vl_jax.checkpoints.safetensors_file import parse_header
from qwen3vl_jax.checkpoints.store import Store, check_file
from qwen3vl_jax.checkpoints.work_directory import WorkDirectory
from qwen3vl_jax.errors import UsageError, WeightError

FILE_NAME = "input_squares.safetensors"
FLOAT32 = np.dtype(np.float32)
Squares = Mapping[str, np.ndarray]
NOTHING_MEASURED: Squares = MappingProxyType({})


@dataclasses.dataclass(frozen=True, slots=True)
class Inputs:
    """How mean squares are measured, and what tells it from another measurement."""

    measure: Callable[[], Squares]
    digest: str


@dataclasses.dataclass(frozen=True, slots=True)
class Fits:
    """What the codes of a conversion are fitted to, and the file that says so in the new store."""

    squares: Squares
    files: dict[str, StoredFile]


def check_fitted(codec: str) -> None:
    """Whether inputs can change what a codec makes of a matrix.

    Raises:
        UsageError: they cannot.
        memsched.errors.ProgramError: there is no such codec.
    """
    if not isinstance(parse_codec(codec), Fitted):
        raise UsageError(
            f"codec {codec} has no scales that --calibrate could fit; "
            "choose auto, or any int8 or int4, or leave out --calibrate"
        )


def measured(inputs: Inputs | None, encodings: Encodings, work: WorkDirectory) -> Fits:
    """Those of the matrices that are fitted: measured now, or before a kill.

    The file is durable in the content of `work` when this returns.
    """
    widths, path = _widths(encodings), work.content / FILE_NAME
    if inputs is None or not widths:
        return Fits(NOTHING_MEASURED, {})
    if FILE_NAME not in work.done:
        found = inputs.measure()
        write_synced(path, spelled({name: found[name] for name in widths if name in found}))
        sync_directory(work.content)
        work.note({FILE_NAME: {}})
    content = read_small(path, MANIFEST_BYTES)
    files = {FILE_NAME: StoredFile(len(content), sha256(content))}
    return Fits(read(content, FILE_NAME, widths), files)


def of_checkpoint(checkpoint: Checkpoint) -> Squares:
    """Those that a store keeps; none where nothing was measured.

    Raises:
        WeightError: they are damaged, or not those of this store.
        StorageError: they cannot be read.
    """
    if not isinstance(checkpoint, Store) or FILE_NAME not in checkpoint.manifest.files:
        return NOTHING_MEASURED
    content = check_file(checkpoint.directory, FILE_NAME, checkpoint.manifest)
    return read(content, str(checkpoint.directory / FILE_NAME), _widths(checkpoint.encodings))


def spelled(squares: Squares) -> bytes:
    """The content of an input_squares.safetensors."""
    header = new_header(Planned(name, FLOAT32, values.shape) for name, values in squares.items())
    values = (squares[tensor.name].astype("<f4").tobytes() for tensor in header.tensors)
    return header.raw + b"".join(values)


def read(content: bytes, label: str, widths: Mapping[str, int]) -> Squares:
    """The vectors of an input_squares.safetensors.

    Args:
        widths: the columns of every matrix that may have one.

    Raises:
        WeightError: it is malformed, names another matrix, or has numbers that are no squares.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    header = parse_header(content[:start], len(content), label)
    for tensor in header.tensors:
        wanted = (widths.get(tensor.name),)
        if tensor.dtype != FLOAT32 or tensor.shape != wanted:
            raise WeightError(
                f"{label}: {tensor.name!r} is {tensor.dtype.name} {list(tensor.shape)}, and that "
                f"is no matrix here that is fitted, or has {wanted[0]} columns; convert again"
            )
    found = {
        tensor.name: np.frombuffer(content[tensor.start : tensor.stop], "<f4").astype(FLOAT32)
        for tensor in header.tensors
    }
    for name, squares in found.items():
        if not (np.isfinite(squares) & (squares >= 0)).all():
            raise WeightError(
                f"{label}: mean squares of the inputs of {name!r} must be finite, 0 or more; "
                "mend the weights, or measure in float32"
            )
    return found


def _widths(encodings: Encodings) -> dict[str, int]:
    """The columns of every matrix whose codes are fitted."""
    return {
        name: encoding.shape[-1]
        for name, encoding in encodings.items()
        if isinstance(encoding.format, Fitted)
    }
