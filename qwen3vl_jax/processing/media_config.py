"""What a checkpoint's preprocessor files say about pictures and videos, typed and range-checked.

Without these files the values of the released Qwen3-VL models hold; they are the defaults below.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from qwen3vl_jax.errors import ConfigError
from qwen3vl_jax.processing.sources import read_json_object

MAX_JSON_BYTES = 1 << 20
LARGEST_PIXELS = 1 << 40
RGB = 3


def check_range(name: str, value: int, low: int, high: int) -> None:
    """ConfigError unless `low <= value <= high`."""
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value:,}, but {low:,} to {high:,} is allowed")


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Caps on what is read from outside; every one holds before the thing is decoded."""

    max_file_bytes: int = 64 << 20
    max_pixels: int = 64 << 20
    max_video_bytes: int = 4 << 30
    max_video_frames: int = 200_000
    max_text_characters: int = 4 << 20
    max_prompt_tokens: int = 262_144


@dataclasses.dataclass(frozen=True, slots=True)
class PixelSettings:
    """How pixels become patches. For a video, the limits count frames x height x width."""

    min_pixels: int = 65_536
    max_pixels: int = 16_777_216
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255

    def __post_init__(self) -> None:
        """Refuse values out of range, by name."""
        for name in ("patch_size", "temporal_patch_size", "merge_size"):
            check_range(name, getattr(self, name), 1, 256)
        check_range("min_pixels (size.shortest_edge)", self.min_pixels, 1, LARGEST_PIXELS)
        check_range("max_pixels (size.longest_edge)", self.max_pixels, 1, LARGEST_PIXELS)
        if self.min_pixels > self.max_pixels:
            raise ConfigError(
                f"min_pixels {self.min_pixels:,} is larger than max_pixels {self.max_pixels:,}"
            )

    @property
    def side(self) -> int:
        """Every resized side is a multiple of this: the pixels that one token is wide."""
        return self.patch_size * self.merge_size

    @property
    def patch_values(self) -> int:
        """Numbers in one row of `pixel_values`."""
        return RGB * self.temporal_patch_size * self.patch_size**2


@dataclasses.dataclass(frozen=True, slots=True)
class VideoSettings:
    """How a video is sampled, and how its frames become patches."""

    pixels: PixelSettings = PixelSettings(min_pixels=4_096, max_pixels=25_165_824)
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 768

    def __post_init__(self) -> None:
        """Refuse values out of range, by name."""
        if not 0 < self.fps <= 1_000:
            raise ConfigError(f"fps is {self.fps}, but more than 0 and at most 1,000 is allowed")
        check_range("max_frames", self.max_frames, 2, 100_000)
        check_range("min_frames", self.min_frames, 1, self.max_frames)
        check_range("max_video_tokens", self.max_video_tokens, 1, LARGEST_PIXELS)


# A setting that would change the numbers, and the only values that we compute. `None` is always
# "not set". 3 is PIL's bicubic filter.
FIXED: dict[str, tuple[Any, ...]] = {
    "do_resize": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "do_convert_rgb": (True,),
    "do_sample_frames": (True,),
    "do_center_crop": (False,),
    "do_pad": (False,),
    "resample": (3,),
    "num_frames": (),
    "max_duration": (),
}
# Settings without influence on the numbers, in any transformers version from 4.57 to 5.23.
IGNORED = frozenset(
    {
        *("processor_class", "image_processor_type", "video_processor_type", "auto_map"),
        *("feature_extractor_type", "crop_size", "pad_size", "size_divisor", "default_to_square"),
        *("data_format", "input_data_format", "device", "disable_grouping", "return_tensors"),
        *("return_metadata", "video_metadata", "max_image_size", "model_valid_processing_keys"),
    }
)


def load_image_settings(directory: Path) -> PixelSettings:
    """Picture settings of a checkpoint directory; the released values where it has no file.

    Raises:
        ConfigError: a value of the wrong type or out of range, or a setting that is not computed.
    """
    name, values = read_settings(directory, "image_processor", "preprocessor_config.json")
    return pixel_settings(name, values, PixelSettings(), extra=())


