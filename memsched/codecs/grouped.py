"""Codes and terms (scales, minima) of an array, block of rows by block of rows: int8 and int4."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memsched.codecs.codec import Numbers, check_range, check_raw, lines, row_blocks
from memsched.codecs.grids import Grid, better, laid_out
from memsched.errors import CodecError, ProgramError

Fit = Callable[[Numbers, Numbers | None], Grid]
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
    weights: NDArray[Any] | None,
) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
    """Blocks of packed rows: the packed codes, then the terms of all groups.

    `label` is the codec's name and the array's, for errors. `weights` [in] are those of every
    row's squares in the fit; None: all count the same.

    Raises:
        CodecError: a number is not finite or beyond `limit`; a weight not finite or negative.
        ProgramError: no dtype of ours, rows without numbers, or other weights than float32 [in].
    """
    check_raw(array, *label)
    rows, width = lines(array.shape, label[0])
    if weights is not None:
        _check_weights(weights, width, *label)
    flat = array.reshape(rows, width)
    for part in row_blocks(rows, width):
        block = flat[part].astype(np.float32)
        check_range(block, float(np.abs(block).max()), limit, *label)
        codes, terms = _fitted(block, group or width, fit, weights)
        yield part, np.concatenate([pack(codes), terms.view(np.uint8)], axis=1)


def _check_weights(weights: NDArray[Any], width: int, codec: str, name: str) -> None:
    if (weights.dtype.name, weights.shape) != ("float32", (width,)):
        raise ProgramError(
            f"{name}: codec {codec} takes float32 [{width}] as weights of its columns, not "
            f"{weights.dtype.name} {list(weights.shape)}"
        )
    wrong = int(np.sum(~((weights >= 0) & (weights < np.inf))))
    if wrong:
        raise CodecError(
            f"{name}: {wrong} of {width} weights of its columns are negative, infinite or NaN; "
            f"codec {codec} needs finite numbers from 0: measure them again, or leave them out"
        )


def _fitted(
    block: Numbers, group: int, fit: Fit, weights: Numbers | None
) -> tuple[Numbers, NDArray[Any]]:
    """Codes [rows, in], and terms [rows, groups * terms of a group]."""
    rows, width = block.shape
    whole = width // group * group
    codes, terms = np.empty_like(block), []
    for part, size in ((slice(0, whole), group), (slice(whole, width), width - whole)):
        if part.start == part.stop:
            continue
        count = rows * (part.stop - part.start) // size
        numbers = laid_out(block[:, part].reshape(count, size))
        grid = fit(numbers, None)
        if weights is not None:
            shares = laid_out(np.tile(_shares(weights[part].reshape(-1, size)), (rows, 1)))
            grid = better(grid, fit(numbers, shares), numbers, shares)
        codes[:, part] = grid.codes[:count].reshape(rows, -1)
        terms.append(grid.terms[:count].reshape(rows, -1))
    return codes, np.ascontiguousarray(np.concatenate(terms, axis=1))


def _shares(weights: Numbers) -> Numbers:
    """Weights with a mean of 1 in each group; zeros stay."""
    wide = weights.astype(np.float64)
    total = wide.mean(axis=1, keepdims=True)
    return (wide / np.where(total == 0, 1, total)).astype(np.float32)


def spread(terms: Numbers, group: int | None, width: int) -> Numbers:
    """[rows, groups] to [rows, in]: each number's own term."""
    return terms if group is None else np.repeat(terms, group, axis=1)[:, :width]


def flat_rows(packed: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Packed rows as a matrix."""
    return packed.reshape(math.prod(shape[:-1]), packed.shape[-1])
