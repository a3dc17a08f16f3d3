"""Videos: sampling, sizes and times as transformers has them; files, frame lists, hostile input."""

import base64
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pictures import clip, mutations, picture, video_file
from PIL import Image

from qwen3vl_jax.errors import MediaError, UsageError
from qwen3vl_jax.processing.conversations import VideoPart
from qwen3vl_jax.processing.images import grid_of
from qwen3vl_jax.processing.media_config import Limits, PixelSettings, VideoSettings
from qwen3vl_jax.processing.videos import (
    Clip,
    group_times,
    load_video,
    pixel_budget,
    sample_indices,
    smart_resize_clip,
)

LIMITS = Limits()
# Limits wide enough for 64 x 96 frames to keep their size.
AS_IS = VideoSettings(pixels=PixelSettings(min_pixels=4_096, max_pixels=1 << 20))
FRAMES = clip(24, 64, 96, 4)


def load(source: object, settings: VideoSettings = AS_IS, **options: Any) -> Clip:
    return load_video(VideoPart(source, **options), settings, LIMITS)


@pytest.fixture(scope="module")
def theirs() -> Any:
    """transformers' module; its class is only read, as it cannot be made without torchvision."""
    pytest.importorskip("torch", reason="this part of transformers cannot be imported without it")
    return importlib.import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl")


def test_sampling_is_that_of_transformers(theirs: Any) -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        total, rate = int(random.integers(4, 3_000)), float(random.choice([10, 23.976, 25, 30, 60]))
        fps = float(random.choice([0.5, 1, 2, 7.3]))
        settings = SimpleNamespace(fps=2, min_frames=4, max_frames=768)
        metadata = SimpleNamespace(total_num_frames=total, fps=rate)
        wanted = theirs.Qwen3VLVideoProcessor.sample_frames(settings, metadata, fps=fps)
        found = sample_indices(total, rate, VideoPart(None, fps=fps), VideoSettings(), "")
        assert found == wanted.tolist()
        wanted = theirs.Qwen3VLVideoProcessor.sample_frames(settings, metadata, num_frames=4)
        assert sample_indices(total, rate, VideoPart(None, num_frames=4), AS_IS, "") == [*wanted]


def test_the_size_of_a_clip_is_that_of_transformers(theirs: Any) -> None:
    random = np.random.default_rng(1)
    for _ in range(1_000):
        frames, height, width = (int(random.integers(2, most)) for most in (300, 2_000, 2_000))
        if max(height, width) > 200 * min(height, width):
            continue
        limits = {"min_pixels": 4_096, "max_pixels": int(random.choice([98_304, 25_165_824]))}
        wanted = theirs.smart_resize(frames, height, width, factor=32, **limits)
        assert smart_resize_clip(frames, height, width, side=32, group=2, **limits) == wanted


def test_the_cap_per_frame_is_that_of_transformers(theirs: Any) -> None:
    settings = VideoSettings(cap_pixels_per_frame=True)
    size = {"shortest_edge": 4_096, "longest_edge": 25_165_824}
    for frames, height, width in (
        (4, 1_080, 1_920),
        (60, 720, 1_280),
        (768, 480, 640),
        (2, 50, 60),
    ):
        stand_in = SimpleNamespace(
            size=size, patch_size=16, merge_size=2, temporal_patch_size=2, max_video_tokens=768
        )
        patches = theirs.Qwen3VLVideoProcessor.get_num_of_video_patches(
            stand_in, frames, height, width, {"cap_pixels_per_frame": True}
        )
        least, most = pixel_budget(frames, VideoPart(None), settings)
        new_height, new_width = smart_resize_clip(
            frames, height, width, side=32, group=2, min_pixels=least, max_pixels=most
        )
        assert new_height * new_width * frames // 2 == patches * 16 * 16


@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=30).map(sorted), st.floats(0.1, 120))
def test_times_are_those_of_transformers(indices: list[int], rate: float) -> None:
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    wanted = Qwen3VLProcessor._calculate_timestamps(None, list(indices), rate)
    assert group_times(indices, rate, 2) == wanted


def test_times_are_the_middle_of_a_pair_and_the_last_frame_stands_for_a_missing_one() -> None:
    assert group_times([0, 5, 10], 10.0, 2) == [0.25, 1.0]
    assert group_times([0, 5], 10.0, 1) == [0.0, 0.5]


