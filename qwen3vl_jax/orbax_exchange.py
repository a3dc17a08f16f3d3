"""Orbax checkpoints, for exchange with other JAX projects.

The tree is our paths cut at the dots: {"visual": {"blocks": {"0": {"attn": ...}}}}, vocabulary
matrices whole. Orbax keeps no digests, so what is read is checked by name, shape and dtype only.
One array is in memory at a time, both ways.
"""

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from qwen3vl_jax.config import Config, load_config
from qwen3vl_jax.conversion import Progress, copy_side_files, fingerprint, needed_space
from qwen3vl_jax.errors import Qwen3VLError, StorageError, UsageError, WeightError
from qwen3vl_jax.files import DTYPES, aligned_empty, sync_directory, sync_file
from qwen3vl_jax.weights import Checkpoint, Entry, arrays, kind_of, open_checkpoint
from qwen3vl_jax.work_directory import WorkDirectory

FOLDER_NAME = "orbax"
METADATA_NAME = "_CHECKPOINT_METADATA"
CHUNK_BYTES = 64 * 2**20


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
            with _explained(f"{folder}"):
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

    def dtype_of(self, entry: Entry) -> np.dtype:
        """The dtype in the checkpoint."""
        return DTYPES[np.dtype(self._arrays[entry.array].dtype).name]

    def read(self, entry: Entry) -> np.ndarray:
        """One array, as `weights.Checkpoint.read` says; row blocks read the whole of theirs."""
        keys = entry.array.split(".")
        wanted: Any = 0
        options: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for key in reversed(keys):
            wanted, options = {key: wanted}, {key: options}
        arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=options, partial_restore=True)
        with _explained(f"{self.directory}: array {entry.array!r}"):
            found = self._checkpointer.restore(self.directory, args=arguments)
        for key in keys:
            found = found[key]
        if entry.rows is not None:
            found = found[slice(*entry.rows)]
        values = aligned_empty(entry.shape, self.dtype_of(entry))
        values[...] = found
        return values

    def close(self) -> None:
        """Stop Orbax's threads; further calls do nothing."""
        self._checkpointer.close()

    def __enter__(self) -> "OrbaxCheckpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def to_orbax(source: Path, destination: Path, *, progress: Progress) -> None:
    """Write `destination`/orbax, with config and tokenizer beside it.

    A killed run starts again from the beginning: Orbax has no journal.

    Raises:
        UsageError: if `destination` exists, or the source is an Orbax checkpoint already.
        WeightError: if the source is damaged.
        StorageError: if there is too little space, or the system refuses.
    """
    if kind_of(source) == "orbax":
        raise UsageError(f"{source} is an Orbax checkpoint already; leave out --to-orbax")
    config = load_config(source)
    task = {"to": "orbax", "from": fingerprint(source)}
    with (
        open_checkpoint(source, config) as checkpoint,
        WorkDirectory(destination, task) as work,
    ):
        needed_space(work.content, checkpoint.nbytes)
        progress.stage("writing Orbax", checkpoint.nbytes)
        tree: dict[str, Any] = {}
        for entry in arrays(config):
            *folders, name = entry.array.split(".")
            place = tree
            for key in folders:
                place = place.setdefault(key, {})
            place[name] = _Unread(entry, checkpoint, progress)
        with _explained(f"cannot write {destination}"):
            _save((work.content / FOLDER_NAME).resolve(), tree)
        copy_side_files(source, work.content)
        _sync_tree(work.content)
        work.publish()


@dataclasses.dataclass(frozen=True, slots=True)
class _Unread:
    """A leaf for Orbax that is read only when its turn to be written comes."""

    entry: Entry
    checkpoint: Checkpoint
    progress: Progress


class _UnreadHandler(type_handlers.NumpyHandler):
    """Writes one leaf after the other, each as a numpy array."""

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        for leaf, info in zip(values, infos, strict=True):
            array = leaf.checkpoint.read(leaf.entry)
            options = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
            for commit in await super().serialize([array], [info], [options]):
                commit.result()
            leaf.progress.advance(array.nbytes)
        return []


def _save(path: Path, tree: dict[str, Any]) -> None:
    handler = _UnreadHandler(deepcopy_host_arrays=False)
    registry = type_handlers.create_type_handler_registry((_Unread, handler))
    # One zarr3 array per weight and no OCDBT: files that other tools can read, and no lock files.
    tree_handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=True, type_handler_registry=registry
    )
    with ocp.Checkpointer(tree_handler) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree), force=True)


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
def _explained(what: str) -> Iterator[None]:
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


def _sync_tree(directory: Path) -> None:
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync_file(Path(folder, name))
        sync_directory(Path(folder))
