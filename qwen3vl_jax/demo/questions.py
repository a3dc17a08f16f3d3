"""Questions about a scene, with the answer read from the scene's data.

A question is asked only if it has one right answer: what is called "the red circle" is there once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from qwen3vl_jax.demo import wordings
from qwen3vl_jax.demo.scenes import CELLS, COLOURS, SHAPES, Item, Scene

KINDS = (*(kind for kind in wordings.SEEN if ":" not in kind), "several")
ORDINALS = ("first", "second")
_NOUNS = ("object", "thing", "shape", "figure")
_PLURALS = {"cross": "crosses"}
Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """A worded question, its answer, its kind and the picture it is about (-1: all)."""

    kind: str
    text: str
    answer: str
    picture: int


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """What can be asked: a kind, the words for the slots of its template, and the answer.

    `wording` is the key of its templates, where that is not the kind.
    """

    kind: str
    slots: dict[str, str]
    answer: str
    wording: str = ""


def ask(
    rng: np.random.Generator,
    scenes: tuple[Scene, ...],
    kind: str,
    *,
    held_out_wording: bool = False,
) -> Question | None:
    """One question of a kind about one of the scenes, or None where the scenes allow none."""
    if kind == "which":
        fact = _which(rng, scenes)
        picture = -1
    else:
        picture = int(rng.integers(len(scenes)))
        fact = _FACTS[kind](rng, scenes[picture])
    if fact is None:
        return None
    return Question(
        kind, _worded(rng, fact, picture, len(scenes), held_out_wording), fact.answer, picture
    )


def _worded(
    rng: np.random.Generator, fact: Fact, picture: int, pictures: int, held_out: bool
) -> str:
    template = _pick(
        rng, (wordings.HELD_OUT if held_out else wordings.SEEN)[fact.wording or fact.kind]
    )
    named = wordings.ONE_PICTURE if pictures == 1 else wordings.PICTURES_OF_TWO[max(picture, 0)]
    place = _pick(rng, named)
    must_name = pictures > 1 and picture >= 0 and "{p}" not in template
    text = template.format(p=place, **fact.slots)
    if must_name:
        if rng.random() < 0.5:
            text = f"In {place}, {_lower_first(text)}"
        else:
            text = f"{text[:-1]} in {place}{text[-1]}"
    elif rng.random() < 0.12:
        lead_in = _pick(rng, wordings.LEAD_INS)
        if "{p}" not in lead_in or (pictures == 1 or picture >= 0):
            text = lead_in.format(p=place) + text
    if rng.random() < 0.15:
        text = _lower_first(text)
    return text.rstrip("?.") if rng.random() < 0.1 else text


def _pick(rng: np.random.Generator, values: Sequence[Value]) -> Value:
    return values[int(rng.integers(len(values)))]


def _lower_first(text: str) -> str:
    return text if text.startswith("I ") else text[0].lower() + text[1:]


def article(noun_phrase: str) -> str:
    """The phrase with "a" or "an" in front."""
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"


def plural(noun: str) -> str:
    """The plural of a shape or of a general noun."""
    return _PLURALS.get(noun, noun + "s")


def place_phrase(cell: int) -> str:
    """Where a cell of the board is, as said in a question."""
    name = CELLS[cell]
    match name:
        case "centre":
            return "in the centre"
        case "top" | "bottom":
            return f"at the {name}"
        case "left" | "right":
            return f"on the {name}"
        case _:
            return f"in the {name} corner"


def _place(rng: np.random.Generator, cell: int) -> str:
    if cell == 4:
        return _pick(rng, ("in the centre", "in the center", "in the middle"))
    phrase = place_phrase(cell)
    return (
        phrase.removesuffix(" corner")
        if phrase.endswith("corner") and rng.random() < 0.4
        else phrase
    )


def _names(rng: np.random.Generator, scene: Scene, item: Item, forms: tuple[str, ...]) -> list[str]:
    """The ways, among `forms`, to name an item that fit nothing else in the scene."""
    others = [other for other in scene.items if other is not item]
    noun = _pick(rng, _NOUNS)
    names = {
        "colour": f"the {item.colour} {noun}",
        "shape": f"the {item.shape}",
        "both": f"the {item.colour} {item.shape}",
        "place": f"the {noun} {_place(rng, item.cell)}",
    }
    unique = {
        "colour": all(other.colour != item.colour for other in others),
        "shape": all(other.shape != item.shape for other in others),
        "both": all((other.colour, other.shape) != (item.colour, item.shape) for other in others),
        "place": True,
    }
    if not others:
        return [names[form] for form in forms] + [f"the {noun}"]
    return [names[form] for form in forms if unique[form]]


def _about_one(
    kind: str, forms: tuple[str, ...], answer: Callable[[Item], str]
) -> Callable[[np.random.Generator, Scene], Fact | None]:
    """A kind that names one item and asks for one of its properties."""

    def fact(rng: np.random.Generator, scene: Scene) -> Fact | None:
        named = [
            (item, names) for item in scene.items if (names := _names(rng, scene, item, forms))
        ]
        if not named:
            return None
        item, names = _pick(rng, named)
        return Fact(kind, {"r": _pick(rng, names)}, answer(item))

    return fact


_colour_of_item = _about_one("colour", ("shape", "shape", "place"), lambda item: item.colour)


def _colour(rng: np.random.Generator, scene: Scene) -> Fact | None:
    if scene.caption is not None and (not scene.items or rng.random() < 0.2):
        return Fact(
            "colour",
            {"r": _pick(rng, (f"the {scene.caption.kind}", "the text"))},
            scene.caption.colour,
        )
    return _colour_of_item(rng, scene)


def _thing(rng: np.random.Generator, colour: str | None, shape: str | None) -> str:
    noun = shape if shape is not None else _pick(rng, _NOUNS)
    return noun if colour is None else f"{colour} {noun}"


def _fits(item: Item, colour: str | None, shape: str | None) -> bool:
    return (colour is None or item.colour == colour) and (shape is None or item.shape == shape)


def _count(rng: np.random.Generator, scene: Scene) -> Fact | None:
    kind = rng.random()
    present = _pick(rng, scene.items) if scene.items and rng.random() < 0.9 else None
    colour = shape = None
    if 0.3 < kind < 0.6 or kind > 0.92:
        colour = present.colour if present else _pick(rng, COLOURS)
    if kind > 0.6:
        shape = present.shape if present else _pick(rng, SHAPES)
    noun = shape if shape is not None else _pick(rng, _NOUNS)
    words = plural(noun) if colour is None else f"{colour} {plural(noun)}"
    return Fact("count", {"n": words}, str(sum(_fits(item, colour, shape) for item in scene.items)))


def _description(
    rng: np.random.Generator, scenes: tuple[Scene, ...]
) -> tuple[str | None, str | None]:
    """A colour, a shape or both, likely to be about something in the scenes, but often not."""
    items = [item for scene in scenes for item in scene.items]
    close = bool(items) and rng.random() < 0.75
    colour = _pick(rng, items).colour if close else _pick(rng, COLOURS)
    shape = _pick(rng, items).shape if close else _pick(rng, SHAPES)
    form = rng.random()
    return (colour if form < 0.66 else None), (shape if form > 0.33 else None)


def _exists(rng: np.random.Generator, scene: Scene) -> Fact | None:
    wanted = bool(rng.random() < 0.5)
    for _ in range(20):
        colour, shape = _description(rng, (scene,))
        if any(_fits(item, colour, shape) for item in scene.items) == wanted:
            return Fact(
                "exists", {"a": article(_thing(rng, colour, shape))}, "yes" if wanted else "no"
            )
    return None


def _which(rng: np.random.Generator, scenes: tuple[Scene, ...]) -> Fact | None:
    if len(scenes) != len(ORDINALS):
        return None
    wanted = int(rng.integers(2))
    for _ in range(20):
        colour, shape = _description(rng, scenes)
        shown = [any(_fits(item, colour, shape) for item in scene.items) for scene in scenes]
        if shown[wanted] and sum(shown) == 1:
            return Fact("which", {"a": article(_thing(rng, colour, shape))}, ORDINALS[wanted])
    return None


def _object(rng: np.random.Generator, scene: Scene) -> Fact | None:
    if not scene.items:
        return None
    item = _pick(rng, scene.items)
    return Fact("object", {"w": _place(rng, item.cell)}, f"{item.colour} {item.shape}")


def _printed(
    kind: str, caption_kinds: tuple[str, ...]
) -> Callable[[np.random.Generator, Scene], Fact | None]:
    def fact(_: np.random.Generator, scene: Scene) -> Fact | None:
        if scene.caption is None or scene.caption.kind not in caption_kinds:
            return None
        return Fact(kind, {}, scene.caption.text)

    return fact


def description(scene: Scene) -> str:
    """All that a scene shows: what is printed, then the shapes row by row."""
    parts = (
        []
        if scene.caption is None
        else [f"{scene.caption.colour} {scene.caption.kind} {scene.caption.text}"]
    )
    parts += [f"{CELLS[item.cell]}: {item.size} {item.colour} {item.shape}" for item in scene.items]
    return ", ".join(parts)


def _describe(_: np.random.Generator, scene: Scene) -> Fact | None:
    return Fact("describe", {}, description(scene))


_MOST_AT_ONCE = 4
_ASKED_OF_SEVERAL: dict[str, tuple[tuple[str, ...], Callable[[Item], str]]] = {
    "colour": (("shape", "shape", "place"), lambda item: item.colour),
    "shape": (("colour", "colour", "place"), lambda item: item.shape),
    "size": (("colour", "shape", "both", "place"), lambda item: item.size),
    "position": (("colour", "shape", "both"), lambda item: CELLS[item.cell]),
}


def _several(rng: np.random.Generator, scene: Scene) -> Fact | None:
    """One property of two to four things, in the order in which they are named."""
    asked = _pick(rng, (*_ASKED_OF_SEVERAL, "position", "exists", "exists"))
    if asked == "exists":
        facts = [fact for _ in range(_MOST_AT_ONCE) if (fact := _exists(rng, scene)) is not None]
        pairs = list({fact.slots["a"]: fact.answer for fact in facts}.items())
    else:
        forms, answer = _ASKED_OF_SEVERAL[asked]
        named = [(item, _names(rng, scene, item, forms)) for item in scene.items]
        pairs = [(_pick(rng, names), answer(item)) for item, names in named if names]
    if len(pairs) < 2:
        return None
    count = int(rng.integers(2, min(len(pairs), _MOST_AT_ONCE) + 1))
    chosen = [pairs[int(index)] for index in rng.permutation(len(pairs))[:count]]
    names = [name for name, _ in chosen]
    words = f"{', '.join(names[:-1])} and {names[-1]}"
    return Fact(
        "several", {"l": words}, ", ".join(reply for _, reply in chosen), f"several: {asked}"
    )


_FACTS: dict[str, Callable[[np.random.Generator, Scene], Fact | None]] = {
    "colour": _colour,
    "shape": _about_one("shape", ("colour", "colour", "place"), lambda item: item.shape),
    "size": _about_one("size", ("colour", "shape", "both", "place"), lambda item: item.size),
    "position": _about_one("position", ("colour", "shape", "both"), lambda item: CELLS[item.cell]),
    "count": _count,
    "exists": _exists,
    "object": _object,
    "word": _printed("word", ("word",)),
    "number": _printed("number", ("number",)),
    "text": _printed("text", ("word", "number")),
    "describe": _describe,
    "several": _several,
}
