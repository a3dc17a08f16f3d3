"""Chat messages as users write them, to plain messages for a template and the media beside them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3vl_jax.errors import PromptError

ROLES = ("system", "user", "assistant", "tool")
OTHER_KEYS = frozenset({"tool_calls", "tool_call_id", "name", "reasoning_content"})
IMAGE_KEYS = ("image", "image_url", "path", "url", "base64")
VIDEO_KEYS = ("video", "video_url", "path", "url")
IMAGE_OPTIONS = frozenset({"min_pixels", "max_pixels"})
VIDEO_OPTIONS = frozenset(
    {"fps", "sample_fps", "num_frames", "min_pixels", "max_pixels", "total_pixels"}
)
FRACTIONAL = frozenset({"fps", "sample_fps"})
LARGEST_OPTION = 1 << 40


@dataclass(frozen=True, slots=True)
class ImagePart:
    """One picture of a conversation; limits of its own, in pixels, or None for the processor's."""

    source: object
    min_pixels: int | None = None
    max_pixels: int | None = None


@dataclass(frozen=True, slots=True)
class VideoPart:
    """One video of a conversation.

    `fps` frames per second, or `num_frames` in all, are taken from a file. For a list of frames,
    `sample_fps` (or `fps`) is the rate at which they were taken. `min_pixels` and `max_pixels`
    limit one frame, `total_pixels` all frames together.
    """

    source: object
    fps: float | None = None
    sample_fps: float | None = None
    num_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages of plain JSON values, and the pictures and videos in the order of their places."""

    messages: list[dict[str, Any]]
    images: tuple[ImagePart, ...]
    videos: tuple[VideoPart, ...]


def parse_batch(messages: object) -> list[Conversation]:
    """One conversation (a list of messages) or several (a list of those).

    Raises:
        PromptError: not of this form, a key or a role that has no meaning here.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise PromptError("messages are a non-empty list of {'role': ..., 'content': ...}")
    if isinstance(messages[0], Mapping):
        return [parse_conversation(messages)]
    for row in messages:
        if not isinstance(row, Sequence) or isinstance(row, str | bytes) or not row:
            raise PromptError("in a batch every conversation is a non-empty list of messages")
    return [parse_conversation(row) for row in messages]


def parse_conversation(messages: Sequence[object]) -> Conversation:
    """Plain messages and media of one conversation; errors as `parse_batch`."""
    plain: list[dict[str, Any]] = []
    media: list[ImagePart | VideoPart] = []
    for index, message in enumerate(messages):
        label = f"message {index}"
        if not isinstance(message, Mapping):
            raise PromptError(f"{label} is a {type(message).__name__}, not a mapping with a role")
        plain.append(parse_message(label, message, media))
        if plain[-1]["role"] == "system" and index > 0:
            raise PromptError(f"{label} has the role 'system'; only the first message can have it")
    return Conversation(
        plain,
        tuple(part for part in media if isinstance(part, ImagePart)),
        tuple(part for part in media if isinstance(part, VideoPart)),
    )


def parse_message(
    label: str, message: Mapping[str, Any], media: list[ImagePart | VideoPart]
) -> dict[str, Any]:
    """One message with plain content; its media are appended to `media`."""
    given = {key: value for key, value in message.items() if value is not None}
    role = given.pop("role", None)
    if role not in ROLES:
        raise PromptError(f"{label} has the role {role!r}; wanted one of {', '.join(ROLES)}")
    content = given.pop("content", "" if "tool_calls" in given else None)
    for key, value in given.items():
        if key not in OTHER_KEYS:
            raise PromptError(f"{label} has a key {key!r} that has no meaning here")
        check_json(f"{label}: {key}", value)
    if isinstance(content, str):
        return {"role": role, "content": str(content), **given}
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise PromptError(f"{label} has no content: wanted a text or a list of parts")
    parts = [
        parse_part(f"{label}, part {number}", part, media) for number, part in enumerate(content)
    ]
    return {"role": role, "content": parts, **given}


def check_json(label: str, value: object) -> None:
    """PromptError unless the value is made of JSON's types."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"{label} is not made of plain JSON values") from error


def parse_part(label: str, part: object, media: list[ImagePart | VideoPart]) -> dict[str, Any]:
    """One plain part; a picture or a video is appended to `media`."""
    if isinstance(part, str):
        return {"type": "text", "text": str(part)}
    if not isinstance(part, Mapping):
        raise PromptError(f"{label} is a {type(part).__name__}, not a mapping with a type")
    given = {key: value for key, value in part.items() if value is not None}
    kind = given.pop("type", None) or next(
        (key for key in ("text", "image", "image_url", "video") if key in given), None
    )
    match kind:
        case "text":
            text = given.pop("text", None)
            if not isinstance(text, str) or given:
                raise PromptError(f"{label} is a text part; wanted the one key 'text' with a text")
            return {"type": "text", "text": str(text)}
        case "image" | "image_url":
            source = media_source(label, given, IMAGE_KEYS)
            media.append(ImagePart(source, **options(label, given, IMAGE_OPTIONS)))
            return {"type": "image"}
        case "video" | "video_url":
            source = media_source(label, given, VIDEO_KEYS)
            media.append(VideoPart(source, **options(label, given, VIDEO_OPTIONS)))
            return {"type": "video"}
    raise PromptError(f"{label} has the type {kind!r}; wanted 'text', 'image' or 'video'")


def media_source(label: str, given: dict[str, Any], keys: tuple[str, ...]) -> object:
    """What names the picture or video; its key is taken out of `given`."""
    found = [key for key in keys if key in given]
    if len(found) != 1:
        raise PromptError(f"{label}: wanted one of the keys {', '.join(keys)}, found {found}")
    value = given.pop(found[0])
    if isinstance(value, Mapping):
        value = value.get("url")
    return f"data:;base64,{value}" if found[0] == "base64" else value


def options(label: str, given: dict[str, Any], allowed: frozenset[str]) -> dict[str, Any]:
    """The options of a part, typed and range-checked."""
    for key, value in given.items():
        if key not in allowed:
            known = ", ".join(sorted(allowed))
            raise PromptError(f"{label}: unknown key {key!r}; known are {known}")
        numeric = type(value) is int or (type(value) is float and key in FRACTIONAL)
        if not numeric or not 0 < value <= LARGEST_OPTION:
            raise PromptError(f"{label}: {key} is {value!r}, not a number over 0")
    return {key: float(value) if key in FRACTIONAL else value for key, value in given.items()}
