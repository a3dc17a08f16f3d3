"""Budgets that change between tokens: the same tokens, and memory that is really given back."""

import contextlib
import functools
import gc
import inspect
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import planned_models as helper
import pytest
import tiny
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from memsched.errors import DoesNotFitError, StoreError
from memsched.machine import DEVICE, Machine
from memsched.pressure.sensor import NO_STALLS
from memsched.runtime.ledger import Ledger
from qwen3vl_jax import Processor, Qwen3VL, UsageError
from qwen3vl_jax.chat import Chat
from qwen3vl_jax.generation_settings import load_settings
from qwen3vl_jax.planned import loading
from qwen3vl_jax.planned.adapt import adapting

pytestmark = pytest.mark.usefixtures("shared_traces")

TOKENS = 8
PAGE_BYTES = 4096
MOST_BYTES = 5 << 20  # holds any of the checkpoints, and all else
FIRST_BYTES = 2_000_000  # less: the arena has to grow
EVERY = 1_000_000_000
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": (), "max_new_tokens": TOKENS}
Shares = list[tuple[int, float]]
# When, and how far between the least and everything.
CHANGES = st.lists(
    st.tuples(st.integers(1, TOKENS - 1), st.floats(0.0, 1.0)), min_size=1, max_size=3
)


@pytest.fixture(scope="module")
def opened(
    located: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Qwen3VL]]:
    """`opened(checkpoint, tiers=2)`: a planned model, the same one every time."""
    machines = tmp_path_factory.mktemp("machines")
    with contextlib.ExitStack() as stack:

        @functools.cache
        def load(name: str, tiers: int = 2) -> Qwen3VL:
            machine = helper.machine_file(machines, tiers)
            model = helper.planned(located(name), machine=machine, device_memory=MOST_BYTES)
            stack.callback(model.close)
            return model

        yield load


@pytest.fixture(scope="module")
def least(opened: Callable[..., Qwen3VL]) -> Callable[..., int]:
    """`least(checkpoint, prompt, tiers, draft)`: bytes with which an answer can go on.

    It comes from a refusal, which changes nothing.
    """

    @functools.cache
    def refused(name: str, prompt: str, tiers: int, draft: str | None) -> int:
        model = opened(name, tiers)
        runner, found = helper.runner_of(model), []
        model.set_memory(device_memory=MOST_BYTES)

        def ask_too_little() -> None:
            before = runner.machine, runner.plans, runner.executor.held
            with pytest.raises(DoesNotFitError, match="stays in force") as refusal:
                model.set_memory(device_memory=PAGE_BYTES)
            assert (runner.machine, runner.plans, runner.executor.held) == before
            found.append(refusal.value.smallest[DEVICE])

        streamer = Told({TOKENS - 1: ask_too_little})
        model.generate(**tiny.inputs(prompt), **GREEDY, draft=draft, streamer=streamer)
        gc.collect()  # the refusal's traceback holds a cache, for which there is room in plans
        (nbytes,) = found
        return nbytes

    return refused


@pytest.fixture(scope="module")
def plain(located: Callable[[str], Path]) -> Callable[[str], Qwen3VL]:
    """`plain(checkpoint)`: the model without plans."""
    return functools.cache(lambda name: Qwen3VL.from_pretrained(located(name)))


class Changing:
    """A streamer that changes the budgets of a model after some tokens, and checks its ledger."""

    def __init__(self, model: Qwen3VL, changes: Shares, least_bytes: int) -> None:
        self.model = model
        self.changes = dict(changes)
        self.token = -1
        self.least_bytes = least_bytes
        self.changed = 0
        self.runner = helper.runner_of(model)
        self.begin_ledger()

    def put(self, value: Any) -> None:
        self.token += 1
        if self.token in self.changes:
            self.check_ledger()
            room = MOST_BYTES - self.least_bytes
            budget = self.least_bytes + int(self.changes[self.token] * room)
            self.model.set_memory(device_memory=budget)
            self.begin_ledger()
            self.changed += 1

    def end(self) -> None:
        self.check_ledger()

    def begin_ledger(self) -> None:
        tiers = tuple(tier.name for tier in self.runner.machine.tiers)
        self.runner.executor._ledger = Ledger(tiers)

    def check_ledger(self) -> None:
        budget = self.runner.machine.tier(DEVICE).capacity_bytes
        assert self.runner.executor.ledger_peak_bytes[DEVICE] <= budget


