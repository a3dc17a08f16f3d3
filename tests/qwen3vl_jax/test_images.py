"""Pictures: the same numbers as transformers' PIL backend, and hostile files."""

import base64
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pictures import file_of, mutations, picture
from PIL import Image

from qwen3vl_jax.errors import MediaError
from qwen3vl_jax.processing.images import load_image, patches_of, prepare_image, smart_resize
from qwen3vl_jax.processing.media_config import Limits, PixelSettings

LIMITS = Limits()
SMALL = PixelSettings(min_pixels=4_096, max_pixels=65_536)
COLOURS = picture(6, 9, 0)
SIZES = [
    (1, 1),
    (1, 200),
    (200, 1),
    (31, 33),
    (64, 96),
    (90, 140),
    (130, 70),
    (16, 900),
    (517, 333),
]


def pixels(source: object, limits: Limits = LIMITS) -> np.ndarray:
    return np.asarray(load_image(source, limits))


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers' processor, without torch."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    def process(image: Image.Image, settings: PixelSettings) -> Any:
        processor = Qwen2VLImageProcessorPil(
            size={"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels},
            patch_size=settings.patch_size,
            image_mean=list(settings.mean),
            image_std=list(settings.std),
        )
        return processor([image], return_tensors="np")

    return process


@pytest.mark.parametrize("kind", ["smooth", "noise"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_patches_have_the_bits_of_transformers(
    size: tuple[int, int], kind: str, reference: Any
) -> None:
    array = picture(*size, seed=size[0])
    if kind == "noise":
        array = np.random.default_rng(size[1]).integers(0, 256, array.shape, np.uint8)
    wanted = reference(Image.fromarray(array), SMALL)
    values, grid = patches_of([prepare_image(array, SMALL, LIMITS)], SMALL)
    np.testing.assert_array_equal(grid, wanted["image_grid_thw"])
    assert values.dtype == wanted["pixel_values"].dtype == np.float32
    assert values.tobytes() == np.ascontiguousarray(wanted["pixel_values"]).tobytes()


def test_other_means_and_patch_sizes_have_the_bits_of_transformers(reference: Any) -> None:
    settings = PixelSettings(
        min_pixels=3_136,
        max_pixels=20_000,
        patch_size=14,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    )
    array = picture(75, 112, 5)
    wanted = reference(Image.fromarray(array), settings)
    values, grid = patches_of([prepare_image(array, settings, LIMITS)], settings)
    np.testing.assert_array_equal(grid, wanted["image_grid_thw"])
    np.testing.assert_array_equal(values, wanted["pixel_values"])


@given(
    st.integers(1, 5_000),
    st.integers(1, 5_000),
    st.sampled_from([(65_536, 16_777_216), (4_096, 65_536), (3_136, 1_003_520)]),
)
def test_smart_resize_is_that_of_transformers(
    height: int, width: int, limits: tuple[int, int]
) -> None:
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as theirs

    assume(max(height, width) <= 200 * min(height, width))
    ours = smart_resize(height, width, side=32, min_pixels=limits[0], max_pixels=limits[1])
    assert ours == theirs.smart_resize(height, width, 32, *limits)


def test_rows_are_merge_blocks_of_channel_frame_row_column() -> None:
    settings = PixelSettings(1, 1 << 20, patch_size=1, merge_size=2, temporal_patch_size=2)
    frames = np.zeros((3, 2, 4, 3), np.uint8)
    frames[..., 0] = np.arange(24).reshape(3, 2, 4)
    values, grid = patches_of([frames], settings)
    red = ((values + 1) * 127.5).round().astype(int)[:, :2]
    assert grid.tolist() == [[2, 2, 4]]
    # First group: frames 0 and 1. Blocks of 2 x 2: columns 0-1 before columns 2-3.
    assert red[:4].tolist() == [[0, 8], [1, 9], [4, 12], [5, 13]]
    assert red[4:6].tolist() == [[2, 10], [3, 11]]
    # Second group: the last frame fills the place of the missing fourth one.
    assert red[8].tolist() == [16, 16]


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    image = Image.fromarray(COLOURS)
    data = file_of(image, "PNG")
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.encodebytes(data).decode()
    sources = [path, str(path), path.as_uri(), data, bytearray(data), url, image, COLOURS]
    for source in [*sources, jnp.asarray(COLOURS), COLOURS.astype(np.uint8)[::1]]:
        np.testing.assert_array_equal(pixels(source), COLOURS)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_every_allowed_format_is_read_whatever_its_name(kind: str, tmp_path: Path) -> None:
    grey = Image.fromarray(COLOURS).convert("L")
    path = tmp_path / "picture.txt"
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}.get(kind, {})
    path.write_bytes(file_of(grey, kind, **options))
    wanted = np.repeat(np.asarray(grey)[:, :, None], 3, axis=2).astype(int)
    assert np.abs(pixels(path) - wanted).max() <= (3 if kind == "JPEG" else 0)


def test_a_jpeg_is_decoded_in_full_before_it_is_resized() -> None:
    data = file_of(Image.fromarray(picture(256, 256, 3)), "JPEG", quality=95)
    whole = np.asarray(Image.fromarray(pixels(data)).resize((64, 64), Image.Resampling.BICUBIC))
    settings = PixelSettings(min_pixels=4_096, max_pixels=4_096)
    np.testing.assert_array_equal(prepare_image(data, settings, LIMITS)[0], whole)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda a: np.rot90(a, 1)),
        (9, lambda a: a),
    ],
)
def test_exif_orientation_turns_the_picture(orientation: int, upright: Any, kind: str) -> None:
    blocks = np.zeros((16, 32, 3), np.uint8)
    blocks[:8, :16] = (255, 0, 0)
    blocks[8:, 16:] = (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    found = pixels(file_of(Image.fromarray(blocks), kind, exif=exif, **options))
    assert found.shape == upright(blocks).shape
    # JPEG blurs the colours over the edges of the blocks.
    assert np.abs(found - upright(blocks).astype(int)).max() <= (140 if kind == "JPEG" else 0)
    corners = np.ix_([0, -1], [0, -1])
    assert np.abs(found[corners] - upright(blocks)[corners].astype(int)).max() <= 3


def test_what_is_transparent_shows_white() -> None:
    layer = np.array([[[255, 0, 0, 0], [0, 0, 255, 128], [10, 20, 30, 255]]], np.uint8)
    wanted = [[[255, 255, 255], [127, 127, 255], [10, 20, 30]]]
    rgba = Image.fromarray(layer)
    assert pixels(layer).tolist() == pixels(rgba).tolist() == wanted
    assert pixels(file_of(rgba, "PNG")).tolist() == wanted
    grey = Image.fromarray(np.array([[[0, 0], [0, 255], [7, 255]]], np.uint8), "LA")
    assert pixels(file_of(grey, "PNG"))[..., 0].tolist() == [[255, 0, 7]]


def test_one_transparent_colour_shows_white() -> None:
    grey = Image.fromarray(np.array([[0, 9, 200]], np.uint8))
    assert pixels(file_of(grey, "PNG", transparency=9))[..., 1].tolist() == [[0, 255, 200]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([1, 2, 3, 4, 5, 6])
    for kind in ("PNG", "GIF"):
        found = pixels(file_of(palette, kind, transparency=1))
        assert found.tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_16_bit_grey_keeps_its_high_byte() -> None:
    deep = Image.fromarray(np.array([[0, 0x00FF, 0x1234, 0xFFFF]], np.uint16))
    assert pixels(deep)[..., 0].tolist() == [[0, 0, 0x12, 0xFF]]
    data = file_of(deep, "PNG", transparency=0x1234)
    assert pixels(data)[..., 2].tolist() == [[0, 0, 0xFF, 0xFF]]


def test_cmyk_black_and_white_and_grey_arrays_become_rgb() -> None:
    ink = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], np.uint8)
    cmyk = Image.fromarray(ink, "CMYK")
    assert pixels(cmyk).tolist() == [[[255, 255, 255], [0, 255, 255], [0, 0, 0]]]
    large = cmyk.resize((48, 16), Image.Resampling.NEAREST)
    found = pixels(file_of(large, "JPEG", quality=100))
    assert np.abs(found[8, [2, 24, 45]] - pixels(cmyk)[0].astype(int)).max() <= 4
    assert pixels(Image.fromarray(np.array([[True, False]])))[..., 0].tolist() == [[255, 0]]
    grey = np.array([[1, 2], [3, 4]], np.uint8)
    assert (
        pixels(grey)[..., 2].tolist() == pixels(grey[:, :, None])[..., 2].tolist() == grey.tolist()
    )


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (np.zeros((4, 4, 3), np.float32), "an array of float32 is not a picture"),
        (np.zeros((3, 9, 9), np.uint8), r"shape \(3, 9, 9\)"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        (object(), "an object of type object is not a picture"),
        (None, "an object of type NoneType is not a picture"),
        ([["a"]], "is not a picture"),
        (Image.new("F", (4, 4)), "mode 'F' has no fixed range"),
        (Image.new("I", (4, 4)), "mode 'I' has no fixed range"),
        (Image.new("RGB", (0, 4)), "0 x 4 pixels is empty"),
        (np.zeros((1, 201, 3), np.uint8), "201 x 1 pixels have an aspect ratio over 200"),
        (np.zeros((402, 2, 3), np.uint8), "2 x 402 pixels have an aspect ratio over 200"),
        (b"", "0 bytes"),
        (b"not a picture", "not a JPEG, PNG, WebP, GIF or BMP"),
        (file_of(Image.new("RGB", (4, 4)), "TIFF"), "not a JPEG, PNG, WebP, GIF or BMP"),
        (file_of(Image.new("RGB", (4, 4)), "PPM"), "not a JPEG, PNG, WebP, GIF or BMP"),
        ("https://example.org/cat.png", "URLs are not fetched"),
        ("file://elsewhere/cat.png", "of this machine only"),
        ("no/such/file.png", "'no/such/file.png': no such file"),
        ("x" * 5_000, "no such file"),
        ("cat\0.png", "NUL"),
        ("data:image/png;base64,!!!!", "not base64"),
        ("data:image/png,abc", "a data URL looks like"),
        ("data:image/png;base64,", "0 bytes"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(source: object, says: str) -> None:
    with pytest.raises(MediaError, match=says) as caught:
        load_image(source, LIMITS)
    message = str(caught.value)
    assert "0x" not in message
    assert "\n" not in message
    assert len(message) < 250


def test_things_that_are_not_files_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "."):
        with pytest.raises(MediaError, match="not a regular file"):
            load_image(tmp_path / name, LIMITS)


def test_caps_hold_before_anything_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(file_of(Image.fromarray(COLOURS), "PNG") + b"\0" * 1_000)
    few_bytes = Limits(max_file_bytes=900)
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes() + b"\0" * 2_000).decode()
    for source in (path, path.read_bytes(), url):
        with pytest.raises(MediaError, match="900"):
            load_image(source, few_bytes)
    with pytest.raises(MediaError, match="9 x 6 = 54 pixels, but 53 are allowed"):
        load_image(path, Limits(max_pixels=53))
    assert load_image(path, Limits(max_pixels=54)).size == (9, 6)


