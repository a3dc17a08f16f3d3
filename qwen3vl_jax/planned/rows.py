"""Rows of the embedding table, read from the checkpoint when they are needed.

A token needs one row of 151,936: the table itself need not be in memory for that.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from qwen3vl_jax.arrays import AnyArray
from qwen3vl_jax.checkpoints.opening import Checkpoint
from qwen3vl_jax.weights import Entry

READ_BYTES = 4 << 20  # a store reads its chunks whole, and they have at most so many


class EmbeddingRows:
    """Looks rows up in an open checkpoint. Keeps none: memory stays as it is."""

    def __init__(self, checkpoint: Checkpoint, table: Entry) -> None:
        """`table` is the whole embedding matrix."""
        self._checkpoint = checkpoint
        self._table = table
        self._dtype = checkpoint.dtype_of(table)

    def __call__(self, token_ids: Int[AnyArray, "B T"]) -> Float[np.ndarray, "B T H"]:
        """The rows of the tokens, in the dtype on disk."""
        wanted, places = np.unique(np.asarray(token_ids), return_inverse=True)
        width = self._table.shape[1]
        found = np.empty((len(wanted), width), self._dtype)
        span = max(1, READ_BYTES // (width * self._dtype.itemsize))
        for first, stop in _groups(wanted, span):
            low, high = int(wanted[first]), int(wanted[stop - 1]) + 1
            block = Entry(
                f"{self._table.path}.0", self._table.hf_name, (high - low, width), rows=(low, high)
            )
            found[first:stop] = self._checkpoint.read(block)[wanted[first:stop] - low]
        return found[places.reshape(np.shape(token_ids))]


def _groups(wanted: Int[np.ndarray, " rows"], span: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of `wanted`, which is sorted, whose rows lie in `span` rows."""
    first = 0
    while first < len(wanted):
        stop = int(np.searchsorted(wanted, wanted[first] + span))
        yield first, stop
        first = stop
