"""The processor: transformers' ids and pixels, padded batches, chat turns, settings, no torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tokenizers
from pictures import clip, picture
from PIL import Image

from qwen3vl_jax.errors import ConfigError, MediaError, PromptError, UsageError
from qwen3vl_jax.processing.media_config import (
    Limits,
    PixelSettings,
    VideoSettings,
    load_image_settings,
    load_video_settings,
)
from qwen3vl_jax.processing.processor import Processor

DIRECTORY = tiny.DATA / "dense"
LEGACY = Processor.from_pretrained(DIRECTORY)
NEWER = Processor.from_pretrained(DIRECTORY, video_prompt="hf>=5.10")
BACKEND = tokenizers.Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))
IMAGE_PAD, VIDEO_PAD, END = 396, 397, 386
Parts = list[dict[str, Any]]


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def image(height: int, width: int, seed: int) -> dict[str, Any]:
    return {"type": "image", "image": Image.fromarray(picture(height, width, seed))}


def video(frames: int, height: int, width: int, seed: int) -> dict[str, Any]:
    return {"type": "video", "video": list(clip(frames, height, width, seed)), "fps": 4.0}


def user(*parts: dict[str, Any]) -> Parts:
    return [{"role": "user", "content": list(parts)}]


BATCH = [
    user(image(90, 140, 1), text("Describe the image.")),
    user(text("The quick brown fox jumps over the lazy dog. You are a helpful assistant.")),
    user(image(64, 96, 2), image(130, 70, 3), text("Compare the two images in detail, please.")),
]
TEXTS = [user(text("The quick brown fox jumps over the lazy dog.")), user(text("Describe"))]
# What transformers 5.23 was asked when it made the stored cases.
STORED: dict[str, Any] = {
    "text": user(text("The quick brown fox")),
    "text_batch_left": TEXTS,
    "text_batch_right": TEXTS,
    "image": user(image(90, 140, 1), text("Describe the image.")),
    "two_images": user(
        image(64, 96, 2), text(" and "), image(130, 70, 3), text("Compare the two images.")
    ),
    "video": user(video(8, 64, 96, 4), text("How many seconds?")),
    "video_odd": user(video(7, 70, 60, 6), text("How many seconds?")),
    "image_video": user(image(64, 64, 5), video(4, 64, 64, 7), text("Compare.")),
    "batch_left": BATCH,
    "batch_right": BATCH,
}


@pytest.mark.parametrize("case", STORED)
def test_the_arrays_are_those_of_transformers(case: str) -> None:
    wanted = tiny.inputs(case)
    found = NEWER(STORED[case], padding_side="right" if case.endswith("right") else "left")
    assert set(found) == set(wanted)
    for name, array in found.items():
        assert array.shape == wanted[name].shape, name
        if name.startswith("pixel_values"):
            assert array.dtype == np.float32
            difference = np.abs(array - wanted[name]).max() * 127.5
            # The stored pixels are torchvision's, whose bicubic is up to 2 levels of 255 off.
            assert difference <= (0.001 if case in ("video", "image_video") else 2.01)
        else:
            assert array.dtype == np.int64
            np.testing.assert_array_equal(array, wanted[name], err_msg=name)


def frames_text(times: list[str], tokens: int) -> str:
    pads = "<|video_pad|>" * tokens
    return "".join(f"<{time} seconds><|vision_start|>{pads}<|vision_end|>" for time in times)


@pytest.mark.parametrize("before", ["", "Look: ", "a<", "\n"])
def test_both_video_prompts_have_the_ids_of_the_whole_text(before: str) -> None:
    messages = user(text(before), video(7, 64, 64, 1), video(2, 32, 96, 2), text(" What?"))
    # 7 frames at 4 per second; a clip of 2 frames of 32 x 96 grows to 4,096 pixels: 32 x 96 again
    first = frames_text(["0.1", "0.6", "1.1", "1.5"], 4)
    second = frames_text(["0.1"], 3)
    middle = {
        LEGACY: first + second,
        NEWER: f"<|vision_start|>{first}<|vision_end|><|vision_start|>{second}<|vision_end|>",
    }
    for processor, inside in middle.items():
        whole = f"<|im_start|>user\n{before}{inside} What?<|im_end|>\n<|im_start|>assistant\n"
        out = processor(messages)
        assert out["input_ids"].tolist() == [BACKEND.encode(whole).ids]
        assert out["video_grid_thw"].tolist() == [[4, 4, 4], [1, 2, 6]]
        assert ((out["mm_token_type_ids"] == 2) == (out["input_ids"] == VIDEO_PAD)).all()


def test_prompts_are_those_of_transformers_own_processor() -> None:
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    class Theirs(Qwen3VLProcessor):
        """Needs no torch: the check that asks for a video processor accepts that there is none."""

        def check_argument_for_proper_class(self, name: str, value: Any) -> Any:
            if name == "video_processor":
                return type(value)
            return super().check_argument_for_proper_class(name, value)

    theirs = Theirs(
        Qwen2VLImageProcessorPil.from_pretrained(DIRECTORY),
        AutoTokenizer.from_pretrained(DIRECTORY),
        None,
        chat_template=(DIRECTORY / "chat_template.jinja").read_text(),
    )
    random = np.random.default_rng(3)
    for number in range(6):
        sizes = random.integers(20, 300, (number % 3 + 1, 2)).tolist()
        parts = [image(*size, seed=number) for size in sizes] + [text(f"No. {number}: é <fox>\n")]
        prompt = theirs.apply_chat_template(
            user(*parts), add_generation_prompt=True, tokenize=False
        )
        pictures = [part["image"] for part in parts if part["type"] == "image"]
        wanted = theirs(text=[prompt], images=pictures, return_tensors="np")
        found = LEGACY(user(*parts))
        for name in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw"):
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
        assert found["pixel_values"].tobytes() == wanted["pixel_values"].tobytes()


def test_a_padded_row_is_the_row_alone() -> None:
    alone = [LEGACY(row)["input_ids"][0] for row in BATCH]
    for side in ("left", "right"):
        out = LEGACY(BATCH, padding_side=side)
        for row, mask, wanted in zip(out["input_ids"], out["attention_mask"], alone, strict=True):
            np.testing.assert_array_equal(row[mask == 1], wanted)
            assert (row[mask == 0] == LEGACY.tokenizer.pad_token_id).all()
            assert mask[-1 if side == "left" else 0] == 1
            assert np.abs(np.diff(mask)).sum() <= 1


def test_generation_prompt_and_open_last_message() -> None:
    messages = [*user(text("A?")), {"role": "assistant", "content": "It is"}]
    start = "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\nIt is"
    for options, wanted in (
        ({"continue_final_message": True}, start),
        ({"add_generation_prompt": False}, start + "<|im_end|>\n"),
        ({}, start + "<|im_end|>\n<|im_start|>assistant\n"),
    ):
        assert LEGACY(messages, **options)["input_ids"].tolist() == [BACKEND.encode(wanted).ids]
    numbered = LEGACY(user(image(64, 64, 0)), add_vision_id=True)
    assert LEGACY.decode(numbered["input_ids"][0]).startswith("user\nPicture 1: ")


def test_wrong_arguments_are_usage_errors() -> None:
    for options in (
        {"padding_side": "top"},
        {"add_generation_prompt": True, "continue_final_message": True},
    ):
        with pytest.raises(UsageError):
            LEGACY(TEXTS, **options)
    for settings in (
        {"video_prompt": "new"},
        {"min_pixels": 9, "max_pixels": 8},
        {"max_pixels": 0},
    ):
        with pytest.raises(UsageError):
            Processor.from_pretrained(DIRECTORY, **settings)


QUESTION = user(image(64, 96, 2), text("What is this?"))
ANSWER = BACKEND.encode("The image of a fox.").ids
FOLLOW_UP = user(image(40, 40, 3), text("And <|im_end|> this?"))


@pytest.mark.parametrize("end", [[], [END], [384]], ids=["no end", "im_end", "endoftext"])
@pytest.mark.parametrize("held", [None, 0, 3])
def test_a_next_turn_continues_the_ids_of_the_whole_conversation(
    end: list[int], held: int | None
) -> None:
    first = LEGACY(QUESTION)
    turn = LEGACY.continuation(QUESTION, ANSWER + end, FOLLOW_UP, held=held)
    kept = ANSWER if held is None else ANSWER[:held]
    whole = [*QUESTION, {"role": "assistant", "content": "The image of a fox."}, *FOLLOW_UP]
    wanted = LEGACY(whole)
    ids = np.concatenate([first["input_ids"][0], kept, turn["input_ids"][0]])
    np.testing.assert_array_equal(ids, wanted["input_ids"][0])
    for name in ("pixel_values", "image_grid_thw"):
        joined = np.concatenate([first[name], turn[name]])
        np.testing.assert_array_equal(joined, wanted[name])
    assert turn["attention_mask"].all()
    assert turn["mm_token_type_ids"].sum() == 4


def test_a_chat_of_three_turns_continues_again() -> None:
    whole = [*user(text("A?")), {"role": "assistant", "content": "The dog."}, *user(text("B?"))]
    third = LEGACY.continuation(whole, BACKEND.encode("The fox.").ids, user(text("C?")))
    full = LEGACY([*whole, {"role": "assistant", "content": "The fox."}, *user(text("C?"))])
    np.testing.assert_array_equal(
        full["input_ids"][0, -third["input_ids"].shape[1] :], third["input_ids"][0]
    )
    start = LEGACY(whole)["input_ids"].shape[1] + len(BACKEND.encode("The fox.").ids)
    assert start + third["input_ids"].shape[1] == full["input_ids"].shape[1]


def changed(tmp_path: Path, **files: object) -> Path:
    """The checkpoint's processing files with some replaced (names without .json)."""
    for path in DIRECTORY.iterdir():
        if path.suffix in (".json", ".jinja") and "index" not in path.name:
            shutil.copyfile(path, tmp_path / path.name)
    for name, value in files.items():
        path = tmp_path / f"{name}.json"
        if value is None:
            path.unlink()
        else:
            path.write_text(json.dumps(value))
    return tmp_path


