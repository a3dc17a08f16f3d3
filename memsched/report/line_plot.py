"""One curve over a logarithmic axis, as SVG that stands in a page."""

import dataclasses
import html
import math
from collections.abc import Callable, Sequence

# As wide as the window of a telephone, where its words must still be read.
WIDTH, HEIGHT = 400.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 76.0, 36.0, 30.0, 40.0
TICKS = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Curve:
    """Points of a curve; `x` is positive and rises."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]


def plot_svg(curve: Curve, marks: Sequence[float], text: Callable[[float], str]) -> str:
    """A curve of at least one point.

    Args:
        marks: values of x that get a dotted line, if they are in range.
        text: what is written at a value of x.
    """
    low, high = curve.x[0], curve.x[-1]
    top = max(curve.y) or 1.0

    def across(x: float) -> float:
        share = math.log(x / low) / math.log(high / low) if high > low else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    pairs = list(zip(curve.x, curve.y, strict=True))
    parts = [
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" '
        f'aria-label="{html.escape(curve.name)}" '
        'fill="currentColor" font-size="13">',
        f'<text x="{LEFT}" y="18" font-weight="bold">{html.escape(curve.name)}</text>',
    ]
    for index in range(TICKS):
        y = top * index / (TICKS - 1)
        x = low * (high / low) ** (index / (TICKS - 1))
        parts += [
            _line(LEFT, down(y), WIDTH - RIGHT, down(y), 'stroke-opacity=".15"'),
            _text(LEFT - 8, down(y) + 4, "end", f"{y:.3g}"),
            _text(across(x), HEIGHT - 14, "middle", text(x)),
        ]
    for mark in marks:
        if low <= mark <= high:
            at = across(mark)
            parts.append(_line(at, TOP, at, HEIGHT - BOTTOM, 'stroke-dasharray="3 4"'))
    points = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in pairs)
    parts.append(f'<polyline points="{points}" fill="none" stroke="#3b82f6" stroke-width="2.5"/>')
    for x, y in pairs:
        title = html.escape(f"{text(x)}: {y:.4g}")
        parts.append(
            f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="4" fill="#3b82f6">'
            f"<title>{title}</title></circle>"
        )
    return "".join(parts) + "</svg>\n"


def _line(x1: float, y1: float, x2: float, y2: float, more: str) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        f'stroke="currentColor" {more}/>'
    )


def _text(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
