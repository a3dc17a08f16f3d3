"""Draws a scene: anti-aliased shapes and text on slightly shaded, slightly grainy paper.

Fonts: the scalable font that comes inside Pillow (Aileron), plain, thickened and slanted.
"""

import functools
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from qwen3vl_jax.demo.scenes import Caption, Item, Scene

SIDE_PX = 96
_OVERSAMPLING = 3


def render(scene: Scene, *, side_px: int = SIDE_PX) -> UInt8[np.ndarray, "side side 3"]:
    """The scene as a square RGB picture; drawn three times larger and reduced."""
    large_px = side_px * _OVERSAMPLING
    image = Image.new("RGB", (large_px, large_px), scene.background)
    draw = ImageDraw.Draw(image)
    for item in scene.items:
        _draw_item(draw, item, large_px / 1000)
    if scene.caption is not None:
        _draw_caption(image, scene.caption, large_px / 1000)
    reduced = image.resize((side_px, side_px), Image.Resampling.BOX)
    return _on_paper(np.asarray(reduced), scene)


def _on_paper(
    pixels: UInt8[np.ndarray, "side side 3"], scene: Scene
) -> UInt8[np.ndarray, "side side 3"]:
    side_px = pixels.shape[0]
    ramp = np.linspace(-1.0, 1.0, side_px, dtype=np.float32)
    light = (
        1.0
        + np.float32(scene.shade[0]) * ramp[:, None]
        + np.float32(scene.shade[1]) * ramp[None, :]
    )
    shaded = pixels.astype(np.float32) * light[:, :, None]
    if scene.noise > 0:
        rng = np.random.default_rng(scene.grain_seed)
        shaded += np.float32(scene.noise) * rng.standard_normal(pixels.shape, dtype=np.float32)
    return np.clip(np.rint(shaded), 0, 255).astype(np.uint8)


def _draw_item(draw: ImageDraw.ImageDraw, item: Item, scale: float) -> None:
    x, y, radius = item.x * scale, item.y * scale, item.radius * scale
    box = (x - radius, y - radius, x + radius, y + radius)
    match item.shape:
        case "circle":
            draw.ellipse(box, fill=item.rgb)
        case "ring":
            draw.ellipse(box, outline=item.rgb, width=max(2, round(radius * 0.36)))
        case _:
            turn = math.radians(item.angle_degrees)
            corners = [
                (
                    x + radius * (px * math.cos(turn) - py * math.sin(turn)),
                    y + radius * (px * math.sin(turn) + py * math.cos(turn)),
                )
                for px, py in outline(item.shape)
            ]
            draw.polygon(corners, fill=item.rgb)


@functools.cache
def outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of a straight-edged shape of radius one around the origin, y downwards.

    Raises:
        ValueError: if the shape has no corners.
    """
    match shape:
        case "square":
            return ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85))
        case "triangle":
            return ((0.0, -1.0), (1.0, 0.85), (-1.0, 0.85))
        case "diamond":
            return ((0.0, -1.1), (0.75, 0.0), (0.0, 1.1), (-0.75, 0.0))
        case "star":
            points = ((k * math.pi / 5, 1.1 if k % 2 == 0 else 0.45) for k in range(10))
            return tuple((r * math.sin(a), -r * math.cos(a)) for a, r in points)
        case "cross":
            arm, end = 0.32, 1.0
            return (
                (-arm, -end), (arm, -end), (arm, -arm), (end, -arm), (end, arm), (arm, arm),
                (arm, end), (-arm, end), (-arm, arm), (-end, arm), (-end, -arm), (-arm, -arm),
            )  # fmt: skip
        case _:
            raise ValueError(f"shape '{shape}' has no corners")


@functools.lru_cache(maxsize=256)
def _font(height_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(height_px)


def _draw_caption(image: Image.Image, caption: Caption, scale: float) -> None:
    mask = _text_mask(caption, round(caption.height * scale), round(960 * scale))
    left = _left_edge(caption, mask.width, image.width, scale)
    top = round(caption.y * scale - mask.height / 2)
    top = max(round(10 * scale), min(top, image.height - mask.height - round(10 * scale)))
    image.paste(caption.rgb, (left, top), mask)


def _left_edge(caption: Caption, text_width: int, picture_width: int, scale: float) -> int:
    margin = round(20 * scale)
    left = round(caption.x * scale - text_width / 2)
    return max(margin, min(left, picture_width - text_width - margin))


def letter_columns(caption: Caption) -> list[int]:
    """The column of the board (0 to 2) in which the middle of each letter stands."""
    large_px = SIDE_PX * _OVERSAMPLING
    scale = large_px / 1000
    height_px = round(caption.height * scale)
    width = _text_mask(caption, height_px, round(960 * scale)).width
    left = _left_edge(caption, width, large_px, scale)
    text = caption.text.upper() if caption.upper else caption.text
    font = _font(height_px)
    ends = [font.getlength(text[:count]) for count in range(len(text) + 1)]
    middles = [(ends[k] + ends[k + 1]) / 2 / ends[-1] * width + left for k in range(len(text))]
    return [min(2, int(3 * middle / large_px)) for middle in middles]


def _text_mask(caption: Caption, height_px: int, limit_px: int) -> Image.Image:
    """The text as a tight grey mask, at most `limit_px` wide."""
    text = caption.text.upper() if caption.upper else caption.text
    font = _font(height_px)
    stroke = max(1, round(height_px / 40)) if caption.style == "bold" else 0
    left, top, right, bottom = (round(v) for v in font.getbbox(text, stroke_width=stroke))
    lean = round((bottom - top) * 0.2) if caption.style == "slanted" else 0
    mask = Image.new("L", (right - left + lean + 2, bottom - top + 2))
    ImageDraw.Draw(mask).text((1 - left, 1 - top), text, fill=255, font=font, stroke_width=stroke)
    if lean:
        slope = lean / mask.height
        matrix = (1, slope, -lean, 0, 1, 0)
        mask = mask.transform(mask.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    if mask.width > limit_px:
        mask = mask.resize(
            (limit_px, round(mask.height * limit_px / mask.width)), Image.Resampling.BILINEAR
        )
    return mask
