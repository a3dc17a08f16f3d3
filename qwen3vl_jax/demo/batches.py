"""Training arrays: a few question turns about one or two pictures in each row, answers labelled.

Rows have the chat template's tokens, a fixed length and right padding, so that every batch of a
layout has the same shapes. A batch depends only on its stream and number: any step can be redone.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8

from qwen3vl_jax.demo import questions
from qwen3vl_jax.demo.questions import Question
from qwen3vl_jax.demo.render import SIDE_PX, letter_columns, render
from qwen3vl_jax.demo.scenes import CELLS, Scene, SceneRange, sample_scene
from qwen3vl_jax.demo.tokenizer import added_ids

IGNORED = -100
PATCH_PX = 16
MERGE = 2
GRID = SIDE_PX // PATCH_PX
TOKENS_PER_PICTURE = (GRID // MERGE) ** 2
TRAINING_STREAM = 1
VALIDATION_STREAM = 2
TEST_STREAM = 3
EXAMPLE_STREAM = 4
CELL_WORDS = 16  # at most so many tokens say what a cell shows
CELL_CONTENTS = ("empty", "item", "word", "number")
NOTHING = "<|vision_pad|>"
_CAPTION_KINDS = ("word", "number", "text")


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Shape of a batch: rows, pictures in each row, tokens of each row, most turns in each row.

    `numbered`: every vision token is to say which picture it is of.
    """

    name: str
    rows: int
    pictures: int
    tokens: int
    turns: int
    numbered: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Mixture:
    """What a batch asks: how crowded the scenes are and how often each kind is chosen.

    A description comes last in its row, so that no other answer can be copied from it.
    """

    limits: SceneRange
    weights: Mapping[str, float]
    describe_probability: float


class ChatTokens:
    """Turns text into the chat template's token ids, piece by piece, remembering the pieces."""

    def __init__(self, tokenizer_directory: Path) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(tokenizer_directory / "tokenizer.json"))
        self.encode = functools.lru_cache(maxsize=200_000)(
            lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids)
        )
        ids = added_ids(tokenizer_directory)
        self.image_pad, self.pad = ids["<|image_pad|>"], ids["<|endoftext|>"]
        self.end = ids["<|im_end|>"]

    def opening(self, pictures: int) -> tuple[int, ...]:
        """The first user turn up to its question: the pictures."""
        picture = "<|vision_start|>" + "<|image_pad|>" * TOKENS_PER_PICTURE + "<|vision_end|>"
        return self.encode("<|im_start|>user\n" + picture * pictures)

    def question(self, text: str) -> tuple[int, ...]:
        """A question and the start of the assistant's turn."""
        return self.encode(text) + self.encode("<|im_end|>\n<|im_start|>assistant\n")

    def answer(self, text: str) -> tuple[int, ...]:
        """What the model has to write: the answer and the end token."""
        return self.encode(text) + self.encode("<|im_end|>")


def conversation(
    rng: np.random.Generator, scenes: tuple[Scene, ...], mixture: Mixture, turns: int
) -> list[Question]:
    """Up to `turns` different questions; printed text is asked for once per picture."""
    kinds = list(mixture.weights)
    shares = np.array([mixture.weights[kind] for kind in kinds])
    last = (
        questions.ask(rng, scenes, "describe")
        if rng.random() < mixture.describe_probability
        else None
    )
    turns -= last is not None
    asked: list[Question] = []
    seen: set[tuple[str, int, str]] = set()
    for draw in rng.choice(len(kinds), size=3 * turns, p=shares / shares.sum()):
        question = questions.ask(rng, scenes, kinds[int(draw)])
        if question is None:
            continue
        printed = question.kind in _CAPTION_KINDS
        key = (
            "printed" if printed else question.kind,
            question.picture,
            "" if printed else question.text,
        )
        if key not in seen:
            seen.add(key)
            asked.append(question)
        if len(asked) == turns:
            break
    return asked if last is None else [*asked, last]


def make_batch(
    chat: ChatTokens, layout: Layout, mixture: Mixture, *, stream: int, number: int
) -> dict[str, np.ndarray]:
    """Batch `number` of a stream: the processor's arrays, and `labels` and `kinds` [rows, tokens].

    `labels` holds an answer's token where it stands and IGNORED elsewhere, `wording` likewise the
    tokens of questions; `kinds` the index of the question's kind at answers and -1 elsewhere. A
    numbered layout has `ordinals` too: at the place after a vision token, its picture's ordinal.
    """
    rng = np.random.default_rng((20260922, stream, number))
    shape = (layout.rows, layout.tokens)
    tokens = np.full(shape, chat.pad, np.int32)
    mask = np.zeros(shape, np.int32)
    labels = np.full(shape, IGNORED, np.int32)
    wording = np.full(shape, IGNORED, np.int32)
    kinds = np.full(shape, -1, np.int32)
    pictures: list[np.ndarray] = []
    for row in range(layout.rows):
        scenes = tuple(sample_scene(rng, mixture.limits) for _ in range(layout.pictures))
        pictures += [render(scene) for scene in scenes]
        asked = conversation(rng, scenes, mixture, layout.turns)
        rows = (tokens[row], labels[row], wording[row], kinds[row])
        used = _fill(chat, asked, layout.pictures, *rows)
        mask[row, :used] = 1
    numbered = {"ordinals": _ordinals(chat, tokens)} if layout.numbered else {}
    return numbered | {
        "input_ids": tokens,
        "attention_mask": mask,
        "mm_token_type_ids": (tokens == chat.image_pad).astype(np.int32),
        "pixel_values": patches(np.stack(pictures)),
        "image_grid_thw": np.tile(np.array([[1, GRID, GRID]], np.int64), (len(pictures), 1)),
        "labels": labels,
        "wording": wording,
        "kinds": kinds,
    }


