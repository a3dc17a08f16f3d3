"""Colours of the page: what is written can be read on what it is written on, light and dark.

Contrast is that of WCAG 2: 4.5 for words, 3 for parts of a picture.
"""

import importlib.resources
import re
from collections.abc import Mapping

import pytest

ASSETS = importlib.resources.files("memsched.report") / "assets"
WORDS, PARTS = 4.5, 3.0
Colour = tuple[float, float, float]


def themes() -> dict[str, dict[str, Colour]]:
    """The variables of the style sheet; what the dark theme does not name is that of the other."""
    style = (ASSETS / "page.css").read_text("utf-8")
    light, dark = (
        {name: rgb(digits) for name, digits in re.findall(r"--(\w+): #([0-9a-f]{6});", block)}
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    )
    return {"light": light, "dark": light | dark}


def rgb(digits: str) -> Colour:
    red, green, blue = bytes.fromhex(digits)
    return red / 255, green / 255, blue / 255


def luminance(colour: Colour) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: Colour, other: Colour) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def over(top: Colour, share: float, ground: Colour) -> Colour:
    """A colour that covers another one by so much."""
    mixed = [share * a + (1 - share) * b for a, b in zip(top, ground, strict=True)]
    return mixed[0], mixed[1], mixed[2]


def shown_in(file: str, beginning: str, colours: Mapping[str, Colour]) -> set[str]:
    """The colours that a function of a script names."""
    script = (ASSETS / file).read_text("utf-8")
    found = re.search(rf"^{beginning}\b.*?^\}}", script, re.DOTALL | re.MULTILINE)
    assert found
    return set(re.findall(r"'(\w+)'", found[0])) & colours.keys()


def test_contrast_of_known_colours() -> None:
    assert contrast((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)) == pytest.approx(21.0)
    # The grey that is known as the palest one for words on white.
    assert contrast(rgb("767676"), rgb("ffffff")) == pytest.approx(4.54, abs=0.005)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_names_can_be_read_on_every_lane(theme: str) -> None:
    colours = themes()[theme]
    lanes = shown_in("plots.js", "const laneColor", colours)
    assert {"compute", "host", "nvme", "write"} == lanes
    for name in lanes:
        # As it is, as a block of many actions at its palest, and under the veil beside a pass.
        grounds = (
            colours[name],
            over(colours[name], 0.35, colours["shade"]),
            over(colours["paper"], 0.45, colours[name]),
        )
        for ground in grounds:
            assert contrast(colours["label"], ground) >= WORDS, (theme, name)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_can_be_read_on_every_ground(theme: str) -> None:
    colours = themes()[theme]
    for words in ("ink", "soft"):
        for ground in ("paper", "card", "shade"):
            assert contrast(colours[words], colours[ground]) >= WORDS, (theme, words, ground)
    assert contrast(colours["card"], colours["accent"]) >= WORDS


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_patterns_of_codecs_can_be_seen_on_every_cell_of_the_map(theme: str) -> None:
    colours = themes()[theme]
    cells = shown_in("map.js", "function mapClass", colours)
    assert {"unread", "spilled", "cache", "features", "pinned", "host", "nvme"} == cells
    for name in cells:
        assert contrast(colours["label"], colours[name]) >= PARTS, (theme, name)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_budget_can_be_read_over_whatever_memory_is_used_for(theme: str) -> None:
    colours = themes()[theme]
    parts = ("pinned", "streamed", "idle", "cache", "features", "inputs", "activations")
    for part in (*parts, "workspace", "shade"):
        ground = over(colours["card"], 0.85, colours[part])
        assert contrast(colours["budget"], ground) >= WORDS, (theme, part)
