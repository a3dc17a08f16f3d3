"""The pictures in examples/, with questions and their answers: scenes of a stream of their own."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from qwen3vl_jax.demo import questions
from qwen3vl_jax.demo.batches import EXAMPLE_STREAM
from qwen3vl_jax.demo.render import render
from qwen3vl_jax.demo.scenes import Scene, SceneRange, sample_scene

SIDE_PX = 288
_NAMES = ("shapes", "crowd", "word", "number", "first", "second")
_KINDS = {
    "shapes": ("colour", "shape", "size", "position", "object", "exists"),
    "crowd": ("count", "count", "exists", "position", "describe"),
    "word": ("word", "text", "colour"),
    "number": ("number", "text", "count"),
}


def example_scenes() -> dict[str, Scene]:
    """A scene for each picture."""
    ranges = {"shapes": SceneRange(3, 3, 0.0), "crowd": SceneRange(4, 4, 0.0)}
    rng = np.random.default_rng((20260922, EXAMPLE_STREAM))
    found: dict[str, Scene] = {}
    while len(found) < len(_NAMES):
        name = _NAMES[len(found)]
        limits = ranges.get(name, SceneRange(2, 3, 1.0 if name in ("word", "number") else 0.0))
        scene = sample_scene(rng, limits)
        if name not in ("word", "number") or (scene.caption and scene.caption.kind == name):
            found[name] = scene
    return found


def write_pictures(directory: Path) -> list[dict[str, object]]:
    """Writes the PNGs and questions.json: `pictures`, `question` and `answer` of each question."""
    scenes = example_scenes()
    for name, scene in scenes.items():
        picture = Image.fromarray(render(scene, side_px=SIDE_PX))
        picture.save(directory / f"{name}.png", optimize=True)
    rng = np.random.default_rng((20260922, EXAMPLE_STREAM, 1))
    asked = [_ask(rng, (name,), scenes, kind) for name, kinds in _KINDS.items() for kind in kinds]
    pair = ("first", "second")
    asked += [_ask(rng, pair, scenes, kind) for kind in ("which", "colour", "count", "object")]
    text = json.dumps(asked, indent=1) + "\n"
    (directory / "questions.json").write_text(text, encoding="utf-8")
    return asked


def _ask(
    rng: np.random.Generator, names: tuple[str, ...], scenes: dict[str, Scene], kind: str
) -> dict[str, object]:
    shown = tuple(scenes[name] for name in names)
    question = None
    while question is None:
        question = questions.ask(rng, shown, kind)
    pictures = [f"{name}.png" for name in names]
    return {"pictures": pictures, "question": question.text, "answer": question.answer}
