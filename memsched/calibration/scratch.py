"""Weights to measure with: files full of noise, laid out like those of a converted store."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import google_crc32c
import ml_dtypes
import numpy as np

from memsched.detection.disk_rate import free_bytes
from memsched.errors import StoreError
from memsched.program import ArraySpec
from memsched.stores.blocks import CHECKSUM_BYTES, Block, StoredArray

CHUNK_BYTES = 4 << 20
SCALE = 0.02  # of weights, so that what is computed with them stays finite
FREE_PART = 2


class Scratch:
    """A folder of files that is removed when this is closed.

    Arrays of one program lie in different files; those of different programs share them.
    """

    def __init__(self, directory: Path | None = None) -> None:
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="memsched-", dir=directory)
        except OSError as error:
            raise StoreError(f"directory {directory}: {error.strerror}; give another") from error
        self.directory = Path(self._folder.name)
        noise = np.random.default_rng(0).standard_normal(CHUNK_BYTES // 2, np.float32) * SCALE
        self._noise = noise.astype(ml_dtypes.bfloat16).tobytes()

    def __enter__(self) -> "Scratch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._folder.cleanup()

    def sources(self, weights: Mapping[str, ArraySpec]) -> dict[str, StoredArray]:
        """A source for each weight.

        Raises:
            StoreError: the disk has no room for them.
        """
        wanted = sum(spec.nbytes for spec in weights.values())
        if wanted > free_bytes(self.directory) // FREE_PART:
            raise StoreError(
                f"directory {self.directory}: {wanted:,} B to measure with are more than half of"
                " what is free; give another one"
            )
        counts: dict[int, int] = {}
        found = {}
        for name, spec in weights.items():
            number = counts[spec.nbytes] = counts.get(spec.nbytes, 0) + 1
            found[name] = StoredArray(spec.nbytes, tuple(self._blocks(spec.nbytes, number)))
        return found

    def _blocks(self, nbytes: int, number: int) -> list[Block]:
        blocks = []
        for start in range(0, nbytes, CHUNK_BYTES):
            size = min(CHUNK_BYTES, nbytes - start)
            path = self.directory / f"{nbytes}-{number}-{start // CHUNK_BYTES}"
            if not path.exists():
                self._write(path, size)
            blocks.append(Block(path, 0, size, size, True))
        return blocks

    def _write(self, path: Path, size: int) -> None:
        payload = self._noise[:size]
        try:
            path.write_bytes(
                payload + google_crc32c.value(payload).to_bytes(CHECKSUM_BYTES, "little")
            )
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}; give another directory") from error
