"""Switches that hold for every test, and the tiny checkpoints that many tests share."""

import contextlib
import fcntl
import functools
import gc
import os
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import browser
import hypothesis
import jax
import pytest
import tiny
import type_checks

if TYPE_CHECKING:
    from qwen3vl_jax import Qwen3VL

type_checks.install("memsched", "qwen3vl_jax")

# What somebody has calibrated on this machine is not what is tested.
os.environ["XDG_CONFIG_HOME"] = "/nonexistent"

# Processes that a shell starts in the background ignore Ctrl-C, and so would what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A silent change of dtype or rank is how ports go wrong.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples on every run; time limits belong to pytest-timeout.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")

# 5,500 tests are collected without looking for cycles: 14.5 CPU-seconds instead of 20.8.
gc.disable()

# Files that every process of pytest-xdist can lock: to wait for a turn, and while a test runs.
DOOR, ROOM = (os.open(path, os.O_RDONLY) for path in (__file__, os.path.dirname(__file__)))


def pytest_collection_finish() -> None:
    """What is there by now stays to the end; nobody looks through it again for cycles."""
    gc.collect()
    gc.freeze()
    gc.enable()


def _enter(lock: int) -> None:
    """Waits for a turn. Who waits keeps the door shut, or there would always be somebody inside."""
    fcntl.flock(DOOR, fcntl.LOCK_EX)
    fcntl.flock(ROOM, lock)
    fcntl.flock(DOOR, fcntl.LOCK_UN)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, Any, Any]:
    """A test runs beside those of other processes."""
    _enter(fcntl.LOCK_SH)
    try:
        return (yield)
    finally:
        fcntl.flock(ROOM, fcntl.LOCK_UN)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    fcntl.flock(ROOM, fcntl.LOCK_UN)
    _enter(fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(ROOM, fcntl.LOCK_SH)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """A test that is marked `alone` runs while no other process runs any test; fixtures do not."""
    with contextlib.nullcontext() if item.get_closest_marker("alone") is None else _alone():
        return (yield)


@pytest.fixture(scope="session")
def alone() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """`with alone():` no other process runs any test; for what only a part of one needs."""
    return _alone


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> "Callable[..., Qwen3VL]":
    """`tiny_model(name, dtype="float32")`: a checkpoint of tests/tiny.py, loaded once."""
    # Imported here: the hook that checks shapes must be installed before.
    from qwen3vl_jax import Qwen3VL

    @functools.cache
    def load(name: str, dtype: str = "float32") -> Qwen3VL:
        return Qwen3VL.from_pretrained(
            tiny.checkpoint(name, tmp_path_factory.mktemp("tiny")), dtype=dtype
        )

    return load


@pytest.fixture
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[str], Path]":
    """`tiny_checkpoint(name)`: the directory of a checkpoint of tests/tiny.py."""
    return lambda name: tiny.checkpoint(name, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def shared_traces() -> Iterator[None]:
    """Phases of equal shapes are traced once in a module; for modules that plan many models."""
    from planned_models import share_traces

    with pytest.MonkeyPatch.context() as patch:
        share_traces(patch)
        yield


@pytest.fixture(scope="module")
def located(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`located(checkpoint)`: its directory, made once."""
    return functools.cache(lambda name: tiny.checkpoint(name, tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    """A browser; tests that ask for it are skipped where there is none."""
    program = browser.chromium()
    if program is None:
        pytest.skip("no Chromium here; on Debian: apt-get install chromium")
    with browser.browser(program, tmp_path_factory.mktemp("browser")) as found:
        yield found
