"""The demo: scenes, questions and batches against independent readings, and the shipped checkpoint."""

from pathlib import Path

import numpy as np
import pytest

from qwen3vl_jax.demo import batches, evaluation, learning, questions, recipe, wordings
from qwen3vl_jax.demo.render import render
from qwen3vl_jax.demo.scenes import PALETTE, SHAPES, Scene, SceneRange, is_held_out_number, sample_scene
from qwen3vl_jax.model import Qwen3VL
from qwen3vl_jax.network import forward
from qwen3vl_jax.processing import Processor

CHECKPOINT = Path(__file__).resolve().parents[2] / "examples" / "checkpoint"
CROWD = SceneRange(1, 6, 0.6)


def scenes(count: int, seed: int, limits: SceneRange = CROWD) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, limits) for _ in range(count)]


def test_a_seed_gives_the_same_scenes_and_pixels() -> None:
    for first, second in zip(scenes(10, 5), scenes(10, 5), strict=True):
        assert first == second
        assert np.array_equal(render(first), render(second))
    assert scenes(1, 5) != scenes(1, 6)


def solid_pixels(scene: Scene) -> list[tuple[str, np.ndarray]]:
    """Colour name and the pixel in the middle of every shape that is filled there."""
    picture = render(scene, side_px=300).astype(float)
    return [
        (item.colour, picture[round(item.y * 0.3), round(item.x * 0.3)])
        for item in scene.items
        if item.shape != "ring"
    ]


def test_the_pixels_in_the_middle_of_a_shape_have_the_colour_that_is_named() -> None:
    found = [pair for scene in scenes(60, 7) for pair in solid_pixels(scene)]
    assert len(found) > 100
    for colour, pixel in found:
        distances = {name: np.abs(pixel - np.array(rgb)).sum() for name, rgb in PALETTE.items()}
        assert min(distances, key=distances.__getitem__) == colour


def test_shapes_stand_where_the_answer_says_and_do_not_overlap() -> None:
    bounds = {"left": (0, 1000 / 3), "centre": (1000 / 3, 2000 / 3), "right": (2000 / 3, 1000)}
    rng = np.random.default_rng(8)
    for scene in scenes(200, 8):
        asked = questions.ask(rng, (scene,), "position")
        assert len({item.cell for item in scene.items}) == len(scene.items)
        if asked is not None:
            column = next((word for word in ("left", "right") if word in asked.answer), "centre")
            low, high = bounds[column]
            assert any(low < item.x < high for item in scene.items)


def naive_count(scene: Scene, question: str) -> int:
    """Counts by the words of the question alone."""
    words = question.lower().rstrip("?.").replace("crosses", "cross").split()
    shapes = [shape for shape in SHAPES if shape in words or shape + "s" in words]
    colours = [colour for colour in PALETTE if colour in words]
    return sum(
        (not shapes or item.shape in shapes) and (not colours or item.colour in colours)
        for item in scene.items
    )


def test_counts_are_those_of_a_reader_of_the_question() -> None:
    rng = np.random.default_rng(9)
    for scene in scenes(300, 9):
        asked = questions.ask(rng, (scene,), "count")
        assert asked is not None
        assert asked.answer == str(naive_count(scene, asked.text)), asked


def test_yes_means_that_something_fits_and_is_said_half_of_the_time() -> None:
    rng = np.random.default_rng(10)
    asked = [(scene, questions.ask(rng, (scene,), "exists")) for scene in scenes(300, 10)]
    for scene, question in asked:
        if question is not None:
            assert (question.answer == "yes") == (naive_count(scene, question.text) > 0), question
    share = np.mean([question.answer == "yes" for _, question in asked if question is not None])
    assert 0.42 < share < 0.58


def test_what_is_named_in_a_question_is_there_once() -> None:
    rng = np.random.default_rng(11)
    for scene in scenes(300, 11):
        asked = questions.ask(rng, (scene,), "size")
        if asked is None or any(word in asked.text for word in (" in the ", " on the ", " at the ")):
            continue
        if len(scene.items) > 1:
            words = asked.text.lower().replace("small", "").replace("big", "")
            assert naive_count(scene, words) == 1, asked


def test_held_out_wordings_share_no_template_with_training() -> None:
    for kind, held_out in wordings.HELD_OUT.items():
        assert not set(held_out) & set(wordings.SEEN[kind])
    assert wordings.HELD_OUT.keys() == wordings.SEEN.keys()


