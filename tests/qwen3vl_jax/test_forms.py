"""Forms of a KV cache and chunks of a prompt: what is chosen, that runs choose it too, and bits."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import planned_models as helper
import pytest
import tiny

from memsched.cost import Roofline
from memsched.errors import DoesNotFitError
from memsched.machine import DEVICE, HOST, NVME, Compute, Link, Machine, Tier
from memsched.profiles import write_machine
from qwen3vl_jax import Qwen3VL, long_cache
from qwen3vl_jax.cache import grown
from qwen3vl_jax.config import load_config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.generation import Session
from qwen3vl_jax.inputs import parts, prepare
from qwen3vl_jax.planned.best_batch import dry_run_best_batch
from qwen3vl_jax.planned.dry_run import dry_run_of, run_figures
from qwen3vl_jax.planned.forecast import forecast
from qwen3vl_jax.planned.forms import CHOICE_S, Setting, choose
from qwen3vl_jax.planned.loading import Budgets
from qwen3vl_jax.planned.long_requests import borders_s
from qwen3vl_jax.planned.request import Request
from qwen3vl_jax.planned.saved import read_plans
from qwen3vl_jax.planned.saving import adopt, plans_text
from qwen3vl_jax.planned.sweep import parse_sweep, run_sweep
from qwen3vl_jax.prompt_keys import chunk_keys

pytestmark = pytest.mark.usefixtures("shared_traces", "small_blocks")

BLOCK = 64
FLOAT32 = np.dtype("float32")
CONFIG = load_config(tiny.DATA / "dense")
PROMPT, NEW, SHORT = 300, 60, 4
# A prompt of so many tokens is cut in three ways, its cache lies in one piece or in two sizes of
# blocks: 64 and 256 tokens.
REQUEST = Request(PROMPT, NEW)


@pytest.fixture(scope="module")
def small_blocks() -> Iterator[None]:
    """Caches of 64 slots a block are the usual ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_cache, "SMALLEST_BLOCK", BLOCK)
        patch.setattr(long_cache, "BLOCK_BYTES", 1)
        yield


def machine(device_bytes: int, *, disk: float, compute: float, tiers: int = 2) -> Machine:
    """One that is so slow that planning takes no time beside it."""
    names = (DEVICE, NVME) if tiers == 2 else (DEVICE, HOST, NVME)
    near = names[-2]
    links = [Link(NVME, near, disk, 1e-6), Link(near, NVME, disk, 1e-6)]
    if tiers == 3:
        links += [Link(HOST, DEVICE, disk, 1e-6), Link(DEVICE, HOST, disk, 1e-6)]
    sizes = {DEVICE: device_bytes, HOST: 1 << 30, NVME: 1 << 30}
    found = tuple(Tier(name, sizes[name], 1 << 40, 64) for name in names)
    return Machine("slow", "cpu", found, tuple(links), Compute(10 * compute, compute, 1e-7))


ROOMY = machine(20 << 20, disk=1e6, compute=5e6)
STREAMING = machine(4_000_000, disk=1e5, compute=5e6)
TIGHT = machine(1_500_000, disk=1e6, compute=5e6)


@functools.cache
def seconds(where: str, request: Request) -> float:
    """Of a whole request by its finished forecast; infinitely many without one."""
    here = {"roomy": ROOMY, "streaming": STREAMING, "tight": TIGHT}[where]
    try:
        found = forecast(CONFIG, here, request, dtype=FLOAT32, plan_seconds=CHOICE_S)
    except DoesNotFitError:
        return math.inf
    return found.seconds


def chosen(here: Machine, request: Request) -> Request:
    return choose(Setting(CONFIG, here, FLOAT32, Roofline(), {}), request)


