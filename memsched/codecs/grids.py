"""Groups of numbers on grids of 16 or 255 points: which grid has the least squared error.

The usual grid reaches the largest number of the group. A tighter one clips that number and serves
all others better. So several are tried. For each the codes are fixed, and the best grid for these
codes follows in closed form (least squares). The best of all is improved once more in the same way.
The usual grid is among those tried: the result is never worse.

Squares may be weighted, number by number: the grid is then near where it matters.

Groups are the rows of a matrix. Short groups are laid out column by column, so that sums over all
groups at once are sums of whole vectors.
"""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memsched.codecs.codec import Numbers, narrowed

Reaches = tuple[float, ...]
Ends = tuple[tuple[float, float], ...]
SHORT_GROUP = 128  # numbers; from here on a group is long enough to be summed along itself


@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """The code of each number, and what is stored with each group: a scale, or also a minimum."""

    codes: Numbers
    terms: NDArray[Any]

    @property
    def numbers(self) -> Numbers:
        """What it stands for."""
        terms = self.terms.astype(np.float32)
        products = self.codes * terms[:, :1]
        return products + terms[:, 1:] if terms.shape[1] > 1 else products


def laid_out(groups: Numbers) -> Numbers:
    """The same matrix in the memory order that is fast for its width."""
    if len(groups) == 1:  # one alone would be summed in another order than among others
        groups = np.repeat(groups, 2, axis=0)
    short = groups.shape[1] < SHORT_GROUP
    return np.asfortranarray(groups) if short else np.ascontiguousarray(groups)


def symmetric(
    groups: Numbers,
    low: int,
    high: int,
    reaches: Reaches,
    stored: str,
    weights: Numbers | None = None,
) -> Grid:
    """number = code * scale, codes from `low` (below 0) to `high`.

    A reach of 1 puts the largest number of a group on code `low`, whatever its sign: scales may be
    negative. Numbers are finite. Weights, one for each number, have a mean of 1 or 0 in a group.
    """
    top, bottom = groups.max(axis=1), groups.min(axis=1)
    peak = np.where(top > -bottom, top, bottom)  # what has the largest magnitude, with its sign
    unit = groups / _not_zero(peak)[:, None]  # the peak is 1 now, and its scale `reach / low`
    codes = np.empty_like(unit)
    best = np.full_like(peak, -1), np.zeros_like(peak)
    for reach in reaches:
        np.multiply(unit, np.float32(low / reach), out=codes)
        _round(codes, low, high)
        _keep_better(best, _proportional(codes, unit, weights))
    np.divide(unit, _not_zero(best[1])[:, None], out=codes)
    _round(codes, low, high)
    _keep_better(best, _proportional(codes, unit, weights))
    scales = _stored(best[1] * peak, -low, stored)
    np.divide(groups, _not_zero(scales.astype(np.float32))[:, None], out=codes)
    _round(codes, low, high)
    return Grid(codes, scales[:, None])


def from_minimum(
    groups: Numbers, high: int, ends: Ends, stored: str, weights: Numbers | None = None
) -> Grid:
    """number = code * scale + minimum, codes from 0 to `high`.

    Ends of (0, 1) put the smallest number of a group on code 0 and the largest on `high`; (0.1, 1)
    clips the lowest tenth of the distance between them. Numbers and their differences are finite.
    Weights are as those of `symmetric`.
    """
    bottom = groups.min(axis=1)
    extent = groups.max(axis=1) - bottom
    unit = (groups - bottom[:, None]) / _not_zero(extent)[:, None]
    codes = np.empty_like(unit)
    best = np.full_like(extent, -1), np.zeros_like(extent), np.zeros_like(extent)
    for start, end in ends:
        np.subtract(unit, np.float32(start), out=codes)
        np.multiply(codes, np.float32(high / (end - start)), out=codes)
        _round(codes, 0, high)
        _keep_better(best, _straight(codes, unit, weights))
    np.subtract(unit, best[2][:, None], out=codes)
    np.divide(codes, _not_zero(best[1])[:, None], out=codes)
    _round(codes, 0, high)
    _keep_better(best, _straight(codes, unit, weights))
    scales = _stored(best[1] * extent, high, stored)
    minima = narrowed(bottom + best[2] * extent, stored)
    np.subtract(groups, minima.astype(np.float32)[:, None], out=codes)
    np.divide(codes, _not_zero(scales.astype(np.float32))[:, None], out=codes)
    _round(codes, 0, high)
    return Grid(codes, np.stack([scales, minima], axis=1))


def better(one: Grid, other: Grid, groups: Numbers, weights: Numbers) -> Grid:
    """For each group the grid with the smaller sum of weighted squares; `one` if they are equal."""
    smaller = (_loss(other, groups, weights) < _loss(one, groups, weights))[:, None]
    codes = np.where(smaller, other.codes, one.codes)
    return Grid(codes, np.where(smaller, other.terms, one.terms))


def _loss(grid: Grid, groups: Numbers, weights: Numbers) -> Numbers:
    """Of each group, relative to its largest number: squares of that may be too large."""
    wrong = (grid.numbers - groups) / _not_zero(np.abs(groups).max(axis=1))[:, None]
    loss: Numbers = np.einsum("nk,nk->n", wrong * weights, wrong)
    return loss


def _proportional(
    codes: Numbers, unit: Numbers, weights: Numbers | None
) -> tuple[Numbers, Numbers]:
    """The best scale for these codes: what it explains of the sum of squares, and it."""
    weighed = codes if weights is None else codes * weights
    along = np.einsum("nk,nk->n", weighed, unit)
    scale = along / _not_zero(np.einsum("nk,nk->n", weighed, codes))
    return along * scale, scale


def _straight(
    codes: Numbers, unit: Numbers, weights: Numbers | None
) -> tuple[Numbers, Numbers, Numbers]:
    """The best straight line through (code, number): what it explains, its slope and its start."""
    if weights is None:
        mean, level = codes.mean(axis=1), unit.mean(axis=1)
        along = np.einsum("nk,nk->n", codes, unit) - codes.shape[1] * mean * level
        spread = np.einsum("nk,nk->n", codes, codes) - codes.shape[1] * mean * mean
    else:  # one number may have nearly all weight: the rest would be lost in such differences
        mean, level = (codes * weights).mean(axis=1), (unit * weights).mean(axis=1)
        centred = codes - mean[:, None]
        along = np.einsum("nk,nk->n", centred * weights, unit - level[:, None])
        spread = np.einsum("nk,nk->n", centred * weights, centred)
    slope = along / _not_zero(spread)
    return along * slope, slope, level - slope * mean


def _keep_better(best: tuple[Numbers, ...], new: tuple[Numbers, ...]) -> None:
    """Overwrites, in `best`, the groups of which `new` explains more."""
    better = new[0] > best[0]
    for kept, value in zip(best, new, strict=True):
        np.copyto(kept, value, where=better)


def _round(codes: Numbers, low: int, high: int) -> None:
    np.rint(codes, out=codes)
    np.clip(codes, np.float32(low), np.float32(high), out=codes)


def _not_zero(values: Numbers) -> Numbers:
    """What may be divided by: 1 instead of 0."""
    return np.where(values == 0, np.float32(1), values)


def _stored(scales: Numbers, points: int, dtype: str) -> NDArray[Any]:
    """Scales as stored: `points` of one are finite."""
    top = min(float(np.finfo(dtype).max), float(np.finfo(np.float32).max) / (points + 0.01))
    return np.clip(scales, -top, top).astype(dtype)
