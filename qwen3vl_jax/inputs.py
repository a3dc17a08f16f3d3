"""From the arrays that a processor returns to what the steps read. NumPy, on the host."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from qwen3vl_jax.buckets import bucket
from qwen3vl_jax.cache import KVCache
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.frames import Piece, check_grids, pieces
from qwen3vl_jax.network import Batch, Chunk
from qwen3vl_jax.positions import IMAGE, TEXT, VIDEO, Grid, rope_positions, token_kinds

INPUT_NAMES = (
    "input_ids",
    "attention_mask",
    "mm_token_type_ids",
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
)
SMALLEST_TOKENS = 16
SMALLEST_FEATURES = 16
NO_FEATURE = np.iinfo(np.int32).max


def prepare(
    config: Config,
    inputs: Mapping[str, Any],
    *,
    start: Int[np.ndarray, " batch"] | None = None,
    pictures: bool = True,
) -> tuple[Batch, Int[np.ndarray, " batch"]]:
    """Checks a processor's arrays, and works out positions and the way of every picture.

    Args:
        inputs: arrays named as in transformers; `attention_mask` defaults to all ones.
        start: first rotary position of every row, when earlier tokens are in a cache.
        pictures: false leaves the pixels alone, when their features are at hand.

    Returns:
        The batch (unpadded), and the next free rotary position of every row.

    Raises:
        UsageError: arrays that do not belong together.
    """
    unknown = sorted(set(inputs) - set(INPUT_NAMES))
    if unknown:
        raise UsageError(f"inputs: {unknown[0]!r} is not one of {', '.join(INPUT_NAMES)}")
    ids = _ids(inputs, config)
    mask = _mask(inputs, ids)
    kinds = _kinds(inputs, ids, mask, config)
    images = _grids(inputs, "image_grid_thw", "pixel_values")
    videos = _grids(inputs, "video_grid_thw", "pixel_values_videos")
    first = np.zeros(len(ids), np.int32) if start is None else start
    rows = _feature_rows(kinds, mask, _token_count(images, config), _token_count(videos, config))
    merge = config.vision.spatial_merge_size
    positions, following = rope_positions(kinds, mask, merge, images, videos, first)
    chunk = Chunk(input_ids=ids, valid=mask, positions=positions, feature_rows=rows)
    shown = tuple(picture_pieces(config, inputs)) if pictures else ()
    return Batch(chunk, shown, feature_count(config, inputs)), following


def feature_count(config: Config, inputs: Mapping[str, Any]) -> int:
    """Vision tokens of all pictures, rounded up to a bucket; 0 without pictures."""
    grids = _grids(inputs, "image_grid_thw", "pixel_values")
    grids = grids + _grids(inputs, "video_grid_thw", "pixel_values_videos")
    return bucket(_token_count(grids, config), SMALLEST_FEATURES) if grids else 0


def picture_pieces(config: Config, inputs: Mapping[str, Any]) -> Iterator[Piece]:
    """All frames of all images, then of all videos; only one piece is copied at a time."""
    first = 0
    for grid_name, name in (
        ("image_grid_thw", "pixel_values"),
        ("video_grid_thw", "pixel_values_videos"),
    ):
        grids = _grids(inputs, grid_name, name)
        if grids:
            pixels = np.asarray(inputs[name])
            check_grids(pixels, grids, config.vision)
            yield from pieces(pixels, grids, config.vision, first_row=first)
        first += _token_count(grids, config)


def cut(chunk: Chunk, first: int, last: int, tokens: int) -> Chunk:
    """Tokens `first` to `last` of `chunk`, padded on the right to `tokens` of them."""
    more = ((0, 0), (0, tokens - (last - first)))
    here = slice(first, last)
    return Chunk(
        input_ids=np.pad(chunk.input_ids[:, here], more),
        valid=np.pad(chunk.valid[:, here], more),
        positions=np.pad(chunk.positions[:, :, here], ((0, 0), *more)),
        feature_rows=np.pad(chunk.feature_rows[:, here], more, constant_values=NO_FEATURE),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Tokens `first` to `end` of a prompt, which pass through the layers padded to `tokens`."""

    first: int
    end: int
    tokens: int

    def ends(self, chunk: Chunk) -> Bool[np.ndarray, " batch"]:
        """Which rows have their last real token here."""
        last = last_real(chunk)
        return (last >= self.first) & (last < self.end)


