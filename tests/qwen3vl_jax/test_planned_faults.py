"""What goes wrong under a planned model is told, by the name of the array; no token is wrong."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import checkpoint_factory as factory
import numpy as np
import planned_models as helper
import pytest

from memsched.errors import DamagedError, StoreError
from memsched.machine import DEVICE, NVME
from memsched.plan import Copy
from memsched.runtime import loop
from qwen3vl_jax import Qwen3VL
from qwen3vl_jax.errors import StorageError, WeightError

pytestmark = pytest.mark.usefixtures("shared_traces")

CHILD = Path(__file__).with_name("planned_killed.py")
ROOT = Path(__file__).parents[2]
KILLS = 6
TOKENS = 6
PROMPT = [5, 6, 7, 8, 9]
INPUTS = {"input_ids": np.array([PROMPT])}
ROPE = {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"}
SETTINGS: dict[str, Any] = {
    "text": {
        "head_dim": 16,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "intermediate_size": 256,
        "rope_parameters": ROPE | {"rope_theta": 5000000},
    },
    "vision": {"out_hidden_size": 64},
}
# About half of the model: every token brings the rest of it.
BUDGETS: dict[str, Any] = {"device_memory": 450_000, "nvme_space": 1 << 20}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same model in both formats, and a machine."""
    folder = tmp_path_factory.mktemp("made")
    factory.checkpoint(folder / "huggingface", shards=2, **SETTINGS)
    helper.store_of(folder / "huggingface", folder / "store")
    helper.machine_file(folder, 2)
    return folder


@pytest.fixture(scope="module")
def wanted(made: Path) -> np.ndarray:
    return helper.told(Qwen3VL.from_pretrained(made / "huggingface"), INPUTS, tokens=TOKENS)


@pytest.fixture
def spill(tmp_path: Path) -> Path:
    return tmp_path / "spill"


@pytest.fixture
def opened(made: Path, spill: Path) -> Iterator[Callable[..., Qwen3VL]]:
    """`opened(checkpoint)`: a planned model; nothing of it is left after the test."""
    models = []

    def open_model(path: Path, **budgets: Any) -> Qwen3VL:
        machine = made / "2tiers.toml"
        given = {**BUDGETS, **budgets}
        models.append(helper.planned(path, machine=machine, nvme_dir=spill, **given))
        return models[-1]

    yield open_model
    for model in models:
        model.close()
    assert helper.our_threads() == []
    assert not spill.exists() or list(spill.iterdir()) == []


def told(model: Qwen3VL) -> list[int]:
    found: list[int] = helper.told(model, INPUTS, tokens=TOKENS).tolist()
    return found


def test_tokens_are_right_and_weights_are_read_for_each(
    made: Path, wanted: np.ndarray, opened: Callable[..., Qwen3VL]
) -> None:
    model = opened(made / "store")
    assert told(model) == wanted.tolist()
    first = helper.runner_of(model).executor.read_bytes
    assert told(model) == wanted.tolist()
    assert helper.runner_of(model).executor.read_bytes > first + (TOKENS - 1) * 100_000


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


def cut(path: Path, place: float) -> None:
    os.truncate(path, int(place * path.stat().st_size))


def remove(path: Path, _place: float) -> None:
    path.unlink()


def chunks(store: Path, model: Qwen3VL | None) -> list[Path]:
    """Chunks that are read, sorted: what an open model brings for each token, or else all but those
    of the vision tower, which text does not use.
    """
    found = [path for path in store.rglob("c.*") if "visual" not in str(path)]
    if model is not None:
        actions = helper.runner_of(model).plans["decode"].plan.actions
        streamed = {one.array for one in actions if isinstance(one, Copy)}
        found = [path for path in found if path.parent.name in streamed]
    return sorted(found)


@pytest.mark.parametrize("spoil", [flip, cut, remove])
@pytest.mark.parametrize("when", ["before it is opened", "after some tokens"])
def test_a_damaged_chunk_is_told_by_its_array(
    spoil: Callable[[Path, float], None],
    when: str,
    made: Path,
    wanted: np.ndarray,
    tmp_path: Path,
    opened: Callable[..., Qwen3VL],
) -> None:
    store = Path(shutil.copytree(made / "store", tmp_path / "store"))
    chosen = random.Random(f"{spoil.__name__} {when}")
    model = opened(store) if when == "after some tokens" else None
    if model is not None:
        assert told(model) == wanted.tolist()
    # A file that was put back has another time of change: an open model refuses it.
    for path in chosen.sample(chunks(store, model), 4 if model is None else 1):
        content = path.read_bytes()
        spoil(path, chosen.random())
        with pytest.raises((DamagedError, WeightError)) as caught:
            told(opened(store) if model is None else model)
        assert path.parent.name in str(caught.value)
        path.write_bytes(content)
    if model is None:
        assert told(opened(store)) == wanted.tolist()


@pytest.mark.parametrize("spoil", [flip, cut, remove])
def test_a_shard_that_changes_under_a_model_is_told(
    spoil: Callable[[Path, float], None],
    made: Path,
    wanted: np.ndarray,
    tmp_path: Path,
    opened: Callable[..., Qwen3VL],
) -> None:
    folder = Path(shutil.copytree(made / "huggingface", tmp_path / "huggingface"))
    model = opened(folder)
    assert told(model) == wanted.tolist()
    for shard in folder.glob("*.safetensors"):
        spoil(shard, 0.7)
    with pytest.raises((DamagedError, WeightError), match=r"array '|tensor '|safetensors"):
        told(model)


