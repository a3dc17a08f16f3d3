"""qwen3vl_jax.planned.rows: rows of the embedding table that are not in memory."""

import numpy as np

from qwen3vl_jax.checkpoints.encodings import NOTHING_ENCODED, Encodings
from qwen3vl_jax.checkpoints.extents import Extent
from qwen3vl_jax.planned.rows import FEW_ROWS, EmbeddingRows
from qwen3vl_jax.weights import Entry

TABLE = np.random.default_rng(0).standard_normal((4096, 1024)).astype(np.float32)
ENTRY = Entry("language_model.embed_tokens.weight", "embed_tokens.weight", TABLE.shape)


class Notebook:
    """A checkpoint of one table that notes which of its rows are read."""

    nbytes = TABLE.nbytes
    encodings: Encodings = NOTHING_ENCODED

    def __init__(self) -> None:
        self.stretches: list[tuple[int, int]] = []

    def dtype_of(self, entry: Entry) -> np.dtype:
        return TABLE.dtype

    def read(self, entry: Entry) -> np.ndarray:
        assert entry.rows is not None
        self.stretches.append(entry.rows)
        return TABLE[slice(*entry.rows)]

    read_packed = read

    def extents(self, entry: Entry) -> tuple[Extent, ...]:
        raise NotImplementedError

    def close(self) -> None: ...

    def __enter__(self) -> "Notebook":
        return self

    def __exit__(self, *_: object) -> None: ...


def looked_up(token_ids: list[int]) -> list[tuple[int, int]]:
    """Which stretches are read; the rows are those of the table."""
    notes, tokens = Notebook(), np.array([token_ids])
    rows = EmbeddingRows(notes, ENTRY, ((0, 4096),))
    np.testing.assert_array_equal(rows(tokens, lambda path: None), TABLE[tokens])
    return notes.stretches


def test_neighbours_among_few_tokens_are_read_together() -> None:
    # 64 rows are 256 KiB.
    assert looked_up([70, 3000, 65, 70, 100]) == [(65, 101), (3000, 3001)]
    assert looked_up([63, 64]) == [(63, 64), (64, 65)]


def test_many_tokens_are_read_in_stretches_as_long_as_a_chunk() -> None:
    many = [*range(0, 1000, 50), 1030]
    assert len(many) > FEW_ROWS
    assert looked_up(many) == [(0, 951), (1030, 1031)]