# ---- the same tokens ----


@pytest.mark.parametrize(
    ("name", "prompt", "tiers", "draft"),
    [
        ("dense", "text", 2, None),
        ("dense", "image", 2, "prompt-lookup"),
        ("dense", "image", 3, None),
    ],
)
# Each example takes as long as an answer does: failing ones are shown as they are.
@settings(
    max_examples=3,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(changes=CHANGES)
def test_tokens_are_the_same_whatever_the_budgets_become(
    name: str,
    prompt: str,
    tiers: int,
    draft: str | None,
    changes: Shares,
    least: Callable[..., int],
    opened: Callable[..., Qwen3VL],
    plain: Callable[[str], Qwen3VL],
) -> None:
    inputs, model = tiny.inputs(prompt), opened(name, tiers)
    model.set_memory(device_memory=FIRST_BYTES)
    streamer = Changing(model, changes, least(name, prompt, tiers, draft))
    told = model.generate(**inputs, **GREEDY, draft=draft, streamer=streamer)
    assert streamer.changed == len(streamer.changes)
    np.testing.assert_array_equal(told, plain(name).generate(**inputs, **GREEDY, draft=draft))


def test_a_chat_with_pictures_goes_on_with_other_budgets(
    opened: Callable[..., Qwen3VL], plain: Callable[[str], Qwen3VL]
) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (64, 96, 3)).astype(np.uint8)
    chosen = load_settings(tiny.DATA / "dense").override(
        max_new_tokens=6, do_sample=False, eos_token_id=()
    )

    def conversation(model: Qwen3VL, budgets: list[int]) -> list[tuple[int, ...]]:
        chat = Chat(Processor.from_pretrained(tiny.DATA / "dense"), chosen)
        told = []

        def between_tokens() -> bool:
            if budgets:
                model.set_memory(device_memory=budgets.pop())
            return False

        for words in ("what is it?", "and this?"):
            parts = [{"type": "image", "image": picture}, {"type": "text", "text": words}]
            for _ in chat.ask(model, chat.prepare(parts), between_tokens):
                pass
            assert chat.last is not None
            told.append(chat.last.tokens)
        return told

    model = opened("dense")
    model.set_memory(device_memory=MOST_BYTES)
    budgets = [2_500_000, 4_000_000, 1_900_000, 3_000_000]
    assert conversation(model, budgets) == conversation(plain("dense"), [])
    assert budgets == []


def test_another_thread_may_change_budgets(
    opened: Callable[..., Qwen3VL], plain: Callable[[str], Qwen3VL]
) -> None:
    model, length = opened("dense"), {"max_new_tokens": 25}
    inputs, ended, changed = tiny.inputs("text"), threading.Event(), []

    def change() -> None:
        while not ended.is_set():
            for budget in (2_000_000, MOST_BYTES):
                model.set_memory(device_memory=budget)
                changed.append(budget)
                ended.wait(0.1)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        told = model.generate(**inputs, **GREEDY | length)
    finally:
        ended.set()
        thread.join()
    assert len(changed) >= 2
    np.testing.assert_array_equal(told, plain("dense").generate(**inputs, **GREEDY | length))