def test_training_batches_hold_no_held_out_wording_and_no_held_out_number(chat: batches.ChatTokens) -> None:
    cores = {
        template.split("{")[0].strip().lower()
        for kind, held_out in wordings.HELD_OUT.items()
        for template in held_out
        if not any(seen.startswith(template.split("{")[0]) for seen in wordings.SEEN[kind])
    }
    assert len(cores) > 10
    rng = np.random.default_rng(12)
    for _ in range(300):
        pair = tuple(sample_scene(rng, CROWD) for _ in range(2))
        for number in (scene.caption.text for scene in pair if scene.caption and scene.caption.kind == "number"):
            assert not is_held_out_number(number)
        kind = questions.KINDS[int(rng.integers(len(questions.KINDS)))]
        asked = questions.ask(rng, pair, kind)
        if asked is not None:
            held_out = [template for template in wordings.HELD_OUT[kind] if fits(template, asked.text)]
            assert not held_out, (asked.text, held_out)


def fits(template: str, text: str) -> bool:
    """Whether a question could have come from a template, as far as its fixed words tell."""
    place = 0
    for part in (part for part in template.strip("?.").lower().replace("}", "{").split("{")[::2] if part):
        place = text.lower().find(part, place)
        if place < 0:
            return False
        place += len(part)
    return False if text.lower().find(template.split("{")[0].lower()) < 0 else exactly(template, text)


def exactly(template: str, text: str) -> bool:
    import re

    pattern = re.sub(r"\\\{\w\\\}", ".+", re.escape(template.rstrip("?.")))
    return re.search(rf"(^|: |\. |! |, ){pattern}[?.]?$", text, re.IGNORECASE) is not None


@pytest.fixture(scope="module")
def chat() -> batches.ChatTokens:
    return batches.ChatTokens(CHECKPOINT)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(CHECKPOINT)


@pytest.mark.parametrize("pictures", [1, 2])
def test_a_training_row_is_what_the_processor_makes_of_the_chat(
    chat: batches.ChatTokens, processor: Processor, pictures: int
) -> None:
    layout = batches.Layout("test", rows=2, pictures=pictures, tokens=132, turns=3)
    mixture = recipe.plan(recipe.SETTINGS.steps - 1)[1]
    arrays = batches.make_batch(chat, layout, mixture, stream=9, number=1)
    rng = np.random.default_rng((20260922, 9, 1))
    drawn = tuple(sample_scene(rng, mixture.limits) for _ in range(pictures))
    shown = [render(scene) for scene in drawn]
    asked = batches.conversation(rng, drawn, mixture, layout.turns)
    talk = []
    for question in asked:
        parts = [{"type": "image", "image": picture} for picture in shown] if not talk else []
        talk.append({"role": "user", "content": [*parts, {"type": "text", "text": question.text}]})
        talk.append({"role": "assistant", "content": question.answer})
    wanted = processor(talk, add_generation_prompt=False)
    used = int(arrays["attention_mask"][0].sum())
    # Training stops at the end token; the template ends its turns with a line break.
    assert arrays["input_ids"][0, :used].tolist() == wanted["input_ids"][0, :-1].tolist()
    count = pictures * batches.GRID**2
    assert np.array_equal(arrays["pixel_values"][:count], wanted["pixel_values"])
    labelled = arrays["labels"][0][arrays["labels"][0] != batches.IGNORED].tolist()
    assert processor.decode(labelled) == "".join(question.answer for question in asked)


def test_unpadded_training_pieces_give_the_logits_of_the_model_itself(chat: batches.ChatTokens) -> None:
    model = Qwen3VL.from_pretrained(CHECKPOINT, dtype="float32")
    layout = batches.Layout("test", rows=2, pictures=2, tokens=80, turns=1)
    arrays = batches.make_batch(chat, layout, recipe.plan(recipe.SETTINGS.steps - 1)[1], stream=9, number=2)
    prepared, _, _ = learning.prepare(arrays, model.config)
    trained = np.asarray(forward(model.network, prepared, model.config))
    usual = np.asarray(model(**{name: arrays[name] for name in arrays if name not in ("labels", "kinds")}))
    real = arrays["attention_mask"] > 0
    # The same sums over 36 patches and over 64 of which 28 count as nothing: rounding only.
    assert np.abs(trained - usual)[real].max() < 1e-4 * np.abs(usual[real]).max()


@pytest.mark.parametrize(("pictures", "held_out"), [(1, False), (1, True), (2, False)])
def test_the_shipped_checkpoint_answers_unseen_questions(
    processor: Processor, pictures: int, held_out: bool
) -> None:
    model = Qwen3VL.from_pretrained(CHECKPOINT)
    kinds = [kind for kind in questions.KINDS if pictures == 2 or kind != "which"]
    given = [
        trial for kind in kinds for trial in evaluation.trials(kind, pictures, 8, held_out_wording=held_out)
    ]
    replies = evaluation.answers(model, processor, given)
    right = [reply == trial.question.answer for reply, trial in zip(replies, given, strict=True)]
    assert np.mean(right) >= (0.85 if held_out else 0.9)
