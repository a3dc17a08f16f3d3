"""What scripts say of their own process, and how they end."""

import argparse
import contextlib
import signal
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest

from qwen3vl_jax import console
from qwen3vl_jax.interrupts import Guard, Meaning

CHILD = "from qwen3vl_jax import console; print(console.peak_process_bytes())"


def test_the_peak_of_a_process_is_its_own_and_not_that_of_the_one_that_started_it() -> None:
    large = np.ones(400_000_000, np.uint8)
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert large[-1] == 1
    assert 5_000_000 < int(done.stdout) < 200_000_000


def ended_by_c_code(guard: Guard) -> int:
    """Ctrl-C in code of C that makes an error of its own of it, as some do."""
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    raise SystemError("a method returned a result with an exception set")


def test_ctrl_c_is_ctrl_c_whatever_code_of_c_makes_of_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert console.run(ended_by_c_code, debug=False) == console.INTERRUPTED
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_an_error_after_a_ctrl_c_that_was_answered_is_that_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def answered(guard: Guard) -> int:
        with guard.meaning(Meaning.RAISE):
            return ended_by_c_code(guard)

    assert console.run(answered, debug=False) == 1
    assert "SystemError" in capsys.readouterr().err


def test_ctrl_c_while_the_command_line_is_read_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def parse(argv: Sequence[str] | None) -> argparse.Namespace:
        raise KeyboardInterrupt

    assert console.main(parse, lambda options, guard: 0, ()) == console.INTERRUPTED
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_who_closes_stdout_gets_no_text_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def speak(guard: Guard) -> int:
        return sys.stdout.write("nobody hears this") * 0

    monkeypatch.setattr(sys, "stdout", None)
    assert console.run(speak, debug=False) == 0
    sys.stdout.close()
