"""Writing Orbax checkpoints, one array after the other; `orbax_checkpoint` reads them."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from qwen3vl_jax.checkpoints.conversion import (
    Progress,
    copy_side_files,
    fingerprint,
    needed_space,
)
from qwen3vl_jax.checkpoints.encodings import decoded_bytes
from qwen3vl_jax.checkpoints.files import sync_directory, sync_file
from qwen3vl_jax.checkpoints.opening import Checkpoint, kind_of, open_checkpoint
from qwen3vl_jax.checkpoints.orbax_checkpoint import FOLDER_NAME, explained
from qwen3vl_jax.checkpoints.work_directory import WorkDirectory
from qwen3vl_jax.config import load_config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.weights import Entry, arrays

CHUNK_BYTES = 64 * 2**20


def to_orbax(source: Path, destination: Path, *, progress: Progress) -> None:
    """Write `destination`/orbax, with config and tokenizer beside it.

    A killed run starts again from the beginning: Orbax has no journal. What is encoded is written
    decoded, and a tied model's own head is left out: its table is the head again.

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
        nbytes = decoded_bytes(arrays(config), checkpoint.dtype_of)
        needed_space(work.content, nbytes)
        progress.stage("writing Orbax", nbytes)
        tree: dict[str, Any] = {}
        for entry in arrays(config):
            *folders, name = entry.array.split(".")
            place = tree
            for key in folders:
                place = place.setdefault(key, {})
            place[name] = _Unread(entry, checkpoint, progress)
        with explained(f"cannot write {destination}"):
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


def _sync_tree(directory: Path) -> None:
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync_file(Path(folder, name))
        sync_directory(Path(folder))