@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 300))
def test_every_clip_size_is_a_whole_number_of_tokens(frames: int, height: int, width: int) -> None:
    assume(max(height, width) <= 200 * min(height, width) and frames >= 2)
    new = smart_resize_clip(
        frames, height, width, side=32, group=2, min_pixels=4_096, max_pixels=98_304
    )
    assert all(side >= 32 and side % 32 == 0 for side in new)


def test_all_frames_of_a_list_are_used_and_timed_by_its_rate() -> None:
    found = load(list(FRAMES[:7]), fps=4.0)
    np.testing.assert_array_equal(found.frames, FRAMES[:7])
    assert found.timestamps == (0.125, 0.625, 1.125, 1.5)
    assert grid_of(found.frames, AS_IS.pixels) == (4, 4, 6)
    same = load(FRAMES[:7], sample_fps=4.0)
    np.testing.assert_array_equal(same.frames, found.frames)
    assert same.timestamps == found.timestamps


def test_a_list_without_a_rate_counts_as_sampled_at_the_settings_rate() -> None:
    assert load(FRAMES[:4]).timestamps == (0.25, 1.25)


def test_num_frames_takes_frames_of_a_list_evenly(tmp_path: Path) -> None:
    paths = []
    for number, frame in enumerate(FRAMES[:9]):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(frame).save(paths[-1])
    found = load(paths, num_frames=5, fps=4.0)
    np.testing.assert_array_equal(found.frames, FRAMES[[0, 2, 4, 6, 8]])
    assert found.timestamps == (0.25, 1.25, 2.0)


def test_frames_are_resized_by_pil_bicubic() -> None:
    settings = VideoSettings(pixels=PixelSettings(min_pixels=4_096, max_pixels=4 * 64 * 64))
    found = load([picture(100, 100, seed) for seed in range(4)], settings)
    for seed, frame in enumerate(found.frames):
        wanted = Image.fromarray(picture(100, 100, seed)).resize((64, 64), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(frame, np.asarray(wanted))


def test_own_limits_of_a_video_are_kept() -> None:
    frames = [picture(256, 256, 0)] * 4
    for options in ({"max_pixels": 4_096}, {"total_pixels": 4 * 4_096}):
        assert load(frames, VideoSettings(), **options).frames.shape == (4, 64, 64, 3)
    small = [picture(32, 32, 0)] * 4
    assert load(small, VideoSettings(), min_pixels=4_096).frames.shape == (4, 64, 64, 3)


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "mpeg4"), ("mp4", "libx264"), ("webm", "libvpx-vp9"), ("matroska", "libx264")],
)
def test_a_file_gives_the_sampled_frames_of_pyav(
    container: str, codec: str, tmp_path: Path
) -> None:
    import av

    path = tmp_path / "clip.bin"
    path.write_bytes(video_file(FRAMES, container, codec, rate=10))
    with av.open(str(path)) as file:
        every = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert len(every) == 24
    found = load(path)
    # 24 frames at 10 per second, 2 wanted per second: int(2.4 * 2) = 4
    np.testing.assert_array_equal(found.frames, [every[index] for index in (0, 8, 15, 23)])
    assert found.timestamps == (0.4, 1.9)
    for source in (path.read_bytes(), path.as_uri()):
        np.testing.assert_array_equal(load(source).frames, found.frames)
    url = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    more = load(url, num_frames=5)
    np.testing.assert_array_equal(more.frames, [every[index] for index in (0, 6, 12, 17, 23)])
    half = load(path, fps=5.0)
    indices = np.linspace(0, 23, 12).round().astype(int).tolist()
    np.testing.assert_array_equal(half.frames, [every[index] for index in indices])
    assert half.timestamps == tuple(group_times(indices, 10.0, 2))


def test_file_frames_are_those_of_transformers(theirs: Any, tmp_path: Path) -> None:
    from transformers.video_utils import read_video_pyav

    path = tmp_path / "clip.mp4"
    path.write_bytes(video_file(FRAMES, rate=12))
    stand_in = SimpleNamespace(fps=2, min_frames=4, max_frames=768)

    def sample(metadata: Any) -> Any:
        return theirs.Qwen3VLVideoProcessor.sample_frames(stand_in, metadata, fps=3)

    wanted, metadata = read_video_pyav(str(path), sample)
    found = load(path, fps=3.0)
    np.testing.assert_array_equal(found.frames, wanted)
    assert metadata.fps == 12.0


