"""A Hugging Face directory of safetensors files, read array by array.

The tensors found must be exactly those of the model: none missing, unknown, twice or misshapen.
Experts may lie as released, [E, in, out], or as transformers 5 saves them, [E, out, in].
"""

import re
from pathlib import Path

import numpy as np

from qwen3vl_jax.checkpoints.encodings import Encodings
from qwen3vl_jax.checkpoints.extents import Extent
from qwen3vl_jax.checkpoints.files import aligned_empty
from qwen3vl_jax.checkpoints.safetensors_file import SafetensorsFile, read_index
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import UsageError, WeightError
from qwen3vl_jax.weights import Entry, Shapes, hf_shapes

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


class HFCheckpoint:
    """Open shards of one model. Close it, or use it in `with`."""

    def __init__(self, directory: Path, config: Config) -> None:
        """Open and check all shards.

        Raises:
            WeightError: if the tensors are not exactly those of `config`.
            StorageError: if the system refuses.
        """
        self.directory = directory
        self.shards: tuple[SafetensorsFile, ...] = ()
        try:
            for path in _shard_paths(directory):
                self.shards = (*self.shards, SafetensorsFile(path))
            self._home = _homes(self.shards)
            found = {name: file.tensors[name].shape for name, file in self._home.items()}
            self.released = expert_layouts(found, config, str(directory))
            check_shapes(found, self.released, config, str(directory))
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.stop - t.start for file in self.shards for t in file.header.tensors)

    @property
    def encodings(self) -> Encodings:
        """None: numbers lie there as they are."""
        return {}

    def dtype_of(self, entry: Entry) -> np.dtype:
        """The dtype in the file."""
        return self._home[entry.hf_name].tensors[entry.hf_name].dtype

    def read(self, entry: Entry) -> np.ndarray:
        """One array, as `opening.Checkpoint.read` says."""
        return self.orient(entry, self.read_stored(entry))

    def read_stored(self, entry: Entry) -> np.ndarray:
        """The array's values in the order of the file; its shape may be transposed."""
        file = self._home[entry.hf_name]
        if entry.expert is not None:
            array = file.read(entry.hf_name, entry.expert, 1)
            return array.reshape(array.shape[1:])
        if entry.rows is not None:
            return file.read(entry.hf_name, entry.rows[0], entry.rows[1] - entry.rows[0])
        return file.read(entry.hf_name)

    def read_packed(self, entry: Entry) -> np.ndarray:
        """The same: nothing is encoded."""
        return self.read(entry)

    def extents(self, entry: Entry) -> tuple[Extent, ...]:
        """The one range of bytes that is an array. Nothing checks them but their place.

        Raises:
            UsageError: the file holds the array transposed.
        """
        if entry.hf_name in self.released:
            raise UsageError(
                f"{entry.hf_name!r} lies transposed in its file and cannot be streamed from there; "
                "convert the model with scripts/convert.py"
            )
        file = self._home[entry.hf_name]
        tensor = file.tensors[entry.hf_name]
        first, stop = tensor.start, tensor.stop
        row_bytes = (stop - first) // tensor.shape[0]
        if entry.expert is not None:
            first, stop = first + entry.expert * row_bytes, first + (entry.expert + 1) * row_bytes
        elif entry.rows is not None:
            first, stop = first + entry.rows[0] * row_bytes, first + entry.rows[1] * row_bytes
        return (Extent(file.path, first, stop - first, stop - first, checksum=False),)

    def orient(self, entry: Entry, stored: np.ndarray) -> np.ndarray:
        """`stored` as [out, in]: itself, or a transposed copy for the released expert layout."""
        return transposed(stored) if entry.hf_name in self.released else stored

    def place_of(self, entry: Entry) -> tuple[int, int]:
        """(number of the shard, first byte in it): sorting by it reads every file in order."""
        file = self._home[entry.hf_name]
        tensor = file.tensors[entry.hf_name]
        slices = tensor.shape[0] if entry.expert is not None else 1
        offset = (tensor.stop - tensor.start) // slices * (entry.expert or 0)
        return self.shards.index(file), tensor.start + offset

    def close(self) -> None:
        """Close all files; further calls do nothing."""
        for shard in self.shards:
            shard.close()

    def __enter__(self) -> "HFCheckpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def expert_layouts(found: Shapes, config: Config, label: str) -> frozenset[str]:
    """Names of the expert tensors that lie as [E, in, out], the released layout.

    The shape decides. Where in equals out it cannot: then the other expert tensors of the
    checkpoint do, and if they are all square, who saved it (transformers 5 saves [E, out, in]).

    Raises:
        WeightError: if nothing tells.
    """
    released, plain, square = set(), set(), set()
    for name, (_, *shape) in expert_shapes(config).items():
        stored = list(found.get(name, ())[1:])
        if shape[0] == shape[1]:
            square.add(name)
        elif stored == shape[::-1]:
            released.add(name)
        elif stored == shape:
            plain.add(name)
    if not square:
        return frozenset(released)
    if released and plain:
        raise WeightError(
            f"{label}: {min(released)!r} lies as [in, out], {min(plain)!r} as [out, in], and "
            f"{min(square)!r} could be either; save the model again with transformers 5"
        )
    return frozenset(released | square if _is_released(released, plain, config, label) else ())


