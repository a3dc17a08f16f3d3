"""Chat messages to the arrays that the model takes, and token ids back to text. No torch."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Int64, UInt8

from qwen3vl_jax.errors import ConfigError, PromptError, UsageError
from qwen3vl_jax.processing.conversations import Conversation, ImagePart, parse_batch
from qwen3vl_jax.processing.images import grid_of, patches_of, prepare_image
from qwen3vl_jax.processing.media_config import (
    Limits,
    PixelSettings,
    VideoSettings,
    load_image_settings,
    load_video_settings,
)
from qwen3vl_jax.processing.prompts import (
    IMAGE,
    VIDEO,
    VIDEO_PROMPTS,
    ControlTokens,
    Marked,
    Marks,
    check_media,
    encode_pieces,
    marked_values,
    read_marks,
    split_typed,
    with_media_tokens,
    with_videos,
)
from qwen3vl_jax.processing.templates import ChatTemplate, load_template, render
from qwen3vl_jax.processing.tokenizer import Tokenizer
from qwen3vl_jax.processing.videos import Clip, load_video


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One conversation, ready: its token ids, and the frames of its media."""

    ids: Int64[np.ndarray, " tokens"]
    images: tuple[UInt8[np.ndarray, "..."], ...]
    videos: tuple[Clip, ...]


