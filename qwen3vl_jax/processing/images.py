"""A picture, whatever it is stored as, to upright RGB pixels, and pixels to patches.

Same pixels as transformers' PIL backend (5.23, `Qwen2VLImageProcessorPil`). Two things differ on
purpose from its `load_image`: alpha is always composited on white, and 16-bit grey keeps its high
byte (Pillow clips it, which turns nearly every such picture white).
"""

import io
import itertools
import math
import os
import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int64, UInt8
from PIL import Image

from qwen3vl_jax.errors import MediaError
from qwen3vl_jax.processing.media_config import RGB, Limits, PixelSettings
from qwen3vl_jax.processing.sources import (
    checked_bytes,
    describe,
    local_path,
    read_data_url,
    read_file,
)

MAX_ASPECT_RATIO = 200
# First bytes of the formats that we open. Pillow has 40 more; the rare ones carry its CVEs.
SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
)
EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: object, limits: Limits) -> Image.Image:
    """An upright RGB picture.

    Args:
        source: path, `file://` URL, `data:` URL, bytes of a JPEG, PNG, WebP, GIF (first frame) or
            BMP file, PIL image, or uint8 array [height, width] or [height, width, 1, 3 or 4].
        limits: caps on bytes and pixels; they hold before anything is decoded.

    Raises:
        MediaError: not a picture that can be read, or larger than a limit.
    """
    if isinstance(source, Image.Image):
        return upright_rgb(source, "a PIL image", limits)
    if isinstance(source, bytes | bytearray | memoryview):
        data = checked_bytes(source, max_bytes=limits.max_file_bytes)
        return decode_image(data, describe(source), limits)
    if isinstance(source, str) and source.startswith("data:"):
        data = read_data_url(source, max_bytes=limits.max_file_bytes)
        return decode_image(data, "a data URL", limits)
    if isinstance(source, str | os.PathLike):
        data = read_file(local_path(source), max_bytes=limits.max_file_bytes)
        return decode_image(data, describe(source), limits)
    return upright_rgb(image_of_array(source), "an array", limits)


