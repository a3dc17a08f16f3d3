"""Pictures, clips and files that several test files read; made here, nothing is stored."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """A smooth uint8 picture: sums of sines. It made the stored cases of data/tiny."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    random = np.random.RandomState(seed)
    channels = []
    for channel in range(3):
        across = (1 + channel) * x / width * random.uniform(0.5, 2)
        down = (2 + channel) * y / height * random.uniform(0.5, 2)
        channels.append(127.5 + 127.5 * np.sin(2 * np.pi * (across + down + random.uniform())))
    return np.stack(channels, -1).round().clip(0, 255).astype(np.uint8)


def clip(frames: int, height: int, width: int, seed: int) -> np.ndarray:
    """A picture that moves to the right by 5 pixels a frame."""
    return np.stack([np.roll(picture(height, width, seed), 5 * i, axis=1) for i in range(frames)])


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of a picture file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """The same file with bytes changed, cut off, doubled or taken out; most near the beginning."""
    random = np.random.RandomState(seed)
    for _ in range(count):
        piece = bytearray(data)
        for _ in range(random.randint(1, 6)):
            place = int(len(piece) * random.uniform() ** 3)
            match random.randint(5):
                case 0:
                    piece = piece[: max(1, int(len(piece) * random.uniform()))]
                case 1:
                    piece[place:place] = piece[place : place + 8]
                case 2:
                    piece = piece[:place] + piece[place + random.randint(1, 5) :] or piece
                case _:
                    piece[min(place, len(piece) - 1)] = random.randint(256)
        yield bytes(piece)


def video_file(
    frames: np.ndarray, container: str = "mp4", codec: str = "mpeg4", rate: int = 10
) -> bytes:
    """The bytes of a video file with these frames (compressed with loss)."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return file.getvalue()