@pytest.mark.parametrize(
    ("where", "here"), [("roomy", ROOMY), ("streaming", STREAMING), ("tight", TIGHT)]
)
def test_the_choice_is_that_of_an_exhaustive_search(where: str, here: Machine) -> None:
    def best(chunks: tuple[int, ...]) -> Request:
        forms = [
            dataclasses.replace(REQUEST, kv_blocks="never", block_slots=slots, chunk=chunk)
            for slots, chunk in itertools.product((None, BLOCK, 4 * BLOCK), chunks)
        ]
        return min(forms, key=lambda form: seconds(where, form))

    for chunk, chunks in ((512, (512,)), ("auto", (512, 128, 256, 1024))):
        found = chosen(here, dataclasses.replace(REQUEST, kv_blocks="faster", chunk=chunk))
        wanted = best(chunks)
        assert (found.block_slots, found.chunk) == (wanted.block_slots, wanted.chunk)
        assert found.decided


def test_some_choices_are_not_the_usual_form_or_chunk() -> None:
    open_ = dataclasses.replace(REQUEST, kv_blocks="faster", chunk="auto")
    found = [chosen(here, open_) for here in (ROOMY, STREAMING)]
    assert [(one.block_slots, one.chunk) for one in found] == [(BLOCK, 512), (None, 128)]


def test_of_chunks_that_cut_alike_the_usual_one_is_taken() -> None:
    short = Request(100, 20, chunk="auto")
    assert chosen(ROOMY, short) == dataclasses.replace(short, chunk=512)


def test_what_leaves_nothing_open_is_not_planned() -> None:
    for decided in (REQUEST, Request(300, 60, kv_blocks="never", chunk=64)):
        assert chosen(ROOMY, decided) is decided


def test_blocks_are_not_faster_where_planning_at_their_borders_takes_longer(
    tmp_path: Path,
) -> None:
    from memsched.profiles import load_machine

    quick = load_machine(helper.machine_file(tmp_path, 2))
    assert chosen(quick, dataclasses.replace(REQUEST, kv_blocks="faster")).block_slots is None


def test_always_is_in_blocks_as_soon_as_one_can_be_full() -> None:
    for tokens, slots in ((BLOCK - 10, None), (BLOCK + 10, BLOCK)):
        asked = Request(tokens - 5, 5, kv_blocks="always")
        assert chosen(ROOMY, asked).block_slots == slots
    full = machine(20 << 20, disk=1e6, compute=5e6).with_capacities({NVME: 100_000})
    with pytest.raises(DoesNotFitError, match="B of disk, not 100,000 B; raise --nvme-space"):
        chosen(full, dataclasses.replace(REQUEST, kv_blocks="always"))


def test_never_refuses_what_would_be_cut_otherwise() -> None:
    assert forecast(CONFIG, TIGHT, REQUEST, dtype=FLOAT32).request.block_slots == BLOCK
    never = dataclasses.replace(REQUEST, kv_blocks="never")
    with pytest.raises(DoesNotFitError, match="or drop --kv-blocks never"):
        forecast(CONFIG, TIGHT, never, dtype=FLOAT32)


def test_borders_take_what_writing_and_planning_take() -> None:
    cut = dataclasses.replace(REQUEST, block_slots=BLOCK)
    text = CONFIG.text
    block_bytes = 2 * text.num_key_value_heads * BLOCK * text.head_dim * 4
    layers = text.num_hidden_layers
    # 200 tokens have three full blocks. Steps of two passes behind them: 5, 6 and 7 a layer each.
    wanted = layers * (3 * (block_bytes / 1e6 + 1e-6) + 2 * (5 + 6 + 7) * 5e-4)
    found = borders_s(cut, CONFIG, FLOAT32, ROOMY, Roofline(), 200)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert borders_s(REQUEST, CONFIG, FLOAT32, ROOMY, Roofline(), 200) == 0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"kv_blocks": "often"}, "kv_blocks 'often' is unknown"),
        ({"chunk": 0}, "chunk 0 is no count from 1 to 1,048,576 tokens"),
        ({"chunk": "many"}, "chunk 'many' is no count"),
        ({"chunk": True}, "chunk True is no count"),
    ],
)
def test_forms_that_do_not_exist_are_refused(wrong: dict[str, Any], says: str) -> None:
    for make in (Request, Budgets):
        with pytest.raises(UsageError, match=says):
            make(**wrong)


