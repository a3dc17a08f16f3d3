"""Opening the weights of a directory, whatever format they are in."""

from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from qwen3vl_jax.checkpoints.encodings import NOTHING_ENCODED, Encodings, as_encoded
from qwen3vl_jax.checkpoints.extents import Extent
from qwen3vl_jax.checkpoints.files import read_small
from qwen3vl_jax.checkpoints.hf_checkpoint import HFCheckpoint
from qwen3vl_jax.checkpoints.manifest import MANIFEST_BYTES, MANIFEST_NAME
from qwen3vl_jax.config import Config, load_config
from qwen3vl_jax.errors import WeightError
from qwen3vl_jax.weights import Entry


@runtime_checkable
class Checkpoint(Protocol):
    """Weights that can be read one array at a time, whatever the format on disk."""

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, as stored."""

    @property
    def encodings(self) -> Encodings:
        """Of arrays that are stored in fewer bytes, how; `read` decodes them."""

    def dtype_of(self, entry: Entry) -> np.dtype:
        """The dtype that `read` returns: float32, float16 or bfloat16."""

    def read(self, entry: Entry) -> np.ndarray:
        """A new array of `entry.shape` at a 64-byte aligned address; the caller owns it.

        Raises:
            WeightError: if the data are damaged.
            StorageError: if the system reports a read error.
        """

    def read_packed(self, entry: Entry) -> np.ndarray:
        """The same as it is stored: encoded, if it is."""

    def extents(self, entry: Entry) -> tuple[Extent, ...]:
        """The files and places that hold the array's bytes, in order, as they are on disk.

        Raises:
            UsageError: it does not lie there as it is: convert the model first.
            WeightError: if the files are not what they should be.
        """

    def close(self) -> None:
        """Give files back; further calls do nothing."""

    def __enter__(self) -> "Checkpoint": ...

    def __exit__(self, *_: object) -> None: ...


def open_checkpoint(path: str | Path, config: Config) -> Checkpoint:
    """Open a Hugging Face directory, our store, or an Orbax checkpoint for reading.

    Names, shapes and dtypes of all tensors are checked against `config` before this returns.

    Raises:
        WeightError: if the directory holds none of the three, or not exactly this model.
        StorageError: if the system refuses.
    """
    path = Path(path)
    match kind_of(path):
        case "store":
            from qwen3vl_jax.checkpoints.store import Store  # tensorstore takes 0.4 s to import

            return Store(path, config)
        case "orbax":
            from qwen3vl_jax.checkpoints.orbax_checkpoint import OrbaxCheckpoint

            return OrbaxCheckpoint(path, config)
        case _:
            return HFCheckpoint(path, config)


def described(path: str | Path) -> tuple[Config, Encodings]:
    """The model of a directory or a config.json, as it runs, and which of its arrays are encoded.

    A tied model whose head is encoded runs as one that is not tied. Reads no weight.

    Raises:
        ConfigError: there is no config.json that can be honoured.
        WeightError, StorageError: as `open_checkpoint` says of a store.
    """
    config, manifest = load_config(path), Path(path) / MANIFEST_NAME
    # To read it in full takes 0.1 s for 20,000 arrays, and few stores are encoded.
    if not manifest.exists() or b'"encoding"' not in read_small(manifest, MANIFEST_BYTES):
        return config, NOTHING_ENCODED
    with open_checkpoint(path, config) as checkpoint:
        return as_encoded(config, checkpoint.encodings), checkpoint.encodings


def kind_of(path: Path) -> str:
    """What a directory holds: "huggingface", "store" or "orbax".

    Raises:
        WeightError: if it is none of them.
    """
    for kind, names in (
        ("store", (MANIFEST_NAME,)),
        ("orbax", ("_CHECKPOINT_METADATA", "orbax")),
        ("huggingface", ("model.safetensors", "model.safetensors.index.json")),
    ):
        if any((path / name).exists() or (path / name).is_symlink() for name in names):
            return kind
    if not path.is_dir():
        raise WeightError(f"{path} is no directory; name the folder that holds config.json")
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise WeightError(
            f"{path} holds only pickled weights, which can run code and are never read; "
            "save the model as safetensors"
        )
    raise WeightError(f"{path} holds no weights: no model.safetensors, no index, no store")
