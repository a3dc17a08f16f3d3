"""Reading everything again: is a store what its manifest says, do two places hold one model?"""

from pathlib import Path

import numpy as np

from qwen3vl_jax.checkpoints.array_writer import cast
from qwen3vl_jax.checkpoints.conversion import Progress
from qwen3vl_jax.checkpoints.encodings import as_encoded, decoded_bytes, origin, packed
from qwen3vl_jax.checkpoints.files import bytes_of, sha256
from qwen3vl_jax.checkpoints.input_squares import of_checkpoint
from qwen3vl_jax.checkpoints.manifest import ZARR_NAME, chunk_files
from qwen3vl_jax.checkpoints.opening import Checkpoint, kind_of, open_checkpoint
from qwen3vl_jax.checkpoints.store import ARRAYS_NAME, Store, check_file
from qwen3vl_jax.checkpoints.zarr_array import verify_array
from qwen3vl_jax.config import load_config
from qwen3vl_jax.errors import UsageError, WeightError
from qwen3vl_jax.weights import Entry, arrays


def verify(source: Path, destination: Path, *, progress: Progress) -> bool:
    """Read all of both again and compare every array, bit for bit.

    Where the source has another dtype its values are converted first, and where the destination is
    encoded they are encoded, fitted to the inputs that it keeps, if any. If `destination` is a
    store, all its files are compared with its manifest too.

    Returns:
        Whether the destination is encoded.

    Raises:
        UsageError: if both are encoded: it cannot be known from what.
        WeightError: naming the first array or file that differs or is damaged.
        StorageError: if the system reports a read error.
    """
    config = load_config(destination)
    with (
        open_checkpoint(source, load_config(source)) as wanted,
        open_checkpoint(destination, config) as found,
    ):
        if isinstance(found, Store):
            _verify_store(found, progress)
        if wanted.encodings and found.encodings:
            raise UsageError(f"{source} and {destination} are both encoded; compare the original")
        squares = of_checkpoint(found)
        entries = arrays(as_encoded(config, found.encodings))
        progress.stage(
            "comparing", decoded_bytes(entries, lambda e: wanted.dtype_of(origin(e, config)))
        )
        for entry in entries:
            values = wanted.read(origin(entry, config))
            size = values.nbytes
            values = cast(values, found.dtype_of(entry), entry.array)
            if encoding := found.encodings.get(entry.array):
                values = packed(values, entry.array, encoding, squares.get(entry.array))
            digest = sha256(bytes_of(values))
            del values  # one array at a time: the next line may read the other one
            if digest != _digest(found, entry):
                raise WeightError(
                    f"array {entry.array!r} differs between {source} and {destination}; "
                    "convert again to another place"
                )
            progress.advance(size)
        return bool(found.encodings)


def verify_store(directory: Path, *, progress: Progress) -> None:
    """Read every byte of a store again and compare it with the manifest.

    Raises:
        UsageError: if the directory is no store: nothing else has a manifest.
        WeightError: naming the first file that is damaged, missing or unknown.
        StorageError: if the system reports a read error.
    """
    if kind_of(directory) != "store":
        raise UsageError(f"{directory} is no store, so it has no digests; name SRC and DST")
    config = load_config(directory)
    with Store(directory, config) as store:
        _verify_store(store, progress)


def _verify_store(store: Store, progress: Progress) -> None:
    folder = store.directory / ARRAYS_NAME
    progress.stage("verifying", store.nbytes)
    for name in store.manifest.files:
        check_file(store.directory, name, store.manifest)
    _check_strays(store, folder)
    for name, array in store.manifest.arrays.items():
        verify_array(folder, name, array)
        progress.advance(array.nbytes)


def _check_strays(store: Store, folder: Path) -> None:
    known = {f"{name}/{ZARR_NAME}" for name in store.manifest.arrays}
    for name, array in store.manifest.arrays.items():
        known |= {f"{name}/{chunk}" for chunk in chunk_files(array)}
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    for stray in sorted(found - known):
        raise WeightError(f"{folder / stray} does not belong to the store; remove it")


def _digest(checkpoint: Checkpoint, entry: Entry) -> str:
    """SHA-256 of an array; that of a store is known, and was just verified."""
    if isinstance(checkpoint, Store):
        return checkpoint.manifest.arrays[entry.array].sha256
    return sha256(bytes_of(np.ascontiguousarray(checkpoint.read(entry))))