# ---- runs ----


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Qwen3VL]]:
    """`opened(machine, **budgets)`: a planned model with a place on disk."""
    models = []

    def make(here: Machine, **budgets: Any) -> Qwen3VL:
        path = tmp_path / f"machine{len(models)}.toml"
        write_machine(here, path)
        given = {"nvme_dir": tmp_path / "spill"} | budgets
        models.append(helper.planned(tiny.DATA / "dense", machine=path, **given))
        return models[-1]

    yield make
    for model in models:
        model.close()


def prompt(tokens: int) -> dict[str, np.ndarray]:
    return {"input_ids": np.random.default_rng(tokens).integers(5, 90, (1, tokens))}


def bits(model: Qwen3VL, tokens: int = PROMPT, **form: Any) -> bytes:
    """Of the scores after a prompt, and after each of three greedy tokens."""
    cache = model.new_cache(batch=1, capacity=tokens + NEW, prompt_tokens=tokens, **form)
    scores, cache = model.prefill(prompt(tokens), cache)
    found = [np.asarray(scores)]
    for _ in range(3):
        scores, cache = model.decode(found[-1].argmax(-1).astype(np.int32), cache)
        found.append(np.asarray(scores))
    return np.stack(found).tobytes()


def test_a_chunk_has_the_bits_of_the_unplanned_model_with_that_chunk(
    opened: Callable[..., Qwen3VL],
) -> None:
    wanted = {
        chunk: bits(Qwen3VL.from_pretrained(tiny.DATA / "dense", chunk=chunk))
        for chunk in (64, 512)
    }
    assert wanted[64] != wanted[512]
    for chunk, expected in wanted.items():
        budgets = {"device_memory": 8 << 20, "kv_blocks": "never"}
        assert bits(opened(ROOMY, chunk=chunk, **budgets)) == expected
    assert bits(Qwen3VL.from_pretrained(tiny.DATA / "dense")) == wanted[512]


def test_a_dry_run_leaves_the_room_that_a_run_does(
    opened: Callable[..., Qwen3VL], tmp_path: Path
) -> None:
    model = opened(ROOMY, max_context=1000, kv_blocks="never", chunk="auto")
    limits = {"machine": tmp_path / "machine0.toml", "max_context": 1000, "kv_blocks": "never"}
    dry = dry_run_of(tiny.DATA / "dense", None, prompt(20), 3, limits)
    assert dry.found is not None
    assert dry.found.request.max_context == 1000
    file = tmp_path / "plans.json"
    file.write_text(plans_text(dry.found))
    unplanned = helper.told(Qwen3VL.from_pretrained(tiny.DATA / "dense"), prompt(20))
    with pytest.raises(UsageError, match="has no plan for prefill with these shapes"):
        adopt(model, read_plans(file), prompt(200), 3)
    # What was refused has changed nothing.
    assert model.runner.allowed == ("never", "auto")
    adopt(model, read_plans(file), prompt(20), 3)
    np.testing.assert_array_equal(helper.told(model, prompt(20)), unplanned)


