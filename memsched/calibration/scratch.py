"""Weights to measure with: noise in a file, laid out like those of a converted store."""

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
from memsched.stores.buffers import PAGE_BYTES

CHUNK_BYTES = 4 << 20
SCALE = 0.02  # of weights, so that what is computed with them stays finite
FREE_PART = 2


class Scratch:
    """A file without a name: it is gone when this is closed, and however the process ends.

    Arrays of one program lie in different places; those of different programs share them.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = Path(directory or tempfile.gettempdir())
        try:
            self._file = tempfile.TemporaryFile(dir=self.directory, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise StoreError(
                f"directory {self.directory}: {error.strerror}; give another"
            ) from error
        # The only path of a file without a name.
        self._path = Path(f"/proc/self/fd/{self._file.fileno()}")
        self._blocks: dict[tuple[int, int, int], Block] = {}
        self._end = 0
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
        self._file.close()

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
            blocks = tuple(
                self._block(spec.nbytes, number, start)
                for start in range(0, spec.nbytes, CHUNK_BYTES)
            )
            found[name] = StoredArray(spec.nbytes, blocks)
        return found

    def _block(self, nbytes: int, number: int, start: int) -> Block:
        """What is at `start` of the array of so many bytes with this number."""
        key = nbytes, number, start
        if key not in self._blocks:
            size = min(CHUNK_BYTES, nbytes - start)
            block = Block(self._path, self._end, size, size, True)
            self._write(block)
            # As files of their own do, all begin where a page does.
            self._end += -(-(size + CHECKSUM_BYTES) // PAGE_BYTES) * PAGE_BYTES
            self._blocks[key] = block
        return self._blocks[key]

    def _write(self, block: Block) -> None:
        payload = self._noise[: block.nbytes]
        content = payload + google_crc32c.value(payload).to_bytes(CHECKSUM_BYTES, "little")
        try:
            self._file.seek(block.offset)
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            raise StoreError(
                f"directory {self.directory}: {error.strerror}; give another"
            ) from error
