"""A planned model gives the bits of an unplanned one, whatever it may use of which memory."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import planned_models as helper
import pytest
import tiny
from learned_costs import coefficients

from memsched.cost.coefficients_file import write_cost
from memsched.errors import DoesNotFitError
from memsched.machine import DEVICE, HOST, NVME
from memsched.plan import Plan
from memsched.profiles import load_machine
from memsched.program import Program
from memsched.referee import verify
from qwen3vl_jax import Qwen3VL
from qwen3vl_jax.config import load_config
from qwen3vl_jax.generation import Session
from qwen3vl_jax.generation_settings import GenerationSettings
from qwen3vl_jax.planned import loading

pytestmark = pytest.mark.usefixtures("shared_traces")

PAGE_BYTES = 4096
MOST_BYTES = 5 << 20  # holds any of the checkpoints, and all else
BUDGETS = 1
SIZES = {DEVICE: "device_memory", HOST: "host_memory", NVME: "nvme_space"}
# Checkpoint, format, prompt, tiers. Batches are padded; "two_images" has two sizes of pictures.
SUBJECTS = (
    ("dense", "huggingface", "batch_left", 2),
    ("dense", "store", "text", 2),
    ("dense", "store", "text", 3),
    ("dense_tied", "store", "two_images", 3),
    ("moe", "store", "image", 2),
    ("moe", "huggingface", "image", 3),
    ("moe_mixed", "huggingface", "text_batch_right", 2),
)
Bits = list[tuple[str, tuple[int, ...], bytes]]
Ran = list[tuple[Plan, Program]]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Files of machines with two and with three tiers."""
    folder = tmp_path_factory.mktemp("machines")
    return {tiers: helper.machine_file(folder, tiers) for tiers in (2, 3)}


