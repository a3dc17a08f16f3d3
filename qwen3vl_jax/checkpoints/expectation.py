"""What codecs do to matrices that nobody has read: as much as to normal numbers in rows as long."""

import functools

import numpy as np

from memsched.codecs import parse_codec, relative_error
from memsched.codecs.choice import Candidate, Subject
from memsched.codecs.levels import Level
from qwen3vl_jax.checkpoints import sensitivity
from qwen3vl_jax.checkpoints.encodings import HEAD, Encoding
from qwen3vl_jax.checkpoints.files import DTYPES
from qwen3vl_jax.checkpoints.selection import matrices
from qwen3vl_jax.config import Config

# Errors of so many rows are within 1 % of those of all.
ROWS = 64


def expected_subjects(config: Config, dtype: np.dtype, level: Level) -> list[Subject]:
    """All matrices that may be encoded, with default sensitivities and expected errors."""
    entries = matrices(config)
    single = sensitivity.of_matrices([entry.path for entry in entries], config, None)
    return [
        Subject(
            entry.path,
            int(np.prod(entry.shape)) * dtype.itemsize,
            single[entry.path],
            _candidates(entry.shape, dtype.name, level.codecs, head=entry.path == HEAD),
        )
        for entry in entries
    ]


@functools.cache
def _candidates(
    shape: tuple[int, ...], dtype: str, codecs: tuple[str, ...], *, head: bool
) -> tuple[Candidate, ...]:
    """Those that make a matrix of this shape smaller.

    A codec that takes all rows at once, such as svd, depends on more than their length: it is for
    matrices that are measured.
    """
    encodings = [Encoding(codec, shape, dtype) for codec in codecs]
    return tuple(
        Candidate(one.codec, one.format.nbytes(shape, dtype), _error(shape, dtype, one.codec))
        for one in encodings
        if one.saves and one.format.cut is not None and (one.keeps_rows or not head)
    )


def _error(shape: tuple[int, ...], dtype: str, codec: str) -> float:
    return _normal_error(min(ROWS, shape[0]), shape[1], dtype, codec)


@functools.cache
def _normal_error(rows: int, width: int, dtype: str, codec: str) -> float:
    numbers = np.random.default_rng(0).standard_normal((rows, width), np.float32)
    return relative_error(numbers.astype(DTYPES[dtype]), parse_codec(codec))