def bomb(kind: str) -> bytes:
    """A small file that says it has 15,000 x 15,000 pixels."""
    side = 15_000
    if kind == "WEBP":
        data = bytearray(file_of(Image.new("RGBA", (4, 4)), "WEBP", exif=b"Exif\0\0"))
        assert data[12:16] == b"VP8X"
        data[24:30] = (side - 1).to_bytes(3, "little") * 2
        return bytes(data)
    if kind == "PNG":
        return file_of(Image.new("1", (side, side)), "PNG")
    if kind == "GIF":
        return file_of(Image.new("L", (8, 8)), "GIF").replace(
            b"\x08\0\x08\0", side.to_bytes(2, "little") * 2, 1
        )
    data = file_of(Image.new("L", (8, 8)), kind)
    if kind == "BMP":
        return data.replace((8).to_bytes(4, "little") * 2, side.to_bytes(4, "little") * 2, 1)
    return data.replace(b"\0\x08\0\x08", side.to_bytes(2, "big") * 2, 1)


def test_bombs_are_refused_without_taking_memory(tmp_path: Path) -> None:
    for kind in ("PNG", "WEBP", "GIF", "BMP", "JPEG"):
        (tmp_path / kind).write_bytes(bomb(kind))
    code = """
import sys
from pathlib import Path
from qwen3vl_jax.console import peak_process_bytes as peak
from qwen3vl_jax.errors import MediaError
from qwen3vl_jax.processing.images import load_image
from qwen3vl_jax.processing.media_config import Limits
import PIL.WebPImagePlugin, PIL.JpegImagePlugin, PIL.PngImagePlugin
before = peak()
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        load_image(path, Limits())
        print(path.name, "was decoded")
    except MediaError as error:
        assert "225,000,000 pixels" in str(error) or "more than 67,108,864" in str(error), error
print((peak() - before) >> 20)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    grown_mib = int(done.stdout)  # one line only: nothing was decoded
    assert grown_mib <= 16


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_a_damaged_file_is_a_picture_or_a_media_error(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = file_of(Image.fromarray(picture(24, 40, 1)), kind, exif=exif)
    messages = []
    for data in mutations(whole, 150, seed=len(kind)):
        try:
            image = load_image(data, Limits(max_pixels=1 << 20))
        except MediaError as error:
            messages.append(str(error))
        else:
            assert image.mode == "RGB"
            assert image.width * image.height <= 1 << 20
    assert len(messages) >= 40
    assert not any("0x" in message or "\n" in message for message in messages)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "JPEG"])
def test_a_truncated_file_is_refused(kind: str) -> None:
    whole = file_of(Image.fromarray(picture(64, 64, 2)), kind)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(MediaError, match="damaged"):
            load_image(whole[: int(len(whole) * share)], LIMITS)