def _ordinals(chat: ChatTokens, tokens: np.ndarray) -> np.ndarray:
    """Labels for vision tokens, each at the place after it: "first" or "second".

    Rows take turns between an answer's spelling and a question's, as in `_both_spellings`. Without
    this "which picture" stayed at chance for 9,400 steps: nothing in a vision token told the second
    picture from the first.
    """
    labels = np.full(tokens.shape, IGNORED, np.int32)
    for index, row in enumerate(tokens):
        for nth, place in enumerate(np.flatnonzero(row == chat.image_pad)):
            ordinal = questions.ORDINALS[nth // TOKENS_PER_PICTURE]
            labels[index, place + 1] = chat.encode(f" {ordinal}" if index % 2 else ordinal)[0]
    return labels


def make_naming_batch(
    chat: ChatTokens, layout: Layout, mixture: Mixture, *, stream: int, number: int
) -> dict[str, np.ndarray]:
    """Pictures with words for every cell: `pixel_values`, `words` and `cells`.

    `words` [pictures, cells, CELL_WORDS] are the tokens that say what a cell shows, filled up with
    IGNORED; `cells` [pictures, cells] is the index of the cell's content in CELL_CONTENTS. A cell
    of the board is exactly one vision token.
    """
    rng = np.random.default_rng((20260922, stream, number))
    words = np.full((layout.rows, TOKENS_PER_PICTURE, CELL_WORDS), IGNORED, np.int32)
    contents = np.zeros((layout.rows, TOKENS_PER_PICTURE), np.int32)
    pictures = []
    for row in range(layout.rows):
        scene = sample_scene(rng, mixture.limits)
        pictures.append(render(scene))
        for cell, (content, texts) in enumerate(_cell_words(scene)):
            ids = list(dict.fromkeys(chat.encode(text)[0] for text in texts))
            words[row, cell, : len(ids)] = ids
            contents[row, cell] = CELL_CONTENTS.index(content)
    return {"pixel_values": patches(np.stack(pictures)), "words": words, "cells": contents}


def _cell_words(scene: Scene) -> list[tuple[str, tuple[str, ...]]]:
    """What each cell shows, and where it is; printed text by the letters or digits in the cell.

    Reading is local this way: naming the whole text alone did not begin to work in 800 steps.
    """
    shown: list[tuple[str, tuple[str, ...]]] = [("empty", (NOTHING,))] * TOKENS_PER_PICTURE
    for item in scene.items:
        shown[item.cell] = ("item", (item.colour, item.shape, item.size))
    if (caption := scene.caption) is not None:
        columns = letter_columns(caption)
        for column in range(3):
            inside = dict.fromkeys(
                letter for letter, at in zip(caption.text, columns, strict=True) if at == column
            )
            whole = (caption.text,) if caption.kind == "word" else ()
            if inside:
                shown[3 * caption.row + column] = (caption.kind, (caption.colour, *whole, *inside))
    return [
        (content, _both_spellings((*texts, *CELLS[cell].split())))
        for cell, (content, texts) in enumerate(shown)
    ]


def _both_spellings(words: tuple[str, ...]) -> tuple[str, ...]:
    """Words as they begin an answer, and as they stand in a question: there they are other tokens.

    Without the latter " red" and " blue" stay nearly one embedding (cosine 0.84 after 6,000 steps),
    and nothing in a picture can be found by its colour.
    """
    return (*words, *(f" {word}" for word in words if len(word) > 1 and word != NOTHING))


def _fill(
    chat: ChatTokens,
    asked: list[Question],
    pictures: int,
    tokens: np.ndarray,
    labels: np.ndarray,
    wording: np.ndarray,
    kinds: np.ndarray,
) -> int:
    """Writes turns into one row while they fit; returns the number of tokens used."""
    opening = chat.opening(pictures)
    used = len(opening)
    tokens[:used] = opening
    between: tuple[int, ...] = ()
    for question in asked:
        before = between + chat.question(question.text)
        answer = chat.answer(question.answer)
        middle, end = used + len(before), used + len(before) + len(answer)
        if end > len(tokens):
            break
        tokens[used:middle] = wording[used:middle] = before
        tokens[middle:end] = labels[middle:end] = answer
        kinds[middle:end] = questions.KINDS.index(question.kind)
        used = end
        between = chat.encode("\n<|im_start|>user\n")
    return used


def patches(
    pictures: UInt8[np.ndarray, "pictures side side 3"],
) -> Float32[np.ndarray, "patches values"]:
    """Normalised patches in the processor's order: 2 by 2 merge blocks, each value given twice."""
    count = len(pictures)
    blocks = GRID // MERGE
    scaled = (pictures.astype(np.float32) / 255 - 0.5) / 0.5
    split = scaled.reshape(count, blocks, MERGE, PATCH_PX, blocks, MERGE, PATCH_PX, 3)
    ordered = split.transpose(0, 1, 4, 2, 5, 7, 3, 6)
    twice = np.broadcast_to(
        ordered[:, :, :, :, :, :, None],
        (count, blocks, blocks, MERGE, MERGE, 3, 2, PATCH_PX, PATCH_PX),
    )
    return np.ascontiguousarray(twice).reshape(count * GRID * GRID, -1)
