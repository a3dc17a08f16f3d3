"""One safetensors file, read with suspicion.

The file is 8 bytes of header length, a JSON header, and the tensors' bytes without a gap.
Everything the header claims is checked against the size of the file before it is used.

Source: the format section of safetensors' README (0.8), with stricter limits.
"""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from qwen3vl_jax.checkpoints.files import DTYPES, aligned_empty, open_regular, read_into, read_small
from qwen3vl_jax.errors import WeightError

HEADER_BYTES = 16 * 2**20
INDEX_BYTES = 64 * 2**20
TENSORS = 100_000
FILE_DTYPES = {"F32": DTYPES["float32"], "F16": DTYPES["float16"], "BF16": DTYPES["bfloat16"]}
WRITERS = ("pt", "np", "numpy", "jax", "flax", "tf", "mlx")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies: bytes `start` to `stop` of the file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """The start of a file: its exact bytes and the tensors in the order of their place."""

    raw: bytes
    tensors: tuple[Tensor, ...]


def parse_header(raw: bytes, file_bytes: int, label: str) -> Header:
    """Check and read a header.

    Args:
        raw: the first bytes of the file, up to the first tensor: length and JSON.
        file_bytes: size of the whole file.
        label: how errors call the file.

    Raises:
        WeightError: if any rule of the format is broken.
    """
    body = raw[8:]
    if not body.startswith(b"{") or not body.rstrip(b" ").endswith(b"}"):
        raise WeightError(f"{label}: the header is no JSON object; the file is damaged")
    entries = strict_json(body, label)
    metadata = entries.pop("__metadata__", {"format": "pt"})
    if not _is_metadata(metadata):
        raise WeightError(f"{label}: bad __metadata__, wanted texts and a format of {WRITERS}")
    if len(entries) > TENSORS:
        raise WeightError(f"{label}: {len(entries):,} tensors; at most {TENSORS:,} are read")
    tensors = [_tensor(name, entry, len(raw), label) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    _check_cover(tensors, len(raw), file_bytes, label)
    return Header(raw, tuple(tensors))


def strict_json(text: bytes, label: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN or bad UTF-8.

    Raises:
        WeightError: if `text` is anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise WeightError(f"{label}: {twice!r} appears twice; fetch or save the file again")
        return found

    def constant(name: str) -> NoReturn:
        raise WeightError(f"{label}: {name} is no JSON number")

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=constant)
    except WeightError:
        raise
    except (ValueError, RecursionError) as error:
        reason = str(error).split("\n")[0][:100]
        raise WeightError(f"{label}: not valid JSON ({reason}); the file is damaged") from None
    if not isinstance(value, dict):
        raise WeightError(f"{label}: not a JSON object; the file is damaged")
    return value


def _is_metadata(value: object) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(text, str) for text in value.values())
        and value.get("format") in WRITERS
    )


def _tensor(name: str, entry: object, data_start: int, label: str) -> Tensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise WeightError(f"{label}: {name!r} needs exactly dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise WeightError(f"{label}: {name!r} has a malformed shape or data_offsets")
    dtype = FILE_DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise WeightError(
            f"{label}: {name!r} has dtype {entry['dtype']!r}; only {', '.join(FILE_DTYPES)} are "
            "read: fetch a checkpoint that is not quantised"
        )
    wanted = dtype.itemsize
    for length in shape:
        wanted *= length
    if wanted != offsets[1] - offsets[0]:
        raise WeightError(
            f"{label}: {name!r} {shape} of {entry['dtype']} takes {wanted:,} B, but its range "
            f"has {offsets[1] - offsets[0]:,} B; the file is damaged"
        )
    return Tensor(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**62 for n in value)


def _check_cover(tensors: list[Tensor], data_start: int, file_bytes: int, label: str) -> None:
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            fault = "overlaps the tensor before it" if tensor.start < position else "leaves a hole"
            raise WeightError(
                f"{label}: {tensor.name!r} starts at byte {tensor.start:,}, wanted {position:,}: "
                f"it {fault}; the file is damaged"
            )
        position = tensor.stop
    if position != file_bytes:
        raise WeightError(
            f"{label}: has {file_bytes:,} B, but its header describes {position:,} B: "
            "it is truncated or damaged; fetch it again"
        )


class SafetensorsFile:
    """An open file: its checked header, and reads by name. Close it, or use it in `with`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = open_regular(path)
        try:
            self._state = self._stat()
            self.header = self._read_header()
        except BaseException:
            self.close()
            raise
        self.tensors = {tensor.name: tensor for tensor in self.header.tensors}

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return self._state[0]

    @property
    def modified_ns(self) -> int:
        """Time of the last change, as the file system keeps it."""
        return self._state[1]

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """A tensor, or `count` of its slices along the first axis starting at `first`.

        Returns:
            A new array at a 64-byte aligned address, dtype as in the file.

        Raises:
            WeightError: if the file is shorter than before, or changed while being read.
            StorageError: if the system reports a read error.
        """
        tensor = self.tensors[name]
        shape = tensor.shape
        if count is not None:
            assert 0 <= first <= first + count <= shape[0], (name, first, count, shape)
            shape = (count, *shape[1:])
        slice_bytes = (tensor.stop - tensor.start) // max(1, tensor.shape[0] if shape else 1)
        array = aligned_empty(shape, tensor.dtype)
        read_into(self._descriptor, array, tensor.start + first * slice_bytes, self.path)
        if self._stat() != self._state:
            raise WeightError(f"{self.path} changed while it was being read; start again")
        return array

    def close(self) -> None:
        """Give the descriptor back; further calls do nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stat(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def _read_header(self) -> Header:
        size = self.nbytes
        if size < 8:
            raise WeightError(f"{self.path} has {size} B: it is truncated; fetch it again")
        length = np.empty(1, "<u8")
        read_into(self._descriptor, length, 0, self.path)
        header_bytes = int(length[0])
        if header_bytes > min(HEADER_BYTES, size - 8):
            raise WeightError(
                f"{self.path}: header of {header_bytes:,} B; at most "
                f"{min(HEADER_BYTES, size - 8):,} B are possible: it is truncated or damaged"
            )
        raw = np.empty(8 + header_bytes, np.uint8)
        read_into(self._descriptor, raw, 0, self.path)
        return parse_header(raw.tobytes(), size, str(self.path))


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from a `model.safetensors.index.json`.

    Raises:
        WeightError: if it is malformed, or a value is anything but a plain file name.
    """
    index = strict_json(read_small(path, INDEX_BYTES), str(path)).get("weight_map")
    if not isinstance(index, dict) or not index or len(index) > TENSORS:
        raise WeightError(f"{path}: weight_map must be an object of 1 to {TENSORS:,} entries")
    for name, file in index.items():
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
            raise WeightError(
                f"{path}: {name!r} lies in {file!r}, which is no plain file name; "
                "do not use this checkpoint"
            )
    return index