class Failing:
    """A system call that fails with an errno from its `first` call on, until it is `mended`."""

    def __init__(self, call: Callable[..., int], number: int, first: int) -> None:
        self.call, self.number, self.first = call, number, first
        self.calls, self.mended = 0, False

    def __call__(self, *arguments: Any) -> int:
        self.calls += 1
        if self.calls >= self.first and not self.mended:
            raise OSError(self.number, os.strerror(self.number))
        return self.call(*arguments)


# Of the 83 calls of an answer.
@pytest.mark.parametrize("first", [1, 9, 40, 70])
def test_a_read_error_is_told_and_the_model_can_be_used_on(
    first: int,
    made: Path,
    wanted: np.ndarray,
    opened: Callable[..., Qwen3VL],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = opened(made / "store")
    failing = Failing(os.preadv, errno.EIO, first)
    monkeypatch.setattr(os, "preadv", failing)
    told_by = r"(embed_tokens|layers\.\d|norm|lm_head).*: Input/output error; check the disk"
    with pytest.raises((StoreError, StorageError), match=told_by):
        told(model)
    failing.mended = True
    assert told(model) == wanted.tolist()


def test_a_disk_that_is_full_at_the_start_is_told(
    made: Path, opened: Callable[..., Qwen3VL], spill: Path
) -> None:
    with pytest.raises(StoreError, match="cannot be reserved in"):
        opened(made / "store", nvme_space="900TB")
    assert list(spill.iterdir()) == []


@pytest.fixture(scope="module")
def tight(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """The smallest budgets that work: arrays that steps make are moved out to disk then."""
    from memsched.errors import DoesNotFitError

    budgets = {DEVICE: 4096, NVME: 0}
    while True:
        given = {"device_memory": budgets[DEVICE], "nvme_space": budgets[NVME]}
        folder = tmp_path_factory.mktemp("tight")
        model = helper.planned(
            made / "store", machine=made / "2tiers.toml", nvme_dir=folder, **given
        )
        try:
            told(model)
        except DoesNotFitError as error:
            raised = budgets | error.smallest
        else:
            assert helper.runner_of(model).executor.written_bytes > 0
            return given
        finally:
            model.close()
        assert raised != budgets
        budgets = raised


def test_a_disk_that_is_full_later_is_told_and_the_model_can_be_used_on(
    made: Path,
    wanted: np.ndarray,
    tight: dict[str, int],
    opened: Callable[..., Qwen3VL],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = opened(made / "store", **tight)
    failing = Failing(os.pwritev, errno.ENOSPC, 2)
    monkeypatch.setattr(os, "pwritev", failing)
    with pytest.raises(StoreError, match=r"array '.+' cannot be written to .*No space left"):
        told(model)
    failing.mended = True
    assert told(model) == wanted.tolist()


def test_a_bit_that_flips_among_spilled_arrays_is_told(
    made: Path,
    tight: dict[str, int],
    opened: Callable[..., Qwen3VL],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = opened(made / "store", **tight)
    write = os.pwritev

    def flipping(descriptor: int, parts: Sequence[np.ndarray], offset: int) -> int:
        content = b"".join(part.tobytes() for part in parts)
        return write(descriptor, [bytes([content[0] ^ 1]) + content[1:]], offset)

    monkeypatch.setattr(os, "pwritev", flipping)
    with pytest.raises(DamagedError, match=r"array '.+': the spill file .* is damaged"):
        told(model)


@pytest.mark.parametrize("step", [3, 20, 40])
def test_ctrl_c_leaves_no_thread_and_no_file(
    step: int,
    made: Path,
    opened: Callable[..., Qwen3VL],
    monkeypatch: pytest.MonkeyPatch,
    spill: Path,
) -> None:
    model = opened(made / "store")
    run, calls = loop._run, 0

    def interrupted(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == step:
            signal.raise_signal(signal.SIGINT)
        run(*arguments)

    monkeypatch.setattr(loop, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        told(model)
    assert helper.our_threads() == []
    assert list(spill.iterdir()) == []


def test_killed_processes_and_two_at_once_leave_nothing_and_tell_no_wrong_token(
    made: Path,
    wanted: np.ndarray,
    tight: dict[str, int],
    tmp_path: Path,
    spill: Path,
    opened: Callable[..., Qwen3VL],
) -> None:
    asked = {
        "model": str(made / "store"),
        "machine": str(made / "2tiers.toml"),
        "nvme_dir": str(spill),
        "out": str(tmp_path),
        "budgets": tight,
        "prompt": PROMPT,
        "tokens": TOKENS,
        "kills": KILLS,
    }
    done = subprocess.run(
        [sys.executable, str(CHILD), json.dumps(asked)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=500,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ended"] == [0, 0]
    assert found["told"] == [wanted.tolist()] * 2
    assert found["died"] == [-signal.SIGKILL] * KILLS
    assert found["left"] == []
    assert told(opened(made / "store", **tight)) == wanted.tolist()
