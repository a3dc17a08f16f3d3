"""A video, a file or a list of frames, to the few frames that the model sees, and their times.

Files are decoded by PyAV (the extra `video`), one frame in memory at a time, up to the last frame
that is needed. Sampling, sizes and times as in transformers 5.23, `Qwen3VLVideoProcessor`; frames
are resized by PIL, as pictures are.
"""

import contextlib
import dataclasses
import io
import math
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from qwen3vl_jax.errors import MediaError, UsageError
from qwen3vl_jax.processing.conversations import VideoPart
from qwen3vl_jax.processing.images import MAX_ASPECT_RATIO, check_pixels, load_image, resized_pixels
from qwen3vl_jax.processing.media_config import Limits, VideoSettings
from qwen3vl_jax.processing.sources import (
    checked_bytes,
    describe,
    local_path,
    open_regular_file,
    read_data_url,
)

CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg"})
DATA_RANK = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Clip:
    """The frames that the model sees, resized, and the middle of every frame group in seconds."""

    frames: UInt8[np.ndarray, "frames height width 3"]
    timestamps: tuple[float, ...]


def load_video(part: VideoPart, settings: VideoSettings, limits: Limits) -> Clip:
    """Sampled and resized frames of one video.

    Raises:
        MediaError: not a video that can be read, empty, or larger than a limit.
        UsageError: PyAV is not installed, or options contradict each other.
    """
    if is_frame_list(part.source):
        return clip_of_frames(part, settings, limits)
    if part.sample_fps is not None:
        raise UsageError("sample_fps is for lists of frames; use fps or num_frames with a file")
    with contextlib.ExitStack() as stack:
        file, label = open_video(part.source, limits)
        stack.enter_context(file)
        return clip_of_file(file, label, part, settings, limits)


def is_frame_list(source: object) -> bool:
    """Whether these are frames (a list of pictures or a 4-D array), not a file or bytes."""
    if isinstance(source, list | tuple):
        return True
    if isinstance(source, str | bytes | bytearray | memoryview | os.PathLike | Image.Image):
        return False
    return np.asarray(source).ndim == DATA_RANK


def open_video(source: object, limits: Limits) -> tuple[io.BufferedIOBase, str]:
    """The video's bytes as an open file, and its name for messages."""
    if isinstance(source, bytes | bytearray | memoryview):
        data = checked_bytes(source, max_bytes=limits.max_video_bytes)
        return io.BytesIO(data), describe(source)
    if isinstance(source, str) and source.startswith("data:"):
        return io.BytesIO(read_data_url(source, max_bytes=limits.max_video_bytes)), "a data URL"
    if isinstance(source, str | os.PathLike):
        file = open_regular_file(local_path(source), max_bytes=limits.max_video_bytes)
        return file, describe(source)
    raise MediaError(f"{describe(source)} is not a video: pass a path, bytes or a list of frames")


def clip_of_frames(part: VideoPart, settings: VideoSettings, limits: Limits) -> Clip:
    """A clip of given frames: all of them, or `num_frames` spread evenly.

    Without `sample_fps` or `fps` the frames count as taken at the settings' sampling rate.
    """
    if part.fps is not None and part.sample_fps is not None:
        raise UsageError("for a list of frames give fps or sample_fps, not both")
    rate = part.sample_fps or part.fps or settings.fps
    frames: Sequence[Any] = part.source  # type: ignore[assignment]
    count = len(frames) if part.num_frames is None else part.num_frames
    check_count(count, len(frames), "a list of frames", settings)
    indices = spread(len(frames), count)
    pictures = (load_image(frames[index], limits) for index in indices)
    return resized_clip(pictures, indices, rate, "a list of frames", part, settings)


