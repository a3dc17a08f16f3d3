"""What is asked of a model, in numbers: enough to plan it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen3vl_jax.buckets import PREFILL_CHUNK
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.planned.options import NEEDED, check_forms, leaves_open
from qwen3vl_jax.positions import Grid
from qwen3vl_jax.processing.images import MAX_ASPECT_RATIO, smart_resize
from qwen3vl_jax.processing.media_config import Limits, PixelSettings

# The marks before and after a picture.
MARKS = 2
# No machine answers more at once, and shapes of more are beyond 32 bits.
MOST_ROWS = 1_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """A prompt for each row of a batch, and its answer.

    `prompt_tokens` are those of the text; pictures, (width, height) in pixels, come on top.
    `max_context` is for how many tokens a row has room, by default for no more than these. `frames`
    are pictures that are patches already, each (1, rows, columns); their marks are in the text.
    With `block_slots` the KV cache is in blocks of so many tokens, of which full ones rest on disk;
    without, it may be cut into such where `kv_blocks` says so. `kv` is how it is stored: raw or
    int8. `chunk` tokens of a prompt pass through the layers at once, or as many as are chosen.

    Raises:
        UsageError: a number out of range.
    """

    prompt_tokens: int = 512
    new_tokens: int = 128
    images: tuple[tuple[int, int], ...] = ()
    batch: int = 1
    max_context: int | None = None
    frames: tuple[Grid, ...] = ()
    block_slots: int | None = None
    kv: str = "raw"
    kv_blocks: str = NEEDED
    chunk: int | str = PREFILL_CHUNK

    def __post_init__(self) -> None:
        check_forms(self.kv_blocks, self.chunk)
        for name in ("prompt_tokens", "new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.batch > MOST_ROWS:
            raise UsageError(f"batch must be at most {MOST_ROWS:,}, found {self.batch:,}")
        limits = Limits()
        for width, height in self.images:
            if min(width, height) < 1 or width * height > limits.max_pixels:
                raise UsageError(
                    f"a picture of {width}x{height} pixels is empty or larger than "
                    f"{limits.max_pixels:,} pixels; make it smaller"
                )
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise UsageError(
                    f"a picture of {width}x{height} pixels has an aspect ratio over "
                    f"{MAX_ASPECT_RATIO}"
                )

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk; the usual ones as long as nothing was chosen."""
        return PREFILL_CHUNK if isinstance(self.chunk, str) else self.chunk

    @property
    def decided(self) -> bool:
        """Whether nothing is left to be chosen, unless it does not fit."""
        return not leaves_open(self.kv_blocks, self.chunk)

    @property
    def form_text(self) -> str:
        """How its KV cache lies, and in what chunks its prompt is read."""
        if not self.decided:
            return f"open: --kv-blocks {self.kv_blocks}, --chunk {self.chunk}"
        return form_text(self.block_slots, self.chunk_tokens)

    def grids(self, config: Config) -> list[Grid]:
        """Patches of each picture after it was brought to a size that the model takes."""
        vision, settings = config.vision, PixelSettings()
        grids = list(self.frames)
        for width, height in self.images:
            rows, columns = smart_resize(
                height,
                width,
                side=vision.patch_size * vision.spatial_merge_size,
                min_pixels=settings.min_pixels,
                max_pixels=settings.max_pixels,
            )
            grids.append((1, rows // vision.patch_size, columns // vision.patch_size))
        return grids

    def picture_tokens(self, config: Config) -> int:
        """Vision tokens of one row."""
        patches = sum(rows * columns for _, rows, columns in self.grids(config))
        return patches // config.vision.merged_patches

    def prompt_length(self, config: Config) -> int:
        """All tokens of one row's prompt."""
        return self.prompt_tokens + self.picture_tokens(config) + MARKS * len(self.images)

    def capacity(self, config: Config) -> int:
        """Tokens that the cache of one row has room for.

        Raises:
            UsageError: that is less than the request needs, or more than the model takes.
        """
        needed = self.prompt_length(config) + self.new_tokens
        wanted = needed if self.max_context is None else self.max_context
        most = config.text.max_position_embeddings
        if wanted < needed:
            raise UsageError(
                f"max_context {wanted:,} is less than prompt and answer take, {needed:,} tokens; "
                "raise it, or ask for less"
            )
        if wanted > most:
            raise UsageError(
                f"a context of {wanted:,} tokens is longer than the model takes, {most:,}; "
                "lower --max-context, or ask for less"
            )
        return wanted


def form_text(block_slots: int | None, chunk_tokens: int) -> str:
    """How a KV cache lies, and in what chunks prompts are read."""
    cache = "in one piece" if block_slots is None else f"in blocks of {block_slots:,} tokens"
    return f"KV cache {cache}, prompts in chunks of {chunk_tokens:,} tokens"


def usual_split(tokens: int) -> tuple[int, int]:
    """How many of a context's tokens are prompt, and answer, if nobody says."""
    new = max(1, tokens // 5)
    return max(1, tokens - new), new


def cache_request(
    batch: int, capacity: int, prompt_tokens: int | None, max_context: int | None
) -> Request:
    """What fills a cache of so many tokens: this prompt, all of it text, and its answer."""
    prompt, new = usual_split(capacity)
    if prompt_tokens is not None:
        prompt, new = prompt_tokens, max(1, capacity - prompt_tokens)
    return Request(prompt, new, batch=batch, max_context=max_context)


def request_of(
    config: Config, inputs: Mapping[str, Any], new_tokens: int, **limits: Any
) -> Request:
    """What a processor's arrays and an answer of so many tokens ask for.

    Args:
        limits: `max_context`, `kv`, `kv_blocks` and `chunk` of `Request`.
    """
    rows, tokens = np.asarray(inputs["input_ids"]).shape
    frames = tuple(
        (1, int(height), int(width))
        for name in ("image_grid_thw", "video_grid_thw")
        for groups, height, width in np.asarray(inputs.get(name, np.zeros((0, 3), int)))
        for _ in range(int(groups))
    )
    pictures = sum(height * width for _, height, width in frames) // config.vision.merged_patches
    tokens = max(1, tokens - pictures // rows)
    return Request(tokens, new_tokens, batch=rows, frames=frames, **limits)