def parts(count: int, cache: KVCache, chunk_tokens: int) -> Iterator[Part]:
    """How a prompt of `count` tokens is cut, on top of what the cache has.

    No part crosses the border of a block; all are padded to a bucket where there is room for that.

    Raises:
        UsageError: a chunk has no tokens.
    """
    if chunk_tokens < 1:
        raise UsageError(f"chunk_tokens must be at least 1, found {chunk_tokens}")
    first = 0
    while first < count:
        length = cache.length + first
        room, slots = cache.capacity - length, cache.block_slots
        room = room if slots is None else min(room, slots - length % slots)
        tokens = min(chunk_tokens, room, count - first)
        fitting = bucket(tokens, SMALLEST_TOKENS) if tokens > 1 else 1
        yield Part(first, first + tokens, min(fitting, room))
        first += tokens


def last_real(tokens: Chunk) -> Int[np.ndarray, " batch"]:
    """The column of each row's last real token."""
    columns = tokens.valid.shape[1]
    return (columns - 1 - np.argmax(tokens.valid[:, ::-1], axis=1)).astype(np.int32)


def _ids(inputs: Mapping[str, Any], config: Config) -> Int[np.ndarray, "batch tokens"]:
    ids = np.asarray(inputs.get("input_ids"))
    if ids.ndim != 2 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
        raise UsageError(
            f"input_ids: whole numbers [batch, tokens] wanted, found {ids.dtype} {ids.shape}"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= config.text.vocab_size:
        raise UsageError(
            f"input_ids: tokens from {low} to {high} found, 0 to {config.text.vocab_size - 1} exist"
        )
    return ids.astype(np.int32)


def _mask(inputs: Mapping[str, Any], ids: np.ndarray) -> Bool[np.ndarray, "batch tokens"]:
    if inputs.get("attention_mask") is None:
        return np.ones(ids.shape, bool)
    mask = np.asarray(inputs["attention_mask"])
    if mask.shape != ids.shape or not np.isin(mask, (0, 1)).all():
        raise UsageError(f"attention_mask: zeros and ones {ids.shape} wanted, found {mask.shape}")
    if not mask.any(axis=1).all():
        raise UsageError("attention_mask: a row has no token at all; drop it")
    return mask.astype(bool)


def _kinds(
    inputs: Mapping[str, Any], ids: np.ndarray, mask: np.ndarray, config: Config
) -> Int[np.ndarray, "batch tokens"]:
    kinds = np.where(mask, token_kinds(ids, config), TEXT)
    given = inputs.get("mm_token_type_ids")
    if given is not None and not np.array_equal(np.where(mask, np.asarray(given), TEXT), kinds):
        raise UsageError("mm_token_type_ids: does not agree with the placeholders in input_ids")
    return kinds


def _grids(inputs: Mapping[str, Any], name: str, pixels: str) -> list[Grid]:
    if (inputs.get(name) is None) != (inputs.get(pixels) is None):
        raise UsageError(f"inputs: {name} and {pixels} come together, found only one")
    if inputs.get(name) is None:
        return []
    grids = np.asarray(inputs[name])
    if grids.ndim != 2 or grids.shape[1] != 3:
        raise UsageError(f"{name}: [pictures, 3] wanted, found {grids.shape}")
    return [(int(t), int(h), int(w)) for t, h, w in grids]


def _token_count(grids: list[Grid], config: Config) -> int:
    return sum(t * h * w for t, h, w in grids) // config.vision.merged_patches


def _feature_rows(
    kinds: np.ndarray, mask: np.ndarray, images: int, videos: int
) -> Int[np.ndarray, "batch tokens"]:
    """Rows in reading order; the tokens of all videos come after those of all images."""
    rows = np.full(kinds.shape, NO_FEATURE, np.int32)
    for name, kind, first, count in (("image", IMAGE, 0, images), ("video", VIDEO, images, videos)):
        where = (kinds == kind) & mask
        if where.sum() != count:
            raise UsageError(
                f"input_ids: {where.sum()} {name} placeholders found, {count} wanted by the grids"
            )
        rows[where] = np.arange(first, first + count, dtype=np.int32)
    return rows
