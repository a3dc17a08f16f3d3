"""Writes arrays where a plan can stream them from: one zarr array each, in checksummed chunks.

    DIR/<name>/zarr.json   c.0.0   c.1.0   ...

A chunk is whole rows, at most 4 MiB, raw little-endian values and their CRC-32C.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from memsched.errors import StoreError
from memsched.stores.blocks import Block, StoredArray

CHUNK_BYTES = 4 << 20


def save(directory: Path, arrays: Mapping[str, jax.Array | np.ndarray]) -> dict[str, StoredArray]:
    """Writes arrays below a directory, and says where their bytes lie.

    Raises:
        StoreError: the file system refuses, or there is something of that name already.
    """
    return {name: _save_one(directory / name, np.asarray(array)) for name, array in arrays.items()}


def _save_one(folder: Path, values: np.ndarray) -> StoredArray:
    rows = values.reshape(1) if values.ndim == 0 else values
    row_bytes = max(1, rows.nbytes // max(1, len(rows)))
    chunk = [max(1, min(len(rows), CHUNK_BYTES // row_bytes)), *rows.shape[1:]]
    try:
        store = tensorstore.open(_specification(folder, rows, chunk), create=True).result()
        store.write(rows).result()
    except (ValueError, OSError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise StoreError(f"{folder} cannot be written: {text[:300]}; use an empty folder") from None
    payload = chunk[0] * row_bytes
    suffix = ".0" * (rows.ndim - 1)
    blocks = tuple(
        Block(folder / f"c.{index}{suffix}", 0, payload, min(payload, rows.nbytes - first), True)
        for index, first in enumerate(range(0, rows.nbytes, payload))
    )
    return StoredArray(rows.nbytes, blocks)


def _specification(folder: Path, rows: np.ndarray, chunk: list[int]) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "metadata": {
            "shape": list(rows.shape),
            "data_type": rows.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
        },
        "store_data_equal_to_fill_value": True,
    }