@pytest.mark.parametrize("here", [ROOMY, STREAMING], ids=["roomy", "streaming"])
def test_a_run_chooses_what_a_dry_run_does_and_answers_the_same(
    here: Machine, opened: Callable[..., Qwen3VL], tmp_path: Path
) -> None:
    forms = {"kv_blocks": "faster", "chunk": "auto"}
    model = opened(here, **forms)
    greedy = {"do_sample": False, "eos_token_id": ()}
    told = model.generate(**prompt(PROMPT), max_new_tokens=SHORT, **greedy)
    # Other seconds for planning, and the same choice.
    budgets = {"machine": tmp_path / "machine0.toml", "plan_seconds": 0.0, **forms}
    dry = dry_run_of(tiny.DATA / "dense", None, prompt(PROMPT), SHORT, budgets)
    assert dry.found is not None
    form = dry.found.request
    assert run_figures(model)["kv_form"] == form.form_text
    assert (form.block_slots, form.chunk) != (None, 512)
    plain = Qwen3VL.from_pretrained(tiny.DATA / "dense", chunk=form.chunk_tokens)
    blocks = functools.partial(plain.new_cache, block_slots=form.block_slots)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "new_cache", blocks)
        wanted = plain.generate(**prompt(PROMPT), max_new_tokens=SHORT, **greedy)
    np.testing.assert_array_equal(told, wanted)


def test_every_cache_keeps_the_chunk_that_was_chosen_for_it(
    opened: Callable[..., Qwen3VL],
) -> None:
    model = opened(STREAMING, chunk="auto", kv_blocks="never")
    first, second = (
        model.new_cache(batch=1, capacity=tokens + SHORT, prompt_tokens=tokens)
        for tokens in (PROMPT, 20)
    )
    assert (first.chunk_tokens, second.chunk_tokens) == (128, 512)
    wanted = Qwen3VL.from_pretrained(tiny.DATA / "dense", chunk=128)
    scores, first = model.prefill(prompt(PROMPT), first)
    cache = wanted.new_cache(batch=1, capacity=PROMPT + SHORT)
    np.testing.assert_array_equal(scores, wanted.prefill(prompt(PROMPT), cache)[0])
    assert grown(first, first.capacity + 1).chunk_tokens == 128


def test_an_unknown_prompt_counts_as_four_fifths_of_its_cache(
    opened: Callable[..., Qwen3VL],
) -> None:
    forms = {"kv_blocks": "faster", "chunk": "auto"}
    form = opened(ROOMY, **forms).runner.expect(1, 360)
    known = opened(ROOMY, **forms).runner.expect(1, 360, 288)
    assert form == known


def test_always_cuts_what_would_fit_and_never_cuts_nothing(
    opened: Callable[..., Qwen3VL],
) -> None:
    assert opened(ROOMY, kv_blocks="always").runner.expect(1, 360).block_slots == BLOCK
    assert opened(ROOMY).runner.expect(1, 360).block_slots is None
    assert opened(TIGHT).runner.expect(1, 360).block_slots == BLOCK
    with pytest.raises(DoesNotFitError, match="without --kv-blocks never the KV cache of"):
        bits(opened(TIGHT, kv_blocks="never"))


@pytest.mark.parametrize("kv_blocks", ["faster", "always"])
def test_blocks_need_a_place(kv_blocks: str, opened: Callable[..., Qwen3VL]) -> None:
    with pytest.raises(UsageError, match=f"--kv-blocks {kv_blocks} keeps .* add --nvme-dir"):
        opened(ROOMY, kv_blocks=kv_blocks, nvme_dir=None)
    with pytest.raises(UsageError, match="add --nvme-dir"):
        Qwen3VL.from_pretrained(tiny.DATA / "dense", kv_blocks=kv_blocks)


def test_a_conversation_is_cut_once_it_has_grown(
    opened: Callable[..., Qwen3VL],
) -> None:
    model = opened(ROOMY, kv_blocks="always")
    session = Session(model, batch=1, capacity=40)
    assert run_figures(model)["kv_form"].startswith("KV cache in one piece")
    for tokens in (20, 100):
        session.prompt(prompt(tokens), capacity=session.length + tokens + 8)
    assert run_figures(model)["kv_form"].startswith(f"KV cache in blocks of {BLOCK} tokens")