def test_without_pyav_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match=r"pip install 'qwen3vl-jax\[video\]'"):
        load(b"\0\0\0\x18ftypisom\0\0\0\0")
    assert load(FRAMES[:4]).frames.shape == (4, 64, 96, 3)


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ([], {}, "an empty video"),
        (FRAMES[:0], {}, "an empty video"),
        (FRAMES[:1], {}, "1 of 1 frames wanted; at least 2"),
        (FRAMES[:4], {"num_frames": 5}, "5 of 4 frames wanted"),
        (np.zeros((800, 1, 1, 3), np.uint8), {}, "800 of 800 frames wanted; .* at most 768"),
        ([FRAMES[0], FRAMES[1][:60]], {}, "frame 1 is 96 x 60, the first 96 x 64"),
        ([FRAMES[0], "missing.png"], {}, "'missing.png': no such file"),
        (np.zeros((4, 3, 8, 8), np.uint8), {}, r"an array of shape \(3, 8, 8\) is not a picture"),
        (np.zeros((4, 1, 300, 3), np.uint8), {}, "aspect ratio over 200"),
        (b"", {}, "0 bytes"),
        (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/x.ts\n", {}, "not an MP4, MOV, MKV, WebM or AVI"),
        (b"\0\0\0\x18ftypisom" + b"\0" * 50, {}, "truncated or damaged"),
        ("missing.mp4", {}, "no such file"),
        ("https://example.org/a.mp4", {}, "URLs are not fetched"),
        (42, {}, "is not a video"),
    ],
)
def test_what_is_no_video_is_refused(source: object, options: dict[str, Any], says: str) -> None:
    with pytest.raises(MediaError, match=says) as caught:
        load(source, **options)
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        (b"any", {"sample_fps": 2.0}, "sample_fps is for lists of frames"),
        (FRAMES[:4], {"sample_fps": 2.0, "fps": 2.0}, "fps or sample_fps, not both"),
        (video_file(FRAMES[:4]), {"fps": 2.0, "num_frames": 2}, "exclude each other"),
    ],
)
def test_contradicting_options_are_refused(
    source: object, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        load(source, **options)


def test_caps_hold_before_frames_are_decoded() -> None:
    data = video_file(FRAMES)
    for limits, says in (
        (Limits(max_video_bytes=1_000), "1,000 are allowed"),
        (Limits(max_video_frames=23), "more than 23 frames"),
        (Limits(max_pixels=64 * 96 - 1), "6,144 pixels, but 6,143 are allowed"),
    ):
        with pytest.raises(MediaError, match=says):
            load_video(VideoPart(data), AS_IS, limits)
    counted = video_file(FRAMES, "webm", "libvpx")  # states no number of frames
    with pytest.raises(MediaError, match="more than 23 frames"):
        load_video(VideoPart(counted), AS_IS, Limits(max_video_frames=23))


def test_a_codec_off_the_list_is_refused() -> None:
    with pytest.raises(MediaError, match="codec is not one of"):
        load(video_file(FRAMES[:4], "matroska", "ffv1"))


def test_a_truncated_file_is_refused() -> None:
    whole = video_file(FRAMES, "avi")
    for share in (0.02, 0.3, 0.7):
        with pytest.raises(MediaError):
            load(whole[: int(len(whole) * share)])


@pytest.mark.parametrize(("container", "codec"), [("mp4", "mpeg4"), ("webm", "libvpx")])
def test_a_damaged_file_is_a_clip_or_a_media_error(container: str, codec: str) -> None:
    whole = video_file(FRAMES[:8], container, codec)
    messages = []
    for data in mutations(whole, 100, seed=7):
        try:
            found = load_video(VideoPart(data), AS_IS, Limits(max_pixels=1 << 20))
        except MediaError as error:
            messages.append(str(error))
        else:
            assert found.frames.ndim == 4
    assert len(messages) >= 20
    assert not any("0x" in message or "\n" in message for message in messages)
