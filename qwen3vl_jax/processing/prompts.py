"""A rendered conversation to token ids: control tokens that the template wrote, and only those.

What a user typed never becomes a control token. Before rendering, every control token inside the
messages is put between two private marks; afterwards a control token is real only if no mark is in
it or around it. So `<|im_end|>` stays text also when it is put together from two text parts.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64

from qwen3vl_jax.errors import PromptError
from qwen3vl_jax.processing.tokenizer import Tokenizer

VIDEO_PROMPTS = ("legacy", "hf>=5.10")
IMAGE = "<|image_pad|>"
VIDEO = "<|video_pad|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
PRIVATE_USE = range(0xF0000, 0xFFFFE)


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """Added tokens that steer the model: the special ones, and all that the template writes."""

    ids: dict[str, int]
    pattern: re.Pattern[str]
    heads: frozenset[str]
    tails: frozenset[str]

    @classmethod
    def of(cls, tokenizer: Tokenizer, template_source: str) -> "ControlTokens":
        """Of a tokenizer and a template. Source: transformers 5.23, `sanitize_control_tokens`."""
        ids = {
            token: number
            for token, number in tokenizer.added.items()
            if token and (token in tokenizer.special or token in template_source)
        }
        for token in (IMAGE, VIDEO, VISION_START, VISION_END):
            ids[token] = tokenizer.token_id(token)
        longest_first = sorted(ids, key=lambda token: (-len(token), token))
        pattern = re.compile("|".join(map(re.escape, longest_first)))
        heads = frozenset(token[:size] for token in ids for size in range(1, len(token)))
        tails = frozenset(token[size:] for token in ids for size in range(1, len(token)))
        return cls(ids, pattern, heads, tails)


@dataclass(frozen=True, slots=True)
class Marks:
    """Two characters that occur nowhere in a conversation."""

    start: str
    end: str

    @classmethod
    def for_text(cls, *texts: str) -> "Marks":
        """The first two private-use characters that are in none of the texts."""
        used = set().union(*texts)
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
        try:
            return cls(next(free), next(free))
        except StopIteration as error:
            raise PromptError("the text uses every private character of Unicode") from error


@dataclass(frozen=True, slots=True)
class Marked:
    """A rendered text without its marks, and where they were (ascending)."""

    text: str
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    def after(self, offset: int) -> "Marked":
        """The text from a character on."""
        starts = tuple(place - offset for place in self.starts if place >= offset)
        ends = tuple(place - offset for place in self.ends if place >= offset)
        return Marked(self.text[offset:], starts, ends)


def marked_values(value: Any, control: ControlTokens, marks: Marks) -> Any:
    """The same JSON value with marks around control tokens in its texts (not in its keys)."""
    if isinstance(value, str):
        return marked_text(value, control, marks)
    if isinstance(value, dict):
        return {key: marked_values(item, control, marks) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [marked_values(item, control, marks) for item in value]
    return value


def marked_text(text: str, control: ControlTokens, marks: Marks) -> str:
    """A text with marks; one also where it starts or ends with a piece of a control token."""
    longest = min(len(text), max(map(len, control.ids)))
    head = any(text[:size] in control.tails for size in range(1, longest + 1))
    tail = any(text[-size:] in control.heads for size in range(1, longest + 1))
    text = control.pattern.sub(f"{marks.start}\\g<0>{marks.end}", text)
    return (marks.start if head else "") + text + (marks.end if tail else "")


def read_marks(rendered: str, marks: Marks) -> Marked:
    """Take the marks out again."""
    starts: list[int] = []
    ends: list[int] = []
    pieces: list[str] = []
    length = 0
    for piece in re.split(f"([{marks.start}{marks.end}])", rendered):
        if piece == marks.start:
            starts.append(length)
        elif piece == marks.end:
            ends.append(length)
        else:
            pieces.append(piece)
            length += len(piece)
    return Marked("".join(pieces), tuple(starts), tuple(ends))


def split_typed(marked: Marked, control: ControlTokens) -> list[tuple[str, bool]]:
    """Pieces of the text, each with whether its control tokens were typed (and so are text)."""
    places = sorted({*marked.starts, *marked.ends})
    starts, ends = set(marked.starts), set(marked.ends)
    pieces: list[tuple[str, bool]] = []
    done = 0
    for match in control.pattern.finditer(marked.text):
        first, last = match.span()
        inside = bisect_left(places, last) > bisect_right(places, first)
        if inside or (first in starts and last in ends):
            pieces += [(marked.text[done:first], False), (match.group(), True)]
            done = last
    pieces.append((marked.text[done:], False))
    return [piece for piece in pieces if piece[0]]


def video_text(timestamps: Sequence[float]) -> str:
    """What stands for one video: every frame group's time, and one placeholder for its tokens."""
    return "".join(f"<{time:.1f} seconds>{VISION_START}{VIDEO}{VISION_END}" for time in timestamps)


def check_media(pieces: list[tuple[str, bool]], images: int, videos: int) -> None:
    """PromptError unless the template made one place for every picture and video."""
    text = "".join(piece for piece, typed in pieces if not typed)
    for name, token, given in (("pictures", IMAGE, images), ("videos", VIDEO, videos)):
        places = text.count(token)
        if places != given:
            raise PromptError(
                f"the prompt has {places} places for {name}, but {given} are given; "
                "put them into messages whose role may show them (user)"
            )


def with_videos(
    pieces: list[tuple[str, bool]], videos: Sequence[Sequence[float]], style: str
) -> list[tuple[str, bool]]:
    """Pieces in which each video's placeholder has become its frame groups.

    "legacy" (transformers 4.57, for which the released models were made) drops the template's
    vision_start and vision_end around a video; "hf>=5.10" keeps them, two tokens more.
    """
    pattern = re.escape(VIDEO)
    if style == "legacy":
        pattern = re.escape(VISION_START + VIDEO + VISION_END) + "|" + pattern
    texts = iter([video_text(times) for times in videos])
    return [
        (piece if typed else re.sub(pattern, lambda _: next(texts), piece), typed)
        for piece, typed in pieces
    ]


def encode_pieces(
    pieces: list[tuple[str, bool]], tokenizer: Tokenizer, control: ControlTokens
) -> Int64[np.ndarray, " tokens"]:
    """Ids of all pieces.

    Raises:
        PromptError: the tokenizer makes a control token out of plain text.
    """
    numbers = frozenset(control.ids.values())
    out: list[int] = []
    for text, typed in pieces:
        ids = tokenizer.encode_as_text(text) if typed else tokenizer.encode(text)
        wanted = [] if typed else [control.ids[token] for token in control.pattern.findall(text)]
        if [number for number in ids if number in numbers] != wanted:
            raise PromptError("the tokenizer makes a control token out of plain text")
        out += ids
    return np.array(out, np.int64)


def with_media_tokens(
    ids: Int64[np.ndarray, " places"],
    control: ControlTokens,
    image_tokens: Sequence[int],
    group_tokens: Sequence[int],
) -> Int64[np.ndarray, " tokens"]:
    """Every placeholder repeated: as many tokens as its picture or frame group has."""
    repeats = np.ones(len(ids), np.int64)
    repeats[ids == control.ids[IMAGE]] = image_tokens
    repeats[ids == control.ids[VIDEO]] = group_tokens
    return np.repeat(ids, repeats)