def test_a_cache_that_has_grown_is_filled_in_the_chunks_of_its_new_size(
    opened: Callable[..., Qwen3VL],
) -> None:
    model = opened(STREAMING, chunk="auto", kv_blocks="never")
    cache = model.new_cache(batch=1, capacity=24, prompt_tokens=20)
    assert cache.chunk_tokens == 512
    _, cache = model.prefill(prompt(20), cache)
    cache = model.grown(cache, PROMPT + NEW)
    assert cache.chunk_tokens == 128
    assert run_figures(model)["kv_form"].endswith("prompts in chunks of 128 tokens")


# ---- files, batches, sweeps ----


def test_a_prompt_cache_tells_forms_and_chunks_apart(tiny_model: Callable[..., Qwen3VL]) -> None:
    model = tiny_model("dense")
    tokens = prepare(CONFIG, prompt(100), pictures=False)[0].tokens
    found = []
    for slots, chunk in ((None, 64), (None, 512), (BLOCK, 64)):
        cache = model.new_cache(batch=1, capacity=2 * BLOCK, block_slots=slots)
        found += chunk_keys("same", cache, list(parts(100, cache, chunk)), tokens, [])
    assert len(set(found)) == len(found) == 2 + 1 + 2


def test_plans_in_a_file_say_their_forms_and_others_are_refused(
    opened: Callable[..., Qwen3VL], tmp_path: Path
) -> None:
    path, file = tmp_path / "machine.toml", tmp_path / "plans.json"
    write_machine(ROOMY, path)

    def saved(**forms: Any) -> Any:
        dry = dry_run_of(tiny.DATA / "dense", None, prompt(PROMPT), 3, {"machine": path} | forms)
        assert dry.found is not None
        file.write_text(plans_text(dry.found))
        return read_plans(file)

    plans = saved(chunk=128)
    assert (plans.chunk_tokens, plans.block_slots) == (128, None)
    with pytest.raises(UsageError, match="for chunks of 128 tokens, not of 512; add --chunk 128"):
        adopt(opened(ROOMY), plans, prompt(PROMPT), 3)
    with pytest.raises(UsageError, match="in one piece; drop --kv-blocks always"):
        adopt(opened(ROOMY, chunk=128, kv_blocks="always"), plans, prompt(PROMPT), 3)
    wanted = Qwen3VL.from_pretrained(tiny.DATA / "dense", chunk=128)
    for chunk in (128, "auto"):
        model = opened(ROOMY, chunk=chunk)
        adopt(model, plans, prompt(PROMPT), 3)
        np.testing.assert_array_equal(
            helper.told(model, prompt(PROMPT)), helper.told(wanted, prompt(PROMPT))
        )
    with pytest.raises(UsageError, match="in blocks of 64 tokens, for which runs plan anew"):
        adopt(opened(ROOMY, kv_blocks="always"), saved(kv_blocks="always"), prompt(PROMPT), 3)


def test_the_best_batch_and_sweeps_choose_for_every_point(tmp_path: Path) -> None:
    path, here = tmp_path / "machine.toml", ROOMY.with_capacities({DEVICE: 2_000_000})
    write_machine(here, path)
    asked = Request(150, 10, kv_blocks="faster", chunk="auto")
    best = dry_run_best_batch(CONFIG, asked, Budgets(machine=path), dtype=None)
    assert best.found is not None
    rows = dataclasses.replace(asked, batch=best.found.request.batch)
    assert best.found.request == chosen(here, rows)
    points = run_sweep(
        parse_sweep("device-memory=2MB..20MB", 2),
        CONFIG,
        asked,
        ROOMY,
        FLOAT32,
        lambda line: None,
    )
    assert len(points) >= 2
    for point in points:
        alone = ROOMY.with_capacities({DEVICE: point.value})
        found = forecast(CONFIG, alone, asked, dtype=FLOAT32)
        assert point.tokens_per_s == pytest.approx(1 / found.summaries["decode"].seconds)
