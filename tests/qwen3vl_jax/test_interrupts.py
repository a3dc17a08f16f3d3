"""Ctrl-C, in child processes that do what is hardest to interrupt."""

import signal
import subprocess
import sys
import time

import pytest
from quick import least_s

# Hashing for a minute is one C call that lets go of the GIL, as calls into XLA are.
LONG_CALL = """
import hashlib
from qwen3vl_jax import interrupts
with interrupts.guarded() as guard:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)
"""

ANSWERING = """
import sys, time
from qwen3vl_jax import interrupts
from qwen3vl_jax.interrupts import Meaning
with interrupts.guarded() as guard:
    with guard.meaning(Meaning.STOP):
        print("ready", flush=True)
        while not guard.stop_requested:
            time.sleep(0.01)
    print("stopped", flush=True)
    with guard.meaning(Meaning.RAISE):
        try:
            print("waiting", flush=True)
            time.sleep(30)
        except KeyboardInterrupt:
            time.sleep(0.8)
            print("raised", flush=True)
    print("left", flush=True)
"""

# The watching thread reads nothing until the answer has stopped, as on a busy machine.
LATE_WATCHER = """
import threading, time
from qwen3vl_jax import interrupts
from qwen3vl_jax.interrupts import Guard, Meaning
stopped, watch = threading.Event(), Guard._watch
Guard._watch = lambda guard: (stopped.wait(), watch(guard))
with interrupts.guarded() as guard:
    with guard.meaning(Meaning.STOP):
        print("ready", flush=True)
        while not guard.stop_requested:
            time.sleep(0.01)
    stopped.set()
    time.sleep(0.8)
    print("left", flush=True)
"""

# Ctrl-C while a callback of the garbage collector runs, which swallows what it raises.
IN_A_CALLBACK = """
import gc, os, signal, time
from qwen3vl_jax import interrupts
def callback(phase, info):
    if phase == "start":
        print("ready", flush=True)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
with interrupts.guarded() as guard:
    gc.callbacks.append(callback)
    gc.collect()
    gc.callbacks.clear()
    time.sleep(30)
"""

STUCK_ANSWER = """
import hashlib
from qwen3vl_jax import interrupts
from qwen3vl_jax.interrupts import Meaning
with interrupts.guarded() as guard, guard.meaning(Meaning.STOP):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)
"""


def started(code: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def interrupted(child: subprocess.Popen[str]) -> tuple[float, str]:
    """Seconds from Ctrl-C to the end of the process, and what it complained."""
    sent = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, complaints = child.communicate(timeout=60)
    return time.monotonic() - sent, complaints


@pytest.mark.alone
def test_ctrl_c_ends_a_process_that_is_inside_one_long_call() -> None:
    def ended() -> float:
        child = started(LONG_CALL)
        time.sleep(0.3)  # on a busy machine the call begins some time after the line before it
        taken_s, complaints = interrupted(child)
        assert child.returncode == 130
        assert "interrupted" in complaints
        return taken_s

    assert least_s(ended, 1.0, most_s=5.0) < 1.0


def test_while_answering_the_first_ctrl_c_stops_and_while_waiting_it_only_raises() -> None:
    child = started(ANSWERING)
    assert child.stdout is not None
    child.send_signal(signal.SIGINT)
    assert [child.stdout.readline() for _ in range(2)] == ["stopped\n", "waiting\n"]
    child.send_signal(signal.SIGINT)
    rest, complaints = child.communicate(timeout=60)
    assert (rest, complaints, child.returncode) == ("raised\nleft\n", "", 0)


def test_a_request_to_stop_that_is_seen_late_does_not_end_the_process() -> None:
    child = started(LATE_WATCHER)
    child.send_signal(signal.SIGINT)
    rest, complaints = child.communicate(timeout=60)
    assert (rest, complaints, child.returncode) == ("left\n", "", 0)


def test_ctrl_c_in_a_callback_ends_the_process_and_prints_no_traceback() -> None:
    began = time.monotonic()
    complaints = started(IN_A_CALLBACK).communicate(timeout=60)[1]
    assert time.monotonic() - began < 20
    assert complaints == "\ninterrupted\n"


@pytest.mark.alone
def test_a_second_ctrl_c_ends_an_answer_that_does_not_stop() -> None:
    def ended() -> float:
        child = started(STUCK_ANSWER)
        child.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=1.0)
        taken_s, _ = interrupted(child)
        assert child.returncode == 130
        return taken_s

    assert least_s(ended, 1.0, most_s=5.0) < 1.0