def clip_of_file(
    file: io.BufferedIOBase, label: str, part: VideoPart, settings: VideoSettings, limits: Limits
) -> Clip:
    """A clip of a container file that PyAV can read."""
    av = import_av()
    try:
        with av.open(file, mode="r", format=container_format(file, label)) as container:
            stream = video_stream(container, label, limits)
            rate = frame_rate(stream, label)
            total = frame_count(av, container, stream, label, limits)
            indices = sample_indices(total, rate, part, settings, label)
            pictures = decoded(container, stream, indices, label, limits)
            return resized_clip(pictures, indices, rate, label, part, settings)
    except av.FFmpegError as error:
        raise MediaError(f"{label}: truncated or damaged video") from error
    except (ValueError, OverflowError, ZeroDivisionError, IndexError) as error:
        if isinstance(error, MediaError | UsageError):
            raise
        raise MediaError(f"{label}: damaged video") from error


def import_av() -> Any:
    """PyAV, or what to install."""
    try:
        import av
    except ImportError as error:
        raise UsageError(
            "reading video files needs PyAV: "
            "pip install 'qwen3vl-jax[video]', or pass a list of frames"
        ) from error
    return av


def container_format(file: io.BufferedIOBase, label: str) -> str:
    """FFmpeg's name of the container, by the first bytes.

    FFmpeg must not try its 300 others: playlists, for one, open other files and URLs.
    """
    head = file.read(12)
    file.seek(0)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        return "mp4"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    raise MediaError(f"{label}: not an MP4, MOV, MKV, WebM or AVI video")


def video_stream(container: Any, label: str, limits: Limits) -> Any:
    """The first video stream, checked and with the pixel cap set in the decoder."""
    if not container.streams.video:
        raise MediaError(f"{label}: has no video stream")
    stream = container.streams.video[0]
    context = stream.codec_context
    if context is None or context.codec.canonical_name not in CODECS:
        raise MediaError(f"{label}: the video codec is not one of {', '.join(sorted(CODECS))}")
    check_pixels((context.width, context.height), label, limits)
    context.options = {"max_pixels": str(limits.max_pixels)}
    stream.thread_type = "AUTO"
    return stream


def frame_rate(stream: Any, label: str) -> float:
    """Frames per second that the file states."""
    rate: Fraction | None = stream.average_rate or stream.guessed_rate
    if not rate or not 0 < rate <= 1_000:
        raise MediaError(f"{label}: states no frame rate between 0 and 1,000 per second")
    return float(rate)


def frame_count(av: Any, container: Any, stream: Any, label: str, limits: Limits) -> int:
    """Frames in the file: what it states, or, where it does not (WebM), its packets counted."""
    total: int = stream.frames
    if total < 1:
        total = 0
        for packet in container.demux(stream):
            total += packet.size > 0
            if total > limits.max_video_frames:
                break
        container.seek(0)
    if total > limits.max_video_frames:
        raise MediaError(
            f"{label}: more than {limits.max_video_frames:,} frames; cut the video or pass frames"
        )
    return total


def decoded(
    container: Any, stream: Any, indices: Sequence[int], label: str, limits: Limits
) -> Iterator[Image.Image]:
    """The frames with these ascending numbers; the others are decoded, but not converted."""
    wanted = 0
    for number, frame in enumerate(container.decode(stream)):
        while wanted < len(indices) and indices[wanted] == number:
            check_pixels((frame.width, frame.height), label, limits)
            yield Image.fromarray(frame.to_ndarray(format="rgb24"))
            wanted += 1
        if wanted == len(indices):
            return
    raise MediaError(
        f"{label}: frame {indices[wanted]:,} is missing; the video is truncated or damaged"
    )


def check_count(count: int, total: int, label: str, settings: VideoSettings) -> None:
    """MediaError unless `count` of `total` frames can be taken."""
    if total == 0:
        raise MediaError(f"{label}: an empty video, it has no frames")
    least, most = settings.pixels.temporal_patch_size, settings.max_frames
    if not least <= count <= min(total, most):
        raise MediaError(
            f"{label}: {count:,} of {total:,} frames wanted; "
            f"at least {least} and at most {most:,} frames of those there are can be used"
        )


def spread(total: int, count: int) -> list[int]:
    """`count` frame numbers from first to last, evenly."""
    return [int(index) for index in np.linspace(0, total - 1, count).round()]