def image_of_array(source: object) -> Image.Image:
    """A PIL image of a NumPy or JAX uint8 array, channels last."""
    array = np.asarray(source)
    if array.dtype != np.uint8:
        kind = describe(source) if array.dtype == object else f"an array of {array.dtype}"
        raise MediaError(f"{kind} is not a picture: pass a path, bytes, a PIL image or uint8 array")
    if array.ndim == RGB and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == RGB and array.shape[2] in (3, 4))):
        raise MediaError(
            f"an array of shape {array.shape} is not a picture: "
            "wanted [height, width] or [height, width, 1, 3 or 4]"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def picture_format(data: bytes, label: str) -> str:
    """Pillow's name of the format, by the first bytes; the file's name decides nothing."""
    for signature, name in SIGNATURES:
        if data.startswith(signature):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    raise MediaError(f"{label}: not a JPEG, PNG, WebP, GIF or BMP picture")


def webp_canvas(data: bytes) -> tuple[int, int]:
    """Width and height of a WebP file, read from its first chunk; (0, 0) where it has none."""
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        return 0, 0
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        sides = body[6:8], body[8:10]
        return (
            int.from_bytes(sides[0], "little") & 0x3FFF,
            int.from_bytes(sides[1], "little") & 0x3FFF,
        )
    return 0, 0


def check_pixels(size: tuple[int, int], label: str, limits: Limits) -> None:
    """MediaError unless a picture of this (width, height) may be decoded."""
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(f"{label}: a picture of {width} x {height} pixels is empty")
    if width * height > limits.max_pixels:
        raise MediaError(
            f"{label}: {width:,} x {height:,} = {width * height:,} pixels, "
            f"but {limits.max_pixels:,} are allowed; make it smaller"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise MediaError(
            f"{label}: {width:,} x {height:,} pixels have an aspect ratio over {MAX_ASPECT_RATIO}"
        )


def decode_image(data: bytes, label: str, limits: Limits) -> Image.Image:
    """An upright RGB picture out of a file's bytes; arguments and errors as `load_image`."""
    kind = picture_format(data, label)
    if kind == "WEBP":
        # Pillow lets libwebp allocate the canvas inside open(), before the size can be asked for.
        check_pixels(webp_canvas(data), label, limits)
        from PIL import WebPImagePlugin  # noqa: F401  (registers one decoder, not all 40)
    try:
        with warnings.catch_warnings():
            # Pillow warns of bombs from 89 million pixels on; check_pixels is stricter.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=(kind,))
    except Image.DecompressionBombError as error:
        raise MediaError(f"{label}: more than {limits.max_pixels:,} pixels") from error
    except Exception as error:
        raise MediaError(f"{label}: cannot be read as {kind}; it is damaged") from error
    return upright_rgb(image, label, limits)


def upright_rgb(image: Image.Image, label: str, limits: Limits) -> Image.Image:
    """The picture decoded, turned as its EXIF orientation says, on white, as RGB."""
    check_pixels(image.size, label, limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Corrupt EXIF data" and the like
            image.load()
            return rgb_on_white(turned(image))
    except MediaError:
        raise
    except Exception as error:
        raise MediaError(f"{label}: truncated or damaged picture") from error


def turned(image: Image.Image) -> Image.Image:
    """The picture with its EXIF orientation applied. Unreadable EXIF counts as none."""
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except Exception:
        return image
    if orientation not in UPRIGHT:
        return image
    upright = image.transpose(UPRIGHT[orientation])
    upright.info = dict(image.info)
    return upright


def rgb_on_white(image: Image.Image) -> Image.Image:
    """The picture as RGB; whatever is transparent shows white.

    Source: transformers 5.23, `image_transforms.convert_to_rgb`.
    """
    if image.mode.startswith("I;16"):
        image = high_byte(image)
    elif image.mode in ("I", "F"):
        raise MediaError(f"a picture of mode {image.mode!r} has no fixed range; make it 8 bit")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def high_byte(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey: the high byte, which is what Pillow keeps of 16-bit colour."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def smart_resize(
    height: int, width: int, *, side: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Height and width as multiples of `side`, within the limits, near the same aspect ratio.

    Source: transformers 5.23, `image_processing_pil_qwen2_vl.smart_resize` (half rounds to even).
    """
    new_height, new_width = round(height / side) * side, round(width / side) * side
    if new_height * new_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_height = max(side, math.floor(height / shrink / side) * side)
        new_width = max(side, math.floor(width / shrink / side) * side)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / side) * side
        new_width = math.ceil(width * grow / side) * side
    return new_height, new_width


def resized_pixels(
    image: Image.Image, height: int, width: int
) -> UInt8[np.ndarray, "height width 3"]:
    """The RGB picture's pixels after PIL's bicubic filter."""
    if image.size != (width, height):
        image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    return np.asarray(image)


def prepare_image(
    source: object, settings: PixelSettings, limits: Limits
) -> UInt8[np.ndarray, "1 height width 3"]:
    """Pixels of one picture in the size that the model sees, as a clip of one frame."""
    image = load_image(source, limits)
    height, width = smart_resize(
        image.height,
        image.width,
        side=settings.side,
        min_pixels=settings.min_pixels,
        max_pixels=settings.max_pixels,
    )
    return resized_pixels(image, height, width)[np.newaxis]


def levels(settings: PixelSettings) -> Float[np.ndarray, "3 256"]:
    """The normalised float32 value of each of the 256 levels of red, green and blue.

    The order of rounding is transformers': x * factor in float64, to float32, minus mean, by std.
    """
    scaled = (np.arange(256, dtype=np.float64) * settings.rescale_factor).astype(np.float32)
    mean = np.array(settings.mean, np.float32)[:, np.newaxis]
    std = np.array(settings.std, np.float32)[:, np.newaxis]
    return (scaled[np.newaxis] - mean) / std


def grid_of(
    clip: UInt8[np.ndarray, "frames height width 3"], settings: PixelSettings
) -> tuple[int, int, int]:
    """Patches along time, height and width."""
    frames, height, width, _ = clip.shape
    groups = -(-frames // settings.temporal_patch_size)
    return groups, height // settings.patch_size, width // settings.patch_size


def patches_of(
    clips: Sequence[UInt8[np.ndarray, "..."]], settings: PixelSettings
) -> tuple[Float[np.ndarray, "patches values"], Int64[np.ndarray, "clips 3"]]:
    """`pixel_values` and `grid_thw` of clips (a picture is a clip of one frame).

    Rows: clip, frame group, then blocks of `merge_size` x `merge_size` patches. Inside a row:
    channel, frame of the group, row, column. The last frame is repeated to fill its group.
    """
    grids = [grid_of(clip, settings) for clip in clips]
    rows = np.cumsum([0, *(math.prod(grid) for grid in grids)])
    out = np.empty((int(rows[-1]), settings.patch_values), np.float32)
    table = levels(settings)
    for index, clip in enumerate(clips):
        fill_patches(out[rows[index] : rows[index + 1]], clip, grids[index], settings, table)
    return out, np.array(grids, np.int64).reshape(-1, 3)


def fill_patches(
    out: Float[np.ndarray, "patches values"],
    clip: UInt8[np.ndarray, "frames height width 3"],
    grid: tuple[int, int, int],
    settings: PixelSettings,
    table: Float[np.ndarray, "3 256"],
) -> None:
    """Write the rows of one clip, by bands as high as one token: copies in between stay small."""
    group, merge, patch = settings.temporal_patch_size, settings.merge_size, settings.patch_size
    time, height, width = grid
    rows = out.reshape(
        time, height // merge, width // merge, merge, merge, RGB, group, patch, patch
    )
    bands = clip.reshape(len(clip), height // merge, merge * patch, width * patch, RGB)
    for place in range(time * group):
        frame = bands[min(place, len(clip) - 1)]
        for number, channel in itertools.product(range(len(frame)), range(RGB)):
            band = np.take(table[channel], frame[number, :, :, channel])
            blocks = band.reshape(merge, patch, width // merge, merge, patch)
            target = rows[place // group, number, :, :, :, channel, place % group]
            target[:] = blocks.transpose(2, 0, 3, 1, 4)
