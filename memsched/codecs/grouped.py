"""Codes and terms (scales, minima) of an array, block of rows by block of rows: int8 and int4."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memsched.codecs.codec import Numbers, check_range, check_raw, lines, row_blocks
from memsched.codecs.grids import Grid, laid_out

Fit = Callable[[Numbers], Grid]
Pack = Callable[[Numbers], NDArray[np.uint8]]


def groups(width: int, group: int | None) -> int:
    """How many groups a row has; the last may be smaller. None: one."""
    return -(-width // group) if group else 1


def encoded_rows(
    array: NDArray[Any],
    group: int | None,
    limit: float,
    fit: Fit,
    pack: Pack,
    label: tuple[str, str],
) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
    """Blocks of packed rows: the packed codes, then the terms of all groups.

    `label` is the codec's name and the array's, for errors.

    Raises:
        CodecError: a number is not finite or beyond `limit`.
        ProgramError: no dtype of ours, or rows without numbers.
    """
    check_raw(array, *label)
    rows, width = lines(array.shape, label[0])
    flat = array.reshape(rows, width)
    for part in row_blocks(rows, width):
        block = flat[part].astype(np.float32)
        check_range(block, float(np.abs(block).max()), limit, *label)
        codes, terms = _fitted(block, group or width, fit)
        yield part, np.concatenate([pack(codes), terms.view(np.uint8)], axis=1)


def _fitted(block: Numbers, group: int, fit: Fit) -> tuple[Numbers, NDArray[Any]]:
    """Codes [rows, in], and terms [rows, groups * terms of a group]."""
    rows, width = block.shape
    whole = width // group * group
    codes, terms = np.empty_like(block), []
    for part, size in ((slice(0, whole), group), (slice(whole, width), width - whole)):
        if part.start == part.stop:
            continue
        numbers = block[:, part].reshape(-1, size)
        grid = fit(laid_out(numbers))
        codes[:, part] = grid.codes[: len(numbers)].reshape(rows, -1)
        terms.append(grid.terms[: len(numbers)].reshape(rows, -1))
    return codes, np.ascontiguousarray(np.concatenate(terms, axis=1))


def spread(terms: Numbers, group: int | None, width: int) -> Numbers:
    """[rows, groups] to [rows, in]: each number's own term."""
    return terms if group is None else np.repeat(terms, group, axis=1)[:, :width]


def flat_rows(packed: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Packed rows as a matrix."""
    return packed.reshape(math.prod(shape[:-1]), packed.shape[-1])