@final
class Processor:
    """Tokenizer, chat template and media settings of one checkpoint directory."""

    __slots__ = (
        "_control",
        "_limits",
        "_template",
        "_video_prompt",
        "image_settings",
        "tokenizer",
        "video_settings",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        image_settings: PixelSettings,
        video_settings: VideoSettings,
        *,
        video_prompt: str = "legacy",
        limits: Limits | None = None,
    ) -> None:
        """Of its parts; `from_pretrained` is the usual way."""
        if video_prompt not in VIDEO_PROMPTS:
            raise UsageError(f"video_prompt is {video_prompt!r}; wanted one of {VIDEO_PROMPTS}")
        self.tokenizer = tokenizer
        self.image_settings = image_settings
        self.video_settings = video_settings
        self._template = template
        self._video_prompt = video_prompt
        self._limits = limits or Limits()
        self._control = ControlTokens.of(tokenizer, template.source)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        video_prompt: str = "legacy",
        limits: Limits | None = None,
    ) -> "Processor":
        """Read tokenizer, chat template and preprocessor files of a checkpoint directory.

        Args:
            path: a local directory. Without preprocessor files the released models' values hold.
            min_pixels: least pixels of a resized picture; the checkpoint's value if None.
            max_pixels: most pixels of a resized picture; the checkpoint's value if None.
            video_prompt: "legacy", the form that the released models were made with (transformers
                4.57), or "hf>=5.10", which keeps one more pair of tokens around each video.
            limits: caps on sizes of what is read.

        Raises:
            PromptError: tokenizer or chat template missing or malformed.
            ConfigError: a preprocessor setting that is out of range or not computed here.
            UsageError: an argument out of range.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise PromptError(f"{str(path)!a} is not a directory; pass a local checkpoint")
        settings = load_image_settings(directory)
        return cls(
            Tokenizer.from_pretrained(directory),
            load_template(directory),
            with_pixel_limits(settings, min_pixels, max_pixels),
            load_video_settings(directory),
            video_prompt=video_prompt,
            limits=limits,
        )

    def __call__(
        self,
        messages: Sequence[Any],
        *,
        padding_side: str = "left",
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        add_vision_id: bool = False,
    ) -> dict[str, np.ndarray]:
        """Arrays for the model, of one conversation or a list of conversations (a padded batch).

        Args:
            messages: mappings with "role" and "content": a text, or a list of parts
                `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}` and
                `{"type": "video", "video": ...}` (options: `ImagePart`, `VideoPart`).
            padding_side: where shorter rows of a batch are filled up.
            add_generation_prompt: open the assistant's turn at the end; by default yes, unless
                `continue_final_message`.
            continue_final_message: leave the last message open, so that the answer goes on with it.
            add_vision_id: number the media in the text ("Picture 1: ").

        Returns:
            `input_ids`, `attention_mask`, `mm_token_type_ids` (0 text, 1 picture, 2 video), int64
            [batch, tokens]; with pictures `pixel_values` float32 [patches, values] and
            `image_grid_thw` int64 [pictures, 3]; with videos `pixel_values_videos` and
            `video_grid_thw`.

        Raises:
            PromptError: a conversation that cannot be turned into tokens.
            MediaError: a picture or video that cannot be read.
            UsageError: arguments that contradict each other.
        """
        if padding_side not in ("left", "right"):
            raise UsageError(f"padding_side is {padding_side!r}; wanted 'left' or 'right'")
        if add_generation_prompt and continue_final_message:
            raise UsageError("add_generation_prompt and continue_final_message exclude each other")
        settings = {
            "add_generation_prompt": not continue_final_message
            if add_generation_prompt is None
            else add_generation_prompt,
            "continue_final_message": continue_final_message,
            "add_vision_id": add_vision_id,
        }
        rows = [self._row(talk, settings) for talk in parse_batch(messages)]
        return self._arrays(rows, padding_side)

    def continuation(
        self,
        messages: Sequence[Any],
        answer_ids: Iterable[int],
        new_messages: Sequence[Any],
        *,
        held: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Arrays of a chat's next turn alone, for a cache that holds everything before it.

        The ids that were fed for `messages`, then the `held` first ids of the answer, then the ids
        returned here are the ids of the whole conversation. Only media of `new_messages` are read.

        Args:
            messages: the conversation so far, up to the question that was answered.
            answer_ids: the answer's ids, with or without its end token.
            new_messages: the next message or messages, usually one of the user.
            held: how many ids of the answer the cache holds; by default all but the end token.

        Raises:
            PromptError: the template does not simply append (it may drop earlier thoughts): then
                process the whole conversation again.
        """
        ids = [int(number) for number in answer_ids]
        ends = (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        if ids and ids[-1] in ends:
            ids.pop()
        held = len(ids) if held is None else held
        if not 0 <= held <= len(ids):
            raise UsageError(f"held is {held}, but the answer has {len(ids)} ids before its end")
        answer = self.tokenizer.decode(ids)
        before = self._single(messages)
        new = self._single(new_messages)
        reply = {"role": "assistant", "content": answer}
        whole = Conversation([*before.messages, reply, *new.messages], (), ())
        start = self._rendered(before.messages, {"add_generation_prompt": True}).text + answer
        marked = self._rendered(whole.messages, {"add_generation_prompt": True})
        if not marked.text.startswith(start):
            raise PromptError(
                "this chat template rewrites earlier turns; process the whole conversation again"
            )
        row = self._finished(marked.after(len(start)), new)
        pending = np.array(ids[held:], np.int64)
        row = dataclasses.replace(row, ids=np.concatenate([pending, row.ids]))
        return self._arrays([row], "left")

    def decode(self, token_ids: object, skip_special_tokens: bool = True) -> str:
        """The text of one sequence of token ids."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, sequences: Iterable[object], skip_special_tokens: bool = True
    ) -> list[str]:
        """The text of every sequence of token ids."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens)

    def _single(self, messages: Sequence[Any]) -> Conversation:
        talks = parse_batch(messages)
        if len(talks) != 1:
            raise UsageError("a continuation is of one conversation, not of a batch")
        return talks[0]

    def _row(self, talk: Conversation, settings: dict[str, bool]) -> Row:
        return self._finished(self._rendered(talk.messages, settings), talk)

    def _rendered(self, messages: list[dict[str, Any]], settings: dict[str, bool]) -> Marked:
        texts = list(texts_of(messages))
        characters = sum(map(len, texts))
        if characters > self._limits.max_text_characters:
            raise PromptError(
                f"{characters:,} characters of text, "
                f"but {self._limits.max_text_characters:,} are allowed"
            )
        marks = Marks.for_text(self._template.source, *texts)
        plain = marked_values(messages, self._control, marks)
        return read_marks(render(self._template, plain, **settings), marks)

    def _finished(self, marked: Marked, talk: Conversation) -> Row:
        pieces = split_typed(marked, self._control)
        check_media(pieces, len(talk.images), len(talk.videos))
        budget = TokenBudget(min(self._limits.max_prompt_tokens, self.tokenizer.model_max_length))
        images = []
        for part in talk.images:
            images.append(prepare_image(part.source, self._of(part), self._limits))
            budget.spend(token_count(images[-1], self.image_settings))
        clips = []
        for video in talk.videos:
            clips.append(load_video(video, self.video_settings, self._limits))
            budget.spend(token_count(clips[-1].frames, self.video_settings.pixels))
        pieces = with_videos(pieces, [clip.timestamps for clip in clips], self._video_prompt)
        image_tokens = [token_count(image, self.image_settings) for image in images]
        group_tokens = [
            token_count(clip.frames, self.video_settings.pixels) // len(clip.timestamps)
            for clip in clips
            for _ in clip.timestamps
        ]
        places = encode_pieces(pieces, self.tokenizer, self._control)
        budget.spend(len(places) - len(image_tokens) - len(group_tokens))
        ids = with_media_tokens(places, self._control, image_tokens, group_tokens)
        return Row(ids, tuple(images), tuple(clips))

    def _of(self, part: ImagePart) -> PixelSettings:
        return with_pixel_limits(self.image_settings, part.min_pixels, part.max_pixels)

    def _arrays(self, rows: list[Row], padding_side: str) -> dict[str, np.ndarray]:
        ids, mask = padded([row.ids for row in rows], self.tokenizer.pad_token_id, padding_side)
        kinds = 1 * (ids == self._control.ids[IMAGE]) + 2 * (ids == self._control.ids[VIDEO])
        out = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}
        images = [image for row in rows for image in row.images]
        if images:
            values, grids = patches_of(images, self.image_settings)
            out |= {"pixel_values": values, "image_grid_thw": grids}
        clips = [clip.frames for row in rows for clip in row.videos]
        if clips:
            values, grids = patches_of(clips, self.video_settings.pixels)
            out |= {"pixel_values_videos": values, "video_grid_thw": grids}
        return out


