"""scripts/generate.py as a program of its own: start-up, imports, signals, pipes."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from quick import least_s

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "generate.py"
MODEL = str(tiny.DATA / "dense")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny checkpoint, greedy and with no end token: its answers have the length asked for."""
    folder = tmp_path_factory.mktemp("models") / "endless"
    shutil.copytree(tiny.DATA / "dense", folder)
    (folder / "generation_config.json").write_text('{"do_sample": false, "eos_token_id": []}')
    return str(folder)


# ---- as a program ----


@pytest.mark.alone
def test_help_and_version_answer_within_half_a_second_from_anywhere(tmp_path: Path) -> None:
    for flag, says in (("--help", "--max-new-tokens"), ("--version", "qwen3vl-jax")):

        def answered(flag: str = flag, says: str = says) -> float:
            started = time.monotonic()
            done = subprocess.run(
                [sys.executable, SCRIPT, flag],
                cwd=tmp_path,
                env=ENVIRONMENT,
                capture_output=True,
                text=True,
                check=False,
            )
            taken_s = time.monotonic() - started
            assert (done.returncode, done.stderr) == (0, "")
            assert says in done.stdout
            return taken_s

        assert least_s(answered, 0.5, attempts=10) < 0.5


WITHOUT_TORCH = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as left:
    assert left.code == 0, left.code
found = {name.partition(".")[0] for name in sys.modules} & {"torch", "torchvision", "matplotlib"}
assert not found, found
"""


def test_an_answer_imports_no_torch_and_survives_a_terminal_without_unicode() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, SCRIPT, "--model", MODEL, "-p", "x", "-n", "40"],
        env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert len(done.stdout) > 10


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    pipe = subprocess.PIPE
    command = [sys.executable, SCRIPT, *arguments]
    with subprocess.Popen(command, env=ENVIRONMENT, stdin=pipe, stdout=pipe, stderr=pipe) as child:
        try:
            yield child
        finally:
            child.kill()


def interrupted(child: subprocess.Popen[bytes]) -> float:
    """Seconds from Ctrl-C to the end of the process."""
    sent = time.monotonic()
    child.send_signal(signal.SIGINT)
    child.wait(timeout=30)
    return time.monotonic() - sent


@pytest.mark.alone
def test_ctrl_c_ends_with_130_within_a_second_while_answering(endless: str) -> None:
    def ended() -> float:
        with started("--model", endless, "-p", "x", "-n", "4000") as child:
            assert child.stdout is not None
            assert child.stdout.read(5)
            taken_s = interrupted(child)
            assert child.returncode == 130
            assert child.communicate()[1].count(b"\n") <= 3
        return taken_s

    assert least_s(ended, 1.0, most_s=5.0) < 1.0


@pytest.mark.alone
@pytest.mark.parametrize("delay_s", [0.0, 0.8])
def test_ctrl_c_ends_with_130_within_a_second_while_loading_or_compiling(
    endless: str, delay_s: float
) -> None:
    def ended() -> float:
        with started("--model", endless, "-p", "x", "-n", "4000") as child:
            assert child.stderr is not None
            assert child.stderr.readline().startswith(b"loading ")
            time.sleep(delay_s)
            taken_s = interrupted(child)
            complaints = child.stderr.read()
            assert child.returncode == 130, complaints
            assert complaints.count(b"\n") <= 2
        return taken_s

    assert least_s(ended, 1.0, most_s=5.0) < 1.0


def test_ctrl_c_in_a_conversation_stops_the_answer_only(endless: str) -> None:
    with started("--model", endless, "--interactive", "-n", "4000", "-p", "x") as child:
        assert child.stdout is not None
        assert child.stdout.read(5)
        child.send_signal(signal.SIGINT)
        err = child.communicate(b"/stats\n/quit\n", timeout=60)[1]
        assert child.returncode == 0, err
        assert b"Generation: " in err
        assert b"Generation: 4000 tokens" not in err


def test_a_reader_that_goes_away_ends_it_quietly(endless: str) -> None:
    with started("--model", endless, "-p", "x", "-n", "4000", "-q") as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.read(5)
        child.stdout.close()
        assert child.wait(timeout=60) == 0
        assert child.stderr.read() == b""