def test_a_template_that_rewrites_earlier_turns_cannot_be_continued(tmp_path: Path) -> None:
    changed(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    )
    with pytest.raises(PromptError, match="rewrites earlier turns"):
        Processor.from_pretrained(tmp_path).continuation(TEXTS[1], [65], TEXTS[0])


def test_a_continuation_is_of_one_conversation_and_of_ids_that_there_are() -> None:
    with pytest.raises(UsageError, match="not of a batch"):
        LEGACY.continuation(BATCH, ANSWER, FOLLOW_UP)
    with pytest.raises(UsageError, match=r"held is 9, but the answer has 1 ids"):
        LEGACY.continuation(QUESTION, [65, END], FOLLOW_UP, held=9)


def test_a_prompt_over_the_context_is_refused_before_its_pixels_are_laid_out() -> None:
    few = Processor.from_pretrained(DIRECTORY, limits=Limits(max_prompt_tokens=20))
    with pytest.raises(PromptError, match=r"at least 24 tokens, but the model's context is 20"):
        few(user(image(64, 96, 0), image(64, 96, 1), image(64, 96, 2), image(64, 96, 3)))
    assert few(user(image(64, 96, 0)))["input_ids"].shape[1] <= 20


def test_pixel_limits_of_processor_and_of_one_picture() -> None:
    part = image(256, 256, 0)
    for processor, messages in (
        (Processor.from_pretrained(DIRECTORY, max_pixels=4_096), user(part)),
        (
            Processor.from_pretrained(DIRECTORY, max_pixels=2_000),
            user(part | {"max_pixels": 4_096}),
        ),
        (LEGACY, user(part | {"max_pixels": 4_096})),
    ):
        assert processor(messages)["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert LEGACY(user(part))["image_grid_thw"].tolist() == [[1, 16, 16]]


def test_a_bad_picture_is_a_media_error() -> None:
    with pytest.raises(MediaError, match="no such file"):
        LEGACY(user({"type": "image", "image": "missing.png"}))


def test_settings_come_from_the_checkpoint(tmp_path: Path) -> None:
    assert load_image_settings(DIRECTORY) == PixelSettings(4_096, 65_536)
    assert load_video_settings(DIRECTORY).pixels.max_pixels == 98_304
    older = {"min_pixels": 7, "size": {"shortest_edge": 1, "longest_edge": 9}, "max_pixels": 8}
    newer = {
        "image_processor": older | {"resample": 3, "do_pad": False, "crop_size": None},
        "video_processor": {"fps": 4, "cap_pixels_per_frame": True, "image_mean": [0, 0.5, 1]},
    }
    changed(tmp_path, preprocessor_config=older)
    assert load_image_settings(tmp_path) == PixelSettings(7, 8)
    changed(tmp_path, processor_config=newer)
    assert load_image_settings(tmp_path) == PixelSettings(7, 8)
    found = load_video_settings(tmp_path)
    assert (found.fps, found.cap_pixels_per_frame) == (4.0, True)
    assert found.pixels.mean == (0.0, 0.5, 1.0)


def test_without_preprocessor_files_the_released_values_hold(tmp_path: Path) -> None:
    changed(tmp_path, preprocessor_config=None, video_preprocessor_config=None)
    processor = Processor.from_pretrained(tmp_path)
    assert processor.image_settings == PixelSettings(65_536, 16_777_216)
    assert processor.video_settings == VideoSettings(pixels=PixelSettings(4_096, 25_165_824))
    assert processor.video_settings.fps == 2.0


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"do_rescale": False}, "do_rescale False is not computed here"),
        ({"resample": 2}, "resample 2 is not computed here"),
        ({"do_center_crop": True}, "do_center_crop True"),
        ({"sharpen": 1}, "setting 'sharpen' is not known here"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"patch_size": True}, "patch_size is True, not a whole number"),
        ({"merge_size": "2"}, "merge_size is '2', not a whole number"),
        ({"size": 5}, "size is 5, not an object"),
        ({"size": {"height": 1, "width": 2}}, "wanted shortest_edge and longest_edge"),
        ({"size": {"shortest_edge": 9, "longest_edge": 8}}, "min_pixels 9 is larger than"),
        ({"max_pixels": 1 << 50}, "max_pixels .* is 1,125,899,906,842,624"),
        ({"image_mean": [0.5, 0.5]}, "image_mean .* not a list of 3"),
        ({"image_std": [0.5, 0, 0.5]}, "divide by 0"),
        ({"rescale_factor": "x"}, "rescale_factor"),
    ],
)
def test_a_setting_that_is_not_computed_is_named(
    values: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        load_image_settings(changed(tmp_path, preprocessor_config=values))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"fps": 0}, "fps is 0"),
        ({"fps": "2"}, "fps is '2'"),
        ({"num_frames": 8}, "num_frames 8 is not computed here"),
        ({"do_sample_frames": False}, "do_sample_frames False"),
        ({"min_frames": 9, "max_frames": 8}, "min_frames is 9"),
        ({"cap_pixels_per_frame": 1}, "cap_pixels_per_frame is 1"),
        ({"max_video_tokens": True}, "max_video_tokens is True"),
    ],
)
def test_a_video_setting_that_is_not_computed_is_named(
    values: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        load_video_settings(changed(tmp_path, video_preprocessor_config=values))


def test_the_tokenizer_serves_transformers_streamer() -> None:
    from transformers import TextStreamer

    pieces: list[str] = []

    class Collector(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)

    streamer = Collector(LEGACY.tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.put(np.array(LEGACY(QUESTION)["input_ids"][0]))
    for number in [*BACKEND.encode("é fox\n\u4f60 jumps").ids, END]:
        streamer.put(np.array([number]))
    streamer.end()
    assert "".join(pieces) == "é fox\n\u4f60 jumps"


def test_processing_imports_neither_torch_nor_jax_and_little_of_transformers() -> None:
    code = f"""
import sys
from qwen3vl_jax.processing.processor import Processor
Processor.from_pretrained({str(DIRECTORY)!r})([{{"role": "user", "content": "x"}}])
bad = {{"torch", "torchvision", "jax", "flax", "av", "transformers.models.auto"}}
print(*sorted(bad & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