@dataclasses.dataclass(slots=True)
class TokenBudget:
    """What one conversation may still use of the model's context."""

    limit: int
    used: int = 0

    def spend(self, tokens: int) -> None:
        """Count tokens; PromptError when they are more than the limit."""
        self.used += tokens
        if self.used > self.limit:
            raise PromptError(
                f"the prompt has at least {self.used:,} tokens, but the model's context is "
                f"{self.limit:,}; lower max_pixels, or give fewer pictures or frames"
            )


def with_pixel_limits(
    settings: PixelSettings, min_pixels: int | None, max_pixels: int | None
) -> PixelSettings:
    """Settings with other limits. One given limit moves the other if they would contradict."""
    low = settings.min_pixels if min_pixels is None else min_pixels
    high = settings.max_pixels if max_pixels is None else max_pixels
    if min_pixels is None:
        low = min(low, high)
    elif max_pixels is None:
        high = max(low, high)
    try:
        return dataclasses.replace(settings, min_pixels=low, max_pixels=high)
    except ConfigError as error:
        raise UsageError(str(error)) from error


def token_count(clip: UInt8[np.ndarray, "frames height width 3"], settings: PixelSettings) -> int:
    """Tokens of a clip: its patches by the size of a merge block."""
    time, height, width = grid_of(clip, settings)
    return time * height * width // settings.merge_size**2


def texts_of(value: object) -> Iterable[str]:
    """All texts inside plain JSON values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_of(item)


def padded(
    rows: Sequence[Int64[np.ndarray, "..."]], pad_token_id: int, side: str
) -> tuple[Int64[np.ndarray, "batch tokens"], Int64[np.ndarray, "batch tokens"]]:
    """Rows of one length, and the mask of what is not padding."""
    length = max(len(row) for row in rows)
    ids = np.full((len(rows), length), pad_token_id, np.int64)
    mask = np.zeros((len(rows), length), np.int64)
    for index, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[index, place] = row
        mask[index, place] = 1
    return ids, mask
