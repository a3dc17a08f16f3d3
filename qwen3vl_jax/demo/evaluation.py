"""How often the demo model is right: unseen pictures, seen and unseen wordings, exact match.

Questions go the way of any user: a chat with a picture through the processor, then greedy decoding
until the end token.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwen3vl_jax.demo import questions
from qwen3vl_jax.demo.batches import TEST_STREAM
from qwen3vl_jax.demo.questions import KINDS, Question
from qwen3vl_jax.demo.render import SIDE_PX, render
from qwen3vl_jax.demo.scenes import Scene, SceneRange, sample_scene
from qwen3vl_jax.generation import generate
from qwen3vl_jax.generation_settings import GenerationSettings
from qwen3vl_jax.model import Qwen3VL
from qwen3vl_jax.processing.processor import Processor

CROWD = SceneRange(1, 4, 0.6)
_BATCH_ROWS = 32
_LONGEST_ANSWER_TOKENS = 72


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """A question about its scenes."""

    scenes: tuple[Scene, ...]
    question: Question


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """Right answers among those asked."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        """Right answers as a share of all; 0 where nothing was asked."""
        return self.right / self.asked if self.asked else 0.0


def trials(
    kind: str, pictures: int, count: int, *, held_out_wording: bool, held_out_numbers: bool = False
) -> list[Trial]:
    """Single questions of one kind, each about freshly drawn scenes of the test stream."""
    flags = (held_out_wording, held_out_numbers)
    rng = np.random.default_rng(
        (20260922, TEST_STREAM, KINDS.index(kind), pictures, *map(int, flags))
    )
    found: list[Trial] = []
    while len(found) < count:
        scenes = tuple(
            sample_scene(rng, CROWD, held_out_numbers=held_out_numbers) for _ in range(pictures)
        )
        question = questions.ask(rng, scenes, kind, held_out_wording=held_out_wording)
        if question is not None:
            found.append(Trial(scenes, question))
    return found


def answers(
    model: Any, processor: Any, given: Sequence[Trial], *, side_px: int = SIDE_PX
) -> list[str]:
    """The model's answers, in order, by greedy decoding. Trials have equally many pictures."""
    replies: list[str] = []
    settings = GenerationSettings(
        max_new_tokens=_LONGEST_ANSWER_TOKENS,
        do_sample=False,
        eos_token_id=(processor.tokenizer.eos_token_id,),
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    for first in range(0, len(given), _BATCH_ROWS):
        part = given[first : first + _BATCH_ROWS]
        # Full batches only, so that one program serves all.
        filled = [*part, *[part[-1]] * (_BATCH_ROWS - len(part))]
        inputs = processor([_messages(trial, side_px) for trial in filled])
        tokens = generate(model, inputs, settings)
        new = tokens[: len(part), inputs["input_ids"].shape[1] :]
        replies += [reply.strip() for reply in processor.batch_decode(new)]
    return replies


def _messages(trial: Trial, side_px: int) -> list[dict[str, Any]]:
    pictures = [Image.fromarray(render(scene, side_px=side_px)) for scene in trial.scenes]
    parts: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": trial.question.text}]}]


def evaluate(
    directory: Path, *, count: int, kv: str | None = None, report: Callable[[str], None]
) -> dict[str, dict[str, Score]]:
    """Scores of a checkpoint: group ("one picture, seen wordings", ...) -> kind -> score.

    Args:
        count: questions of each kind in each group.
        kv: how KV caches are stored: raw or int8.
        report: gets a line whenever a kind is done.
    """
    model = Qwen3VL.from_pretrained(directory, kv=kv)
    processor = Processor.from_pretrained(directory)
    found: dict[str, dict[str, Score]] = {}
    for group, kind, given in _groups(count):
        replies = answers(model, processor, given)
        pairs = zip(replies, given, strict=True)
        right = sum(reply == trial.question.answer for reply, trial in pairs)
        score = Score(right, len(given))
        found.setdefault(group, {})[kind] = score
        report(f"{group}, {kind}: {score.right} of {score.asked}")
    return found


def _groups(count: int) -> Iterator[tuple[str, str, list[Trial]]]:
    for pictures, name in ((1, "one picture"), (2, "two pictures")):
        for held_out, wording in ((False, "seen wordings"), (True, "unseen wordings")):
            for kind in KINDS:
                if kind != "which" or pictures == 2:
                    given = trials(kind, pictures, count, held_out_wording=held_out)
                    yield f"{name}, {wording}", kind, given
    numbers = trials("number", 1, count, held_out_wording=False, held_out_numbers=True)
    yield "one picture, numbers never trained on", "number", numbers


def total(scores: Iterable[Score]) -> Score:
    """All scores together."""
    listed = list(scores)
    return Score(sum(score.right for score in listed), sum(score.asked for score in listed))


def table(found: Mapping[str, Mapping[str, Score]]) -> str:
    """The scores as text: a row for each kind, a column for each group, in percent."""
    groups = list(found)
    lines = [f"({index + 1}) {group}" for index, group in enumerate(groups)]
    lines.append("kind      " + "".join(f"{f'({index + 1})':>9}" for index in range(len(groups))))
    for kind in (*KINDS, "all"):
        cells = []
        for group in groups:
            score = total(found[group].values()) if kind == "all" else found[group].get(kind)
            cells.append(f"{100 * score.share:8.1f}%" if score else f"{'-':>9}")
        lines.append(f"{kind:10}" + "".join(cells))
    return "\n".join(lines)