def sample_indices(
    total: int, rate: float, part: VideoPart, settings: VideoSettings, label: str
) -> list[int]:
    """Numbers of the frames to use, of a file with `total` frames at `rate` per second.

    Source: transformers 5.23, `Qwen3VLVideoProcessor.sample_frames`.
    """
    if part.fps is not None and part.num_frames is not None:
        raise UsageError("fps and num_frames exclude each other")
    if part.num_frames is not None:
        count = part.num_frames
    else:
        count = int(total / rate * (part.fps or settings.fps))
        count = min(max(count, settings.min_frames), settings.max_frames, total)
    check_count(count, total, label, settings)
    return spread(total, count)


def smart_resize_clip(
    frames: int, height: int, width: int, *, side: int, group: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Height and width of all frames, as multiples of `side`; limits count frames x height x width.

    Source: transformers 5.23, `video_processing_qwen3_vl.smart_resize`.

    Raises:
        MediaError: aspect ratio over 200.
    """
    if height < side or width < side:
        scale = max(side / height, side / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise MediaError(f"{width} x {height} pixels have an aspect ratio over {MAX_ASPECT_RATIO}")
    new_height, new_width = round(height / side) * side, round(width / side) * side
    total = round(frames / group) * group * new_height * new_width
    if total > max_pixels:
        shrink = math.sqrt((frames * height * width) / max_pixels)
        new_height = max(side, math.floor(height / shrink / side) * side)
        new_width = max(side, math.floor(width / shrink / side) * side)
    elif total < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        new_height = math.ceil(height * grow / side) * side
        new_width = math.ceil(width * grow / side) * side
    return new_height, new_width


def pixel_budget(frames: int, part: VideoPart, settings: VideoSettings) -> tuple[int, int]:
    """Least and most frames x height x width, from the settings and the video's own wishes.

    Source of the cap per frame: transformers 5.23, `Qwen3VLVideoProcessor.resize`.
    """
    least, most = settings.pixels.min_pixels, settings.pixels.max_pixels
    most = part.total_pixels or most
    if settings.cap_pixels_per_frame:
        cap = settings.max_video_tokens * settings.pixels.side**2
        most = max(min(cap, most // frames), int(least * 1.05)) * frames
    if part.max_pixels is not None:
        most = min(most, part.max_pixels * frames)
    if part.min_pixels is not None:
        least = part.min_pixels * frames
    return min(least, most), most


def resized_clip(
    pictures: Iterator[Image.Image],
    indices: Sequence[int],
    rate: float,
    label: str,
    part: VideoPart,
    settings: VideoSettings,
) -> Clip:
    """All pictures in the size that the first one and their number decide."""
    first = next(pictures)
    least, most = pixel_budget(len(indices), part, settings)
    height, width = smart_resize_clip(
        len(indices),
        first.height,
        first.width,
        side=settings.pixels.side,
        group=settings.pixels.temporal_patch_size,
        min_pixels=least,
        max_pixels=most,
    )
    frames = np.empty((len(indices), height, width, 3), np.uint8)
    frames[0] = resized_pixels(first, height, width)
    for number in range(1, len(indices)):
        picture = next(pictures)
        if picture.size != first.size:
            raise MediaError(
                f"{label}: frame {number} is {picture.width} x {picture.height}, "
                f"the first {first.width} x {first.height}; all must have one size"
            )
        frames[number] = resized_pixels(picture, height, width)
    times = group_times(indices, rate, settings.pixels.temporal_patch_size)
    return Clip(frames, tuple(times))


def group_times(indices: Sequence[int], rate: float, group: int) -> list[float]:
    """Seconds of the middle of every group of frames; the last frame fills up the last group.

    Source: transformers 5.23, `Qwen3VLProcessor._calculate_timestamps`.
    """
    filled = [*indices, *[indices[-1]] * (-len(indices) % group)]
    times = [index / rate for index in filled]
    return [(times[i] + times[i + group - 1]) / 2 for i in range(0, len(times), group)]
