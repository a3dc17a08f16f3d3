"""Where every token stands on the time, height and width axis. NumPy, on the host.

Source: transformers 5.23, `Qwen3VLModel.get_rope_index`.
"""

import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import UsageError

TEXT, IMAGE, VIDEO = 0, 1, 2
Grid = tuple[int, int, int]  # frame groups, rows, columns; in patches


def token_kinds(
    input_ids: Int[np.ndarray, "batch tokens"], config: Config
) -> Int[np.ndarray, "batch tokens"]:
    """0 for text, 1 for an image placeholder, 2 for a video placeholder."""
    image = input_ids == config.image_token_id
    video = input_ids == config.video_token_id
    return np.where(image, IMAGE, np.where(video, VIDEO, TEXT)).astype(np.int32)


def rope_positions(
    kinds: Int[np.ndarray, "batch tokens"],
    mask: Bool[np.ndarray, "batch tokens"],
    merge: int,
    image_grids: list[Grid],
    video_grids: list[Grid],
    start: Int[np.ndarray, " batch"],
) -> tuple[Int[np.ndarray, "3 batch tokens"], Int[np.ndarray, " batch"]]:
    """Positions of a batch, 0 at padding, and the next free position of every row.

    Args:
        kinds: as from `token_kinds`.
        mask: true for real tokens.
        merge: patches per token along each side.
        image_grids, video_grids: in the order in which the placeholders appear, row by row.
        start: the first position of every row: 0, or where an earlier turn ended.

    Raises:
        UsageError: placeholders and grids do not match.
    """
    positions = np.zeros((3, *kinds.shape), np.int32)
    following = np.array(start, np.int32)
    images = iter(image_grids)
    # Timestamps stand between the frame groups of a video, so each group is a picture of its own.
    frames = iter([(1, h, w) for t, h, w in video_grids for _ in range(t)])
    for row in range(kinds.shape[0]):
        kept = np.flatnonzero(mask[row])
        placed, following[row] = _place_row(
            kinds[row, kept], merge, images, frames, int(start[row])
        )
        positions[:, row, kept] = placed
    for name, left in (("image", images), ("video", frames)):
        if next(left, None) is not None:
            raise UsageError(
                f"{name} grids: more pictures or frames than placeholders in input_ids"
            )
    return positions, following


def _place_row(
    kinds: Int[np.ndarray, " tokens"],
    merge: int,
    images: Iterator[Grid],
    frames: Iterator[Grid],
    start: int,
) -> tuple[Int[np.ndarray, "3 tokens"], int]:
    parts = [np.zeros((3, 0), np.int32)]
    current = start
    for kind, run in itertools.groupby(kinds.tolist()):
        length = sum(1 for _ in run)
        while length > 0:
            if kind == TEXT:
                parts.append(np.tile(np.arange(length, dtype=np.int32) + current, (3, 1)))
                current, length = current + length, 0
                continue
            grid = next(images if kind == IMAGE else frames, None)
            if grid is None:
                raise UsageError("input_ids: more picture placeholders than grids; pass all grids")
            part = _picture_positions(grid, merge, current)
            if part.shape[1] > length:
                raise UsageError(
                    f"input_ids: a picture of {part.shape[1]} tokens has {length} placeholders left"
                )
            parts.append(part)
            current += max(grid[1], grid[2]) // merge
            length -= part.shape[1]
    return np.concatenate(parts, axis=1), current


def _picture_positions(grid: Grid, merge: int, current: int) -> Int[np.ndarray, "3 tokens"]:
    frames, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
    where = np.indices((frames, rows, columns), np.int32).reshape(3, -1)
    return where + np.int32(current)