@pytest.fixture(scope="module")
def located(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`located(checkpoint, format)`: its directory, made once."""

    @functools.cache
    def locate(name: str, form: str) -> Path:
        found = tiny.checkpoint(name, tmp_path_factory.mktemp("checkpoint"))
        if form == "huggingface":
            return found
        return helper.store_of(found, tmp_path_factory.mktemp("stores") / name)

    return locate


def bits(arrays: list[np.ndarray]) -> Bits:
    return [(array.dtype.name, array.shape, array.tobytes()) for array in arrays]


def all_answers(model: Qwen3VL, inputs: Mapping[str, np.ndarray]) -> Bits:
    """Scores of the prompt and of three tokens, from a cache; then what `generate` tells."""
    return bits([*helper.answers(model, inputs), helper.told(model, inputs)])


@pytest.fixture(scope="module")
def wanted(located: Callable[[str, str], Path]) -> Callable[[str, str], Bits]:
    """`wanted(checkpoint, prompt)`: what the unplanned model answers."""

    @functools.cache
    def answer(name: str, prompt: str) -> Bits:
        model = Qwen3VL.from_pretrained(located(name, "huggingface"))
        return all_answers(model, tiny.inputs(prompt))

    return answer


def weights_bytes(model: Qwen3VL) -> int:
    return sum(array.size * array.dtype.itemsize for array in model.parameters.values())


def workable(run: Callable[[dict[str, int]], Any], least: Mapping[str, int]) -> dict[str, int]:
    """Raises budgets to what each refusal asks for, until a run is not refused."""
    budgets = dict(least)
    for _ in range(20):
        try:
            run(budgets)
        except DoesNotFitError as refusal:
            raised = {name: max(size, budgets[name]) for name, size in refusal.smallest.items()}
            assert budgets | raised != budgets, "a refusal asks for more than there is"
            budgets |= raised
        else:
            return budgets
    raise AssertionError("each refusal was followed by another")


class Subject:
    """One checkpoint, prompt and machine under different budgets."""

    def __init__(
        self, path: Path, inputs: dict[str, np.ndarray], machine: Path, spill: Path, ran: Ran
    ) -> None:
        self.path, self.inputs, self.machine = path, inputs, machine
        self.spill, self.ran = spill, ran

    def answers(self, budgets: Mapping[str, int]) -> Bits:
        """What a model with these budgets answers, after its ledger was compared with `verify`."""
        given: dict[str, Any] = {SIZES[name]: size for name, size in budgets.items()}
        self.ran.clear()
        model = helper.planned(self.path, machine=self.machine, nvme_dir=self.spill, **given)
        try:
            found = all_answers(model, self.inputs)
            self.check_ledger(model, budgets)
        finally:
            model.close()
        assert helper.our_threads() == []
        assert list(self.spill.iterdir()) == []
        return found

    def check_ledger(self, model: Qwen3VL, budgets: Mapping[str, int]) -> None:
        """Every peak is the highest that `verify` computes for a plan that ran."""
        runner = helper.runner_of(model)
        peaks = [verify(plan, program, runner.machine) for plan, program in self.ran]
        for tier, peak in runner.executor.ledger_peak_bytes.items():
            assert peak == max(found[tier] for found in peaks), tier
            assert peak <= budgets.get(tier, helper.ROOM_BYTES)


@pytest.fixture
def subject(
    located: Callable[[str, str], Path],
    machines: dict[int, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Subject]:
    """`subject(checkpoint, format, prompt, tiers)`."""
    ran = helper.recorded(monkeypatch)

    def make(name: str, form: str, prompt: str, tiers: int) -> Subject:
        inputs = tiny.inputs(prompt)
        return Subject(located(name, form), inputs, machines[tiers], tmp_path / "spill", ran)

    return make


@pytest.mark.parametrize(("name", "form", "prompt", "tiers"), SUBJECTS)
def test_logits_and_tokens_are_the_unplanned_ones_within_any_budget(
    name: str,
    form: str,
    prompt: str,
    tiers: int,
    subject: Callable[..., Subject],
    wanted: Callable[[str, str], Bits],
) -> None:
    tried = subject(name, form, prompt, tiers)
    random = np.random.default_rng(SUBJECTS.index((name, form, prompt, tiers)))
    least = {DEVICE: PAGE_BYTES, NVME: 0} | ({HOST: PAGE_BYTES} if tiers == 3 else {})
    found: list[Bits] = []
    smallest = workable(lambda budgets: found.append(tried.answers(budgets)), least)
    assert found == [wanted(name, prompt)]
    with pytest.raises(DoesNotFitError):
        tried.answers(smallest | {DEVICE: smallest[DEVICE] - PAGE_BYTES})
    assert smallest[DEVICE] < weights_bytes(Qwen3VL.from_pretrained(tried.path))
    for _ in range(BUDGETS):
        budgets = {
            tier: int(size + random.random() * max(0, MOST_BYTES - size))
            for tier, size in smallest.items()
        }
        assert tried.answers(budgets) == wanted(name, prompt), budgets


def test_from_pretrained_takes_a_budget_and_measures_the_machine(
    located: Callable[[str, str], Path], wanted: Callable[[str, str], Bits]
) -> None:
    model = Qwen3VL.from_pretrained(located("dense", "store"), device_memory="1.5MB")
    try:
        assert all_answers(model, tiny.inputs("text")) == wanted("dense", "text")
        peaks = helper.runner_of(model).executor.ledger_peak_bytes
        assert 1_000_000 < peaks[DEVICE] <= 1_500_000
    finally:
        model.close()


@pytest.mark.parametrize("name", ["dense", "dense_tied"])
def test_vocabularies_in_blocks_of_several_sizes_change_no_bit(
    name: str,
    located: Callable[[str, str], Path],
    wanted: Callable[[str, str], Bits],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = located(name, "huggingface")
    whole = load_config(path / "config.json").text.vocab_size
    rows = (whole // 2, 16, 16, whole // 4, whole - whole // 2 - whole // 4 - 32)
    monkeypatch.setattr(loading, "vocab_blocks", lambda *_: rows)
    model = Qwen3VL.from_pretrained(path, device_memory="1.5MB")
    try:
        assert all_answers(model, tiny.inputs("text")) == wanted(name, "text")
        table = model.network.language_model.embed_tokens.weight
        assert tuple(block.get_value().shape[0] for block in table) == rows
    finally:
        model.close()


def conversation(model: Qwen3VL) -> Bits:
    """Two prompts and answers with drafts, for which the cache grows; then a prompt in pieces."""
    settings = GenerationSettings(max_new_tokens=6, draft="prompt-lookup")
    prompt = tiny.inputs("text")["input_ids"][:, :8]
    session = Session(model, batch=1, capacity=48)
    found = []
    for repeats in (4, 3):
        capacity = session.length + 8 * repeats + 16
        session.prompt({"input_ids": np.tile(prompt, (1, repeats))}, capacity=capacity)
        found += [step.tokens for step in session.answer(settings)]
    assert session.capacity > 64
    assert session.drafts.passes > 0
    cache = model.new_cache(batch=1, capacity=session.capacity)
    scores, _ = model.prefill(tiny.inputs("text"), cache, chunk_tokens=12)
    return bits([*found, np.asarray(scores)])


def test_a_conversation_with_drafts_is_the_unplanned_one(
    located: Callable[[str, str], Path], machines: dict[int, Path]
) -> None:
    path = located("dense", "store")
    model = helper.planned(path, machine=machines[2], device_memory=1_700_000)
    try:
        assert conversation(model) == conversation(Qwen3VL.from_pretrained(path))
        assert helper.runner_of(model).executor.ledger_peak_bytes[DEVICE] <= 1_700_000
    finally:
        model.close()


def test_the_report_of_a_run_says_what_nine_of_ten_times_are_enough_once_calibrated(
    tmp_path: Path,
) -> None:
    checkpoint, machine = tiny.checkpoint("dense", tmp_path), helper.machine_file(tmp_path, 2)

    def reported() -> dict[str, Any]:
        with contextlib.closing(helper.planned(checkpoint, machine=machine)) as model:
            helper.answers(model, tiny.inputs("text"), tokens=1)
            phases: dict[str, Any] = model.plan.to_dict()["phases"]
            return phases

    assert {phase["seconds_p90"] for phase in reported().values()} == {None}
    write_cost(coefficients(load_machine(machine)), machine)
    phases = reported()
    assert {"prefill", "decode"} <= phases.keys()
    # The margins of these coefficients are e^0.1 to e^0.5 of a step, 1.3 of a transfer.
    for phase in phases.values():
        assert 1.1 * phase["seconds"] <= phase["seconds_p90"] <= 1.65 * phase["seconds"]


def test_a_report_after_a_run_says_what_its_times_rest_on_and_what_plainer_ways_take(
    located: Callable[[str, str], Path], machines: dict[int, Path]
) -> None:
    path = located("dense", "store")
    with contextlib.closing(
        helper.planned(path, machine=machines[2], device_memory=1_100_000)
    ) as model:
        helper.answers(model, tiny.inputs("text"), tokens=3)
        after, text, page = model.plan.to_dict(), model.plan.report(), model.plan.html()
    basis = "the profile's rates; nothing was measured"
    assert after["assumptions"]["seconds"].startswith(basis)
    assert f"times: {basis}" in text.replace("\n", " ")
    assert "nothing was measured" in page
    assert {"resident", "tail spill", "lru", "clock", "adaptive"} <= after["baselines"].keys()
    seconds = after["phases"]["decode"]["seconds"]
    plain = [one for one in after["baselines"].values() if one is not None]
    assert len(plain) > 3
    assert seconds <= min(plain) * (1 + 1e-9)
    assert "decode" in after["measured"], "it was a report of no run"