def _is_released(released: set[str], plain: set[str], config: Config, label: str) -> bool:
    if released or plain:
        return bool(released)
    major = config.transformers_version.partition(".")[0]
    if not major.isdecimal():
        raise WeightError(
            f"{label}: all expert tensors are square and config.json has no transformers_version, "
            "so their layout is unknown; add the version of transformers that saved them"
        )
    return int(major) < 5


def expert_shapes(config: Config) -> Shapes:
    """Name -> [E, out, in] of the expert tensors."""
    return {name: s for name, s in hf_shapes(config).items() if ".mlp.experts." in name}


def check_shapes(found: Shapes, released: frozenset[str], config: Config, label: str) -> None:
    """Whether the tensors found are exactly those of the model.

    Raises:
        WeightError: naming the first tensor that is missing, unknown or misshapen.
    """
    wanted = hf_shapes(config)
    for fault, names in (
        ("misses tensor", sorted(wanted.keys() - found.keys())),
        ("holds an unknown tensor", sorted(found.keys() - wanted.keys())),
    ):
        if names:
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            raise WeightError(f"{label} {fault} {names[0]!r}{more}; {_advice(names[0], config)}")
    for name, shape in wanted.items():
        stored = (shape[0], shape[2], shape[1]) if name in released else shape
        if found[name] != stored:
            raise WeightError(
                f"{label}: {name!r} is {list(found[name])}, but config.json wants {list(stored)}; "
                "the weights belong to another config.json"
            )


def _advice(name: str, config: Config) -> str:
    if name == "lm_head.weight":
        tied = str(config.tie_word_embeddings).lower()
        return f"config.json says tie_word_embeddings: {tied}, correct one of them"
    return "the checkpoint is incomplete, or belongs to another config.json"


def transposed(matrix: np.ndarray) -> np.ndarray:
    """A transposed copy at an aligned address."""
    result = aligned_empty(matrix.shape[::-1], matrix.dtype)
    result[...] = matrix.T
    return result


def _shard_paths(directory: Path) -> list[Path]:
    single, index = directory / SINGLE_NAME, directory / INDEX_NAME
    if not index.exists():
        return [single]
    if single.exists():
        raise WeightError(f"{directory} holds both {SINGLE_NAME} and {INDEX_NAME}; remove one")
    names = sorted(set(read_index(index).values()))
    stray = sorted(
        path.name
        for path in directory.iterdir()
        if _SHARD_NAME.fullmatch(path.name) and path.name not in names
    )
    if stray:
        raise WeightError(f"{directory}: {stray[0]} is not named by {INDEX_NAME}; remove one")
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise WeightError(
            f"{directory} misses {missing[0]}, one of {len(names)} shards; fetch it again"
        )
    return [directory / name for name in names]


def _homes(shards: tuple[SafetensorsFile, ...]) -> dict[str, SafetensorsFile]:
    homes: dict[str, SafetensorsFile] = {}
    for file in shards:
        for name in file.tensors:
            if name in homes:
                raise WeightError(
                    f"{name!r} lies in both {homes[name].path} and {file.path}; fetch them again"
                )
            homes[name] = file
    if shards and shards[0].path.name != SINGLE_NAME:
        _check_index(homes, shards[0].path.parent / INDEX_NAME)
    return homes


def _check_index(homes: dict[str, SafetensorsFile], path: Path) -> None:
    index = read_index(path)
    for name in sorted(index.keys() | homes.keys()):
        place = homes[name].path.name if name in homes else "no file"
        if index.get(name, "no file") != place:
            raise WeightError(
                f"{path}: {name!r} should lie in {index.get(name, 'no file')}, but lies in "
                f"{place}; fetch the checkpoint again"
            )
