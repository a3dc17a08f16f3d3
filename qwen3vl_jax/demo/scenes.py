"""What a demo picture shows: coloured shapes on a three by three board, and perhaps printed text.

A scene is plain data, in units of one thousandth of the picture's side, so that it can be drawn
at any size. Everything is drawn from the generator that is passed in: same seed, same scene.
"""

import dataclasses
import zlib

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring")
SIZES = ("small", "big")
CELLS = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
PALETTE = {
    "red": (212, 38, 38),
    "orange": (246, 140, 24),
    "yellow": (244, 220, 44),
    "green": (38, 156, 60),
    "blue": (40, 84, 214),
    "purple": (140, 48, 170),
    "black": (24, 24, 24),
    "white": (246, 246, 246),
}
COLOURS = tuple(PALETTE)
STYLES = ("plain", "bold", "slanted")
WORDS = (
    "apple", "arm", "baby", "bag", "ball", "bear", "bed", "bird", "boat", "book", "box",
    "bread", "bus", "cake", "car", "cat", "chair", "clock", "cloud", "cow", "cup", "dog",
    "door", "duck", "egg", "eye", "farm", "fire", "fish", "flag", "fox", "frog", "hand", "hat",
    "home", "horse", "house", "key", "king", "lamp", "leaf", "lion", "milk", "moon", "mouse",
    "nose", "open", "pen", "pig", "rain", "road", "rose", "ship", "shoe", "snow", "stop", "sun",
    "table", "tree", "water", "wolf", "zoo", "exit",
)  # fmt: skip
_BOARD = 1000
_COLOUR_JITTER = 14


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One shape. `cell` counts the board's nine cells from the top left, row by row."""

    shape: str
    colour: str
    size: str
    cell: int
    x: float
    y: float
    radius: float
    angle_degrees: float
    rgb: tuple[int, int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Caption:
    """A printed word or number, alone in one row (0 to 2) of the board."""

    text: str
    kind: str
    colour: str
    row: int
    x: float
    y: float
    height: float
    style: str
    upper: bool
    rgb: tuple[int, int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """A whole picture. `noise` is the standard deviation of the grain in grey levels."""

    items: tuple[Item, ...]
    caption: Caption | None
    background: tuple[int, int, int]
    shade: tuple[float, float]
    noise: float
    grain_seed: int


@dataclasses.dataclass(frozen=True, slots=True)
class SceneRange:
    """How crowded scenes may be: items, both ends included, and how often there is text."""

    items_min: int
    items_max: int
    caption_probability: float


def is_held_out_number(text: str) -> bool:
    """Whether a printed number is kept out of training: one in ten of those above 9."""
    return len(text) > 1 and zlib.crc32(text.encode()) % 10 == 3


def sample_scene(
    rng: np.random.Generator, limits: SceneRange, *, held_out_numbers: bool = False
) -> Scene:
    """A random scene; captions with held-out numbers only where they are asked for."""
    background = _background(rng)
    colours = _visible_colours(background)
    caption = None
    if rng.random() < limits.caption_probability:
        caption = _caption(rng, _readable(colours, background), held_out_numbers=held_out_numbers)
    rows = [row for row in range(3) if caption is None or row != caption.row]
    cells = [3 * row + column for row in rows for column in range(3)]
    count = int(rng.integers(limits.items_min, limits.items_max + 1))
    chosen = rng.permutation(cells)[: min(count, len(cells))]
    # Few colours and shapes in half of the scenes, so that counts above one are common.
    if rng.random() < 0.5:
        colours = _some(rng, colours, 2)
    shapes = _some(rng, SHAPES, 2) if rng.random() < 0.5 else SHAPES
    return Scene(
        items=tuple(_item(rng, int(cell), shapes, colours) for cell in sorted(chosen)),
        caption=caption,
        background=background,
        shade=(float(rng.uniform(-0.06, 0.06)), float(rng.uniform(-0.06, 0.06))),
        noise=float(rng.choice([0.0, rng.uniform(0.0, 6.0)])),
        grain_seed=int(rng.integers(2**31)),
    )


def _some(rng: np.random.Generator, values: tuple[str, ...], count: int) -> tuple[str, ...]:
    return tuple(values[i] for i in rng.permutation(len(values))[:count])


def _background(rng: np.random.Generator) -> tuple[int, int, int]:
    """Mostly light paper, sometimes grey, sometimes dark; only slightly tinted."""
    kind = rng.random()
    level = (
        rng.uniform(225, 256)
        if kind < 0.6
        else rng.uniform(110, 150)
        if kind < 0.75
        else rng.uniform(0, 60)
    )
    tint = rng.uniform(-12, 12, size=3)
    red, green, blue = (int(value) for value in np.clip(level + tint, 0, 255))
    return red, green, blue


def _visible_colours(background: tuple[int, int, int]) -> tuple[str, ...]:
    level = sum(background) / 3
    hidden = {"white"} if level > 200 else {"black"} if level < 80 else set()
    return tuple(colour for colour in COLOURS if colour not in hidden)


def _readable(colours: tuple[str, ...], background: tuple[int, int, int]) -> tuple[str, ...]:
    """Colours that differ from the background in brightness, not in hue alone: letters are thin."""
    paper = _brightness(background)
    return tuple(colour for colour in colours if abs(_brightness(PALETTE[colour]) - paper) > 55)


def _brightness(rgb: tuple[int, int, int]) -> float:
    return 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2]


def _jittered(rng: np.random.Generator, colour: str) -> tuple[int, int, int]:
    jitter = rng.integers(-_COLOUR_JITTER, _COLOUR_JITTER + 1, size=3)
    red, green, blue = (int(value) for value in np.clip(np.array(PALETTE[colour]) + jitter, 0, 255))
    return red, green, blue


def _item(
    rng: np.random.Generator, cell: int, shapes: tuple[str, ...], colours: tuple[str, ...]
) -> Item:
    size = SIZES[int(rng.integers(2))]
    radius, shift = (rng.uniform(128, 156), 18.0) if size == "big" else (rng.uniform(64, 86), 60.0)
    row, column = divmod(cell, 3)
    step = _BOARD / 3
    colour = colours[int(rng.integers(len(colours)))]
    return Item(
        shape=shapes[int(rng.integers(len(shapes)))],
        colour=colour,
        size=size,
        cell=cell,
        x=float((column + 0.5) * step + rng.uniform(-shift, shift)),
        y=float((row + 0.5) * step + rng.uniform(-shift, shift)),
        radius=float(radius),
        angle_degrees=float(rng.uniform(-10, 10)),
        rgb=_jittered(rng, colour),
    )


def _caption(
    rng: np.random.Generator, colours: tuple[str, ...], *, held_out_numbers: bool
) -> Caption:
    kind = "word" if rng.random() < 0.5 else "number"
    text = (
        WORDS[int(rng.integers(len(WORDS)))] if kind == "word" else _number(rng, held_out_numbers)
    )
    colour = colours[int(rng.integers(len(colours)))]
    row = int(rng.integers(3))
    return Caption(
        text=text,
        kind=kind,
        colour=colour,
        row=row,
        x=float(_BOARD / 2 + rng.uniform(-40, 40)),
        y=float((row + 0.5) * _BOARD / 3 + rng.uniform(-25, 25)),
        height=float(rng.uniform(235, 275)),
        style=STYLES[int(rng.integers(len(STYLES)))],
        upper=bool(rng.random() < 0.3),
        rgb=_jittered(rng, colour),
    )


def _number(rng: np.random.Generator, held_out: bool) -> str:
    while True:
        digits = int(rng.choice([1, 2, 3], p=[0.3, 0.4, 0.3]))
        text = str(int(rng.integers(0 if digits == 1 else 10 ** (digits - 1), 10**digits)))
        if is_held_out_number(text) == held_out:
            return text
