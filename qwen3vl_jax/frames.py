"""Which frames go through the vision tower together, and what the host knows about their patches.
NumPy.

Frames of one size form a piece; patches are padded to a bucket, so that a new picture size rarely
means a new program.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from qwen3vl_jax.arrays import AnyLeaf
from qwen3vl_jax.buckets import bucket
from qwen3vl_jax.config import VisionConfig
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.positions import Grid

PIECE_PATCHES = 4096  # frames are stacked up to this many patches
SMALLEST_BUCKET = 64


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["patches", "taps", "shares", "rows_columns", "valid", "token_rows"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Some equally sized frames, ready for `vision.encode_frames`.

    `patches` are in merge-block order, padded at the end, where `valid` is false; `taps` and
    `shares` say where to read the position table, `rows_columns` where a patch is in its frame.
    `token_rows[f, j]` is the row of all features that token j of frame f belongs to; past the end
    for padding.
    """

    patches: Float[AnyLeaf, "F P values"]
    taps: Int[AnyLeaf, "P 4"]
    shares: Float[AnyLeaf, "P 4"]
    rows_columns: Int[AnyLeaf, "P 2"]
    valid: Bool[AnyLeaf, " P"]
    token_rows: Int[AnyLeaf, "F tokens"]


def block_order(rows: int, columns: int, merge: int) -> Int[np.ndarray, "patches 2"]:
    """(row, column) of every patch of a frame; the patches that become one token are neighbours."""
    place = np.indices((rows, columns), np.int32)
    blocks = place.reshape(2, rows // merge, merge, columns // merge, merge)
    return blocks.transpose(1, 3, 2, 4, 0).reshape(-1, 2)


def table_taps(
    place: Int[np.ndarray, "patches 2"], rows: int, columns: int, side: int
) -> tuple[Int[np.ndarray, "patches 4"], Float[np.ndarray, "patches 4"]]:
    """Rows of the position table around every patch, and their bilinear shares (float32).

    The corners of the frame meet the corners of the table (align_corners).

    Source: transformers 5.23, `vision_utils.py`, `get_vision_interpolation_indices_and_weights`.
    """

    def along(index: Int[np.ndarray, " patches"], count: int) -> tuple[np.ndarray, ...]:
        where = index.astype(np.float32) * np.float32(side - 1) / np.float32(max(count - 1, 1))
        low = where.astype(np.int32)
        return low, np.minimum(low + 1, side - 1), where - low.astype(np.float32)

    top, bottom, down = along(place[:, 0], rows)
    left, right, across = along(place[:, 1], columns)
    up, back = np.float32(1) - down, np.float32(1) - across
    taps = [top * side + left, top * side + right, bottom * side + left, bottom * side + right]
    shares = [up * back, up * across, down * back, down * across]
    return np.stack(taps, axis=1).astype(np.int32), np.stack(shares, axis=1).astype(np.float32)


def check_grids(
    pixels: Float[np.ndarray, "patches values"], grids: list[Grid], config: VisionConfig
) -> None:
    """Raises UsageError when pixel rows and grids do not belong together."""
    merge = config.spatial_merge_size
    for frames, rows, columns in grids:
        if min(frames, rows, columns) < 1 or rows % merge or columns % merge:
            raise UsageError(
                f"grid {(frames, rows, columns)}: rows and columns must be positive multiples "
                f"of {merge}"
            )
    wanted = sum(frames * rows * columns for frames, rows, columns in grids)
    if pixels.ndim != 2 or pixels.shape != (wanted, config.patch_values):
        raise UsageError(
            f"pixels: shape {pixels.shape} found, ({wanted}, {config.patch_values}) wanted by "
            "the grids"
        )


def pieces(
    pixels: Float[np.ndarray, "patches values"],
    grids: list[Grid],
    config: VisionConfig,
    *,
    first_row: int = 0,
) -> Iterator[Piece]:
    """All frames of all grids, equally sized ones together; tokens keep the order of the grids.

    `first_row` is the row of the first token among all features.
    """
    by_size: dict[tuple[int, int], list[int]] = {}
    first = 0
    for frames, rows, columns in grids:
        starts = by_size.setdefault((rows, columns), [])
        starts.extend(first + frame * rows * columns for frame in range(frames))
        first += frames * rows * columns
    for (rows, columns), starts in by_size.items():
        while starts:
            count = _stacked(len(starts), rows * columns)
            yield _piece(pixels, starts[:count], rows, columns, config, first_row)
            starts = starts[count:]


def _stacked(frames: int, patches: int) -> int:
    """Frames of the next piece: a power of two, so that a video needs few different programs."""
    fitting = max(1, min(frames, PIECE_PATCHES // patches))
    return 1 << (fitting.bit_length() - 1)


def _piece(
    pixels: Float[np.ndarray, "patches values"],
    starts: list[int],
    rows: int,
    columns: int,
    config: VisionConfig,
    first_row: int,
) -> Piece:
    count, merged = rows * columns, config.merged_patches
    # A multiple of the patches of a token, so that padding never shares a token with pixels.
    length = -(-bucket(count, SMALLEST_BUCKET) // merged) * merged
    patches = np.zeros((len(starts), length, config.patch_values), pixels.dtype)
    token_rows = np.full((len(starts), length // merged), np.iinfo(np.int32).max, np.int32)
    for frame, start in enumerate(starts):
        patches[frame, :count] = pixels[start : start + count]
        first = first_row + start // merged
        token_rows[frame, : count // merged] = np.arange(first, first + count // merged)
    place = block_order(rows, columns, config.spatial_merge_size)
    taps, shares = table_taps(place, rows, columns, config.table_side)
    padding = ((0, length - count), (0, 0))
    return Piece(
        patches=patches,
        taps=np.pad(taps, padding),
        shares=np.pad(shares, padding),
        rows_columns=np.pad(place, padding),
        valid=np.arange(length) < count,
        token_rows=token_rows,
    )