def load_video_settings(directory: Path) -> VideoSettings:
    """Video settings of a checkpoint directory; as `load_image_settings`."""
    own = ("fps", "min_frames", "max_frames", "cap_pixels_per_frame", "max_video_tokens")
    name, values = read_settings(directory, "video_processor", "video_preprocessor_config.json")
    released = VideoSettings()
    pixels = pixel_settings(name, values, released.pixels, extra=own)
    given = {key: values[key] for key in own if values.get(key) is not None}
    for key, value in given.items():
        wanted = {"fps": (int, float), "cap_pixels_per_frame": (bool,)}.get(key, (int,))
        if type(value) not in wanted:
            raise ConfigError(f"{name}: {key} is {value!r}, not of type {wanted[-1].__name__}")
    if "fps" in given:
        given["fps"] = float(given["fps"])
    return dataclasses.replace(released, pixels=pixels, **given)


def read_settings(directory: Path, section: str, file_name: str) -> tuple[str, dict[str, Any]]:
    """Name and content of the file that holds the settings: transformers 5 nests both in one."""
    nested = directory / "processor_config.json"
    if nested.exists():
        values = read_json_object(nested, max_bytes=MAX_JSON_BYTES, error=ConfigError)
        if isinstance(values.get(section), dict):
            return f"{nested.name}: {section}", values[section]
    path = directory / file_name
    if not path.exists():
        return "released settings", {}
    return path.name, read_json_object(path, max_bytes=MAX_JSON_BYTES, error=ConfigError)


def pixel_settings(
    name: str, values: dict[str, Any], released: PixelSettings, *, extra: tuple[str, ...]
) -> PixelSettings:
    """Pixel settings out of one preprocessor file; the caller reads the keys in `extra`."""
    found: dict[str, Any] = {}
    older: dict[str, Any] = {}  # names of transformers 4; where both are, they beat `size`
    for key, value in values.items():
        if value is None or key in IGNORED or key in extra:
            continue
        if key in FIXED:
            if value not in FIXED[key]:
                raise ConfigError(f"{name}: {key} {value!r} is not computed here; unset it")
        elif key == "size":
            found |= size_limits(name, value)
        elif key in ("min_pixels", "max_pixels"):
            older[key] = whole_number(f"{name}: {key}", value)
        elif key in ("patch_size", "temporal_patch_size", "merge_size"):
            found[key] = whole_number(f"{name}: {key}", value)
        elif key in ("image_mean", "image_std"):
            found[key.removeprefix("image_")] = three_numbers(f"{name}: {key}", value)
        elif key == "rescale_factor":
            found[key] = three_numbers(f"{name}: {key}", [value] * RGB)[0]
        else:
            raise ConfigError(f"{name}: the setting {key!r} is not known here; remove it")
    found |= older
    if 0.0 in found.get("std", ()):
        raise ConfigError(f"{name}: image_std {found['std']} would divide by 0")
    return dataclasses.replace(released, **found)


def size_limits(name: str, size: object) -> dict[str, int]:
    """`min_pixels` and `max_pixels` out of transformers' `size`."""
    if not isinstance(size, dict):
        raise ConfigError(f"{name}: size is {size!r}, not an object")
    size = {key: value for key, value in size.items() if value is not None}
    if set(size) != {"shortest_edge", "longest_edge"}:
        raise ConfigError(f"{name}: size has {sorted(size)}; wanted shortest_edge and longest_edge")
    return {
        "min_pixels": whole_number(f"{name}: size.shortest_edge", size["shortest_edge"]),
        "max_pixels": whole_number(f"{name}: size.longest_edge", size["longest_edge"]),
    }


def whole_number(name: str, value: object) -> int:
    """The value, if it is an int and no bool."""
    if type(value) is not int:
        raise ConfigError(f"{name} is {value!r}, not a whole number")
    return value


def three_numbers(name: str, value: object) -> tuple[float, ...]:
    """The value as three finite floats, one for each of red, green and blue."""
    if not isinstance(value, list) or len(value) != RGB:
        raise ConfigError(f"{name} is {value!r}, not a list of {RGB} numbers")
    if any(type(item) not in (int, float) or not math.isfinite(item) for item in value):
        raise ConfigError(f"{name} is {value!r}, which are not {RGB} finite numbers")
    return tuple(float(item) for item in value)