def test_a_budget_may_be_raised_beyond_the_first_one(
    located: Callable[[str], Path], tmp_path: Path
) -> None:
    machine = helper.machine_file(tmp_path, 2)
    model = helper.planned(located("dense"), machine=machine, device_memory=FIRST_BYTES)
    executor = helper.runner_of(model).executor
    try:
        first = helper.told(model, tiny.inputs("text"))
        assert executor.arena_bytes == FIRST_BYTES
        model.set_memory(device_memory="5MiB")
        assert executor.held == (), "it cannot stay in an arena that is made anew"
        assert executor.arena_bytes == MOST_BYTES
        np.testing.assert_array_equal(helper.told(model, tiny.inputs("text")), first)
        assert sum(rest.tier == DEVICE for rest in executor.held) > 10
    finally:
        model.close()


def test_only_a_planned_model_has_budgets(plain: Callable[[str], Qwen3VL]) -> None:
    with pytest.raises(UsageError, match="no plan could give any of it back"):
        plain("dense").set_memory(device_memory="1GB")


@pytest.mark.parametrize("size", [1.5e6, True, b"1MB"])
def test_what_is_no_size_is_refused(size: Any) -> None:
    # Not what the import hook of the tests wraps: that refuses such arguments itself.
    with pytest.raises(UsageError, match=r"device_memory=.* is no size; give whole bytes"):
        inspect.unwrap(loading._bytes)("device_memory", size)


# ---- with memory pressure ----


class System:
    """A faked /proc with 8 GB, of which a model takes what it has in use."""

    def __init__(self, root: Path, model: Qwen3VL) -> None:
        self.root, self.executor = root, helper.runner_of(model).executor
        self.time_s = 0.0
        self.leave(EVERY)

    def leave(self, nbytes: int) -> None:
        """So much is left to the model, above a margin of 512 MiB."""
        self.left_bytes = nbytes
        self.tell()

    def tell(self) -> None:
        available = self.left_bytes - self.executor.used_bytes[DEVICE] + (512 << 20)
        folder = self.root / "proc"
        folder.mkdir(exist_ok=True)
        (folder / "meminfo").write_text(
            f"MemTotal: 16000000 kB\nMemAvailable: {available // 1024} kB\n"
        )

    def clock(self) -> float:
        self.time_s += 1.0
        self.tell()
        return self.time_s


class Told:
    """A streamer that does something after some tokens."""

    def __init__(self, actions: dict[int, Callable[[], None]]) -> None:
        self.actions, self.token = actions, -1

    def put(self, value: Any) -> None:
        self.token += 1
        self.actions.get(self.token, lambda: None)()

    def end(self) -> None: ...


def test_a_model_gives_memory_back_and_takes_it_again(
    opened: Callable[..., Qwen3VL],
    plain: Callable[[str], Qwen3VL],
    tmp_path: Path,
) -> None:
    inputs, length = tiny.inputs("image"), {"max_new_tokens": 30}
    model = opened("dense")
    model.set_memory(device_memory=2_400_000)
    system, said, budgets = System(tmp_path, model), [], []
    with adapting(model, say=said.append, root=tmp_path, clock=system.clock) as adaptation:
        actions = {
            3: lambda: system.leave(2_000_000),
            5: lambda: budgets.append(adaptation.budget_bytes),
            8: lambda: system.leave(EVERY),
        }
        told = model.generate(**inputs, **GREEDY | length, streamer=Told(actions))
        budgets.append(adaptation.budget_bytes)
    np.testing.assert_array_equal(told, plain("dense").generate(**inputs, **GREEDY | length))
    # A 32nd of the user's budget is kept free, and a page is 4096 bytes.
    assert 2_000_000 - 2_400_000 // 32 - 2 * PAGE_BYTES < budgets[0] <= 2_000_000 - 2_400_000 // 32
    assert budgets[1] == 2_400_000
    assert len(adaptation.changes) == 2
    assert said[0] == NO_STALLS
    assert "budget from 2,400,000 B" in said[1]


