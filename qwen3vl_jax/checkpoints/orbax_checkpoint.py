"""Reading Orbax checkpoints, for exchange with other JAX projects.

The tree is our paths cut at the dots: {"visual": {"blocks": {"0": {"attn": ...}}}}, vocabulary
matrices whole. Orbax keeps no digests, so what is read is checked by name, shape and dtype only.
One array is in memory at a time.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from qwen3vl_jax.checkpoints.encodings import Encodings
from qwen3vl_jax.checkpoints.extents import Extent
from qwen3vl_jax.checkpoints.files import DTYPES, aligned_empty
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import Qwen3VLError, StorageError, UsageError, WeightError
from qwen3vl_jax.weights import Entry, arrays

FOLDER_NAME = "orbax"
METADATA_NAME = "_CHECKPOINT_METADATA"


class OrbaxCheckpoint:
    """An Orbax checkpoint of exactly our arrays, opened for reading."""

    def __init__(self, directory: Path, config: Config) -> None:
        """Read the tree and compare it with the model.

        Args:
            directory: the checkpoint, or a directory that holds it as `orbax`.

        Raises:
            WeightError: if it does not hold exactly the arrays of `config`.
        """
        folder = directory if (directory / METADATA_NAME).exists() else directory / FOLDER_NAME
        self.directory = folder.resolve()
        self._checkpointer = ocp.PyTreeCheckpointer()
        try:
            with explained(f"{folder}"):
                tree = self._checkpointer.metadata(self.directory).item_metadata.tree
            self._arrays = dict(_leaves(tree, ()))
            _check(self._arrays, config, str(folder))
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        found = self._arrays.values()
        return sum(int(np.prod(array.shape)) * np.dtype(array.dtype).itemsize for array in found)

    @property
    def encodings(self) -> Encodings:
        """None: numbers lie there as they are."""
        return {}

    def dtype_of(self, entry: Entry) -> np.dtype:
        """The dtype in the checkpoint."""
        return DTYPES[np.dtype(self._arrays[entry.array].dtype).name]

    def read(self, entry: Entry) -> np.ndarray:
        """One array, as `opening.Checkpoint.read` says; row blocks read the whole of theirs."""
        keys = entry.array.split(".")
        wanted: Any = 0
        options: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for key in reversed(keys):
            wanted, options = {key: wanted}, {key: options}
        arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=options, partial_restore=True)
        with explained(f"{self.directory}: array {entry.array!r}"):
            found = self._checkpointer.restore(self.directory, args=arguments)
        for key in keys:
            found = found[key]
        if entry.rows is not None:
            found = found[slice(*entry.rows)]
        values = aligned_empty(entry.shape, self.dtype_of(entry))
        values[...] = found
        return values

    def read_packed(self, entry: Entry) -> np.ndarray:
        """The same: nothing is encoded."""
        return self.read(entry)

    def extents(self, entry: Entry) -> tuple[Extent, ...]:
        """Always refused: Orbax compresses.

        Raises:
            UsageError: naming the way out.
        """
        raise UsageError(
            f"{self.directory}: arrays of an Orbax checkpoint cannot be streamed; "
            "convert it with scripts/convert.py"
        )

    def close(self) -> None:
        """Stop Orbax's threads; further calls do nothing."""
        self._checkpointer.close()

    def __enter__(self) -> "OrbaxCheckpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _leaves(tree: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, (*keys, str(key)))
    else:
        yield ".".join(keys), tree


def _check(found: dict[str, Any], config: Config, label: str) -> None:
    wanted = {entry.array: entry.shape for entry in arrays(config)}
    for name in sorted(wanted.keys() ^ found.keys()):
        fault = "misses array" if name in wanted else "holds an unknown array"
        raise WeightError(f"{label} {fault} {name!r}; it belongs to another model")
    for name, shape in wanted.items():
        array = found[name]
        dtype = None if array.dtype is None else np.dtype(array.dtype).name
        if tuple(array.shape) != shape or dtype not in DTYPES:
            raise WeightError(
                f"{label}: {name!r} is {dtype} {list(array.shape)}, wanted {list(shape)} of "
                f"{', '.join(DTYPES)}; it belongs to another model"
            )


@contextmanager
def explained(what: str) -> Iterator[None]:
    """One line for whatever Orbax raises, and silence for what it logs meanwhile."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except Qwen3VLError:
        raise
    except OSError as error:
        raise StorageError(f"{what}: {error}; check the disk and its free space") from error
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightError(f"{what} is no readable Orbax checkpoint: {reason}; save it again") from (
            error
        )
    finally:
        logger.setLevel(level)
