"""Rows of the embedding table: from blocks that are in memory anyway, or from the checkpoint.

A token needs one row of 151,936: the table itself need not be in memory for that.
"""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Array, Float, Int

from qwen3vl_jax.arrays import AnyArray
from qwen3vl_jax.checkpoints.opening import Checkpoint
from qwen3vl_jax.weights import Entry

READ_BYTES = 4 << 20  # a store reads its chunks whole, and they have at most so many
FEW_ROWS = 16  # are read in 0.7 ms each: no plan has room for a long stretch of the table
FEW_BYTES = 256 << 10  # of neighbours that are read together: a part of a chunk is as large
Resident = Callable[[str], Array | None]
Blocks = tuple[tuple[int, int], ...]


class EmbeddingRows:
    """Looks rows up in memory or in an open checkpoint. Keeps none: memory stays as it is."""

    def __init__(self, checkpoint: Checkpoint, table: Entry, blocks: Blocks) -> None:
        """`table` is the whole embedding matrix, `blocks` are ranges of its rows, in order."""
        self._checkpoint = checkpoint
        self._table = table
        self._blocks = blocks
        self._dtype = checkpoint.dtype_of(table)

    def __call__(
        self, token_ids: Int[AnyArray, "B T"], resident: Resident
    ) -> Float[np.ndarray, "B T H"]:
        """The rows of the tokens, in the dtype on disk.

        Args:
            resident: gives a block of the table by its path, if it is in main memory now.
        """
        wanted, places = np.unique(np.asarray(token_ids), return_inverse=True)
        found = np.empty((len(wanted), self._table.shape[1]), self._dtype)
        together = FEW_BYTES if len(wanted) <= FEW_ROWS else READ_BYTES
        span = max(1, together // found[:1].nbytes)
        for index, (low, high) in enumerate(self._blocks):
            first, stop = np.searchsorted(wanted, (low, high))
            if first == stop:
                continue
            block = resident(f"{self._table.path}.{index}")
            if block is not None:
                found[first:stop] = np.asarray(block)[wanted[first:stop] - low]
            else:
                self._read(wanted[first:stop], found[first:stop], span)
        return found[places.reshape(np.shape(token_ids))]

    def _read(
        self, wanted: Int[np.ndarray, " rows"], found: Float[np.ndarray, "rows H"], span: int
    ) -> None:
        width = self._table.shape[1]
        for first, stop in _groups(wanted, span):
            low, high = int(wanted[first]), int(wanted[stop - 1]) + 1
            block = Entry(
                f"{self._table.path}.0", self._table.hf_name, (high - low, width), rows=(low, high)
            )
            found[first:stop] = self._checkpoint.read(block)[wanted[first:stop] - low]


def _groups(wanted: Int[np.ndarray, " rows"], span: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of `wanted`, which is sorted, whose rows lie in one stretch of `span`."""
    first = 0
    while first < len(wanted):
        border = (int(wanted[first]) // span + 1) * span
        stop = int(np.searchsorted(wanted, border))
        yield first, stop
        first = stop