def test_what_the_users_budget_is_enough_for_is_never_refused(
    opened: Callable[..., Qwen3VL], plain: Callable[[str], Qwen3VL], tmp_path: Path
) -> None:
    """Nothing is left while one answer is decoded; the next prompt then has a picture."""
    model = opened("dense")
    model.set_memory(device_memory=MOST_BYTES)
    system, inputs = System(tmp_path, model), tiny.inputs("image")
    with adapting(model, root=tmp_path, clock=system.clock) as adaptation:
        actions = {2: lambda: system.leave(PAGE_BYTES)}
        model.generate(**tiny.inputs("text"), **GREEDY, streamer=Told(actions))
        lowest = adaptation.budget_bytes
        told = model.generate(**inputs, **GREEDY)
    assert lowest < FIRST_BYTES
    np.testing.assert_array_equal(told, plain("dense").generate(**inputs, **GREEDY))


def test_the_users_own_change_is_the_new_ceiling(
    opened: Callable[..., Qwen3VL], tmp_path: Path
) -> None:
    model, length = opened("dense"), {"max_new_tokens": 25}
    model.set_memory(device_memory=MOST_BYTES)
    system = System(tmp_path, model)
    with adapting(model, root=tmp_path, clock=system.clock) as adaptation:
        actions = {2: lambda: model.set_memory(device_memory=2_200_000)}
        model.generate(**tiny.inputs("text"), **GREEDY | length, streamer=Told(actions))
        assert adaptation.budget_bytes == 2_200_000
        assert adaptation.changes == []


def test_a_model_adapts_once(opened: Callable[..., Qwen3VL], tmp_path: Path) -> None:
    with (
        adapting(opened("dense"), root=tmp_path),
        pytest.raises(UsageError, match="adapts already"),
        adapting(opened("dense"), root=tmp_path),
    ):
        pass


@pytest.mark.parametrize(
    "error",
    [DoesNotFitError("nothing works", {DEVICE: 1_900_000}), StoreError("no address space")],
    ids=lambda error: type(error).__name__,
)
def test_an_answer_goes_on_with_the_old_budget_where_no_other_works(
    opened: Callable[..., Qwen3VL],
    plain: Callable[[str], Qwen3VL],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    model, tried = opened("dense"), []
    model.set_memory(device_memory=2_400_000)
    system = System(tmp_path, model)

    def fails(machine: Machine) -> None:
        tried.append(machine.tier(DEVICE).capacity_bytes)
        raise error

    monkeypatch.setattr(helper.runner_of(model), "limit", fails)
    with adapting(model, root=tmp_path, clock=system.clock) as adaptation:
        actions = {3: lambda: system.leave(1_500_000)}
        told = model.generate(**tiny.inputs("image"), **GREEDY, streamer=Told(actions))
    np.testing.assert_array_equal(told, plain("dense").generate(**tiny.inputs("image"), **GREEDY))
    assert adaptation.budget_bytes == 2_400_000
    assert adaptation.changes == []
    assert tried[0] < 1_500_000
    if isinstance(error, DoesNotFitError):
        # What it says would do was tried, and then nothing more.
        assert tried[1:] == [1_900_000]


def test_a_budget_that_cannot_be_raised_is_tried_again_only_after_a_while(
    opened: Callable[..., Qwen3VL], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look takes a second of this clock, and it has to be calm for ten."""
    model, tried, length = opened("dense"), [], {"max_new_tokens": 40}
    model.set_memory(device_memory=2_400_000)
    system, runner = System(tmp_path, model), helper.runner_of(model)
    lowered = runner.limit

    def only_lowered(machine: Machine) -> None:
        if machine.tier(DEVICE).capacity_bytes < 2_400_000 and not tried:
            return lowered(machine)
        tried.append(system.time_s)
        raise StoreError("no address space")

    monkeypatch.setattr(runner, "limit", only_lowered)
    with adapting(model, root=tmp_path, clock=system.clock):
        actions = {3: lambda: system.leave(2_000_000), 5: lambda: system.leave(EVERY)}
        model.generate(**tiny.inputs("image"), **GREEDY | length, streamer=Told(actions))
    assert len(tried) > 1
    assert min(np.diff(tried)) >= 10.0
