"""Ctrl-C that works within a second, also while XLA computes or compiles.

Python runs a signal's handler between two bytecodes of the main thread, so a KeyboardInterrupt
waits until a long call into XLA returns. The C part of the handler runs at once and writes to a
pipe that a thread reads: if the main thread has not left the guard in time, it ends the process.
What Ctrl-C means goes through the same pipe, so that the thread, however late it reads, takes a
press for what it meant when it came.

A KeyboardInterrupt in a callback of a C library, as JAX has one for garbage collection, ends there:
Python would only print it. Nothing is printed then, and the thread ends the process all the same.
"""

import contextlib
import enum
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

EXIT_CODE = 130
GRACE_S = 0.4


class Meaning(enum.Enum):
    """What Ctrl-C does.

    END: KeyboardInterrupt, and the end of the process if that is not enough in time.
    STOP: sets `stop_requested`; the second time it is END.
    RAISE: KeyboardInterrupt only.

    The values are bytes in the guard's pipe, above every signal's number.
    """

    END = 128
    STOP = 129
    RAISE = 130


class Guard:
    """What Ctrl-C means at the moment. Owns a pipe, and the thread that watches it.

    `interrupted` is whether it came and meant the end.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._left = threading.Event()
        self._meaning = Meaning.END
        self.stop_requested = False
        self.interrupted = False
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)

    @contextlib.contextmanager
    def meaning(self, meaning: Meaning) -> Iterator[None]:
        """Inside, Ctrl-C means this. No request to stop is pending at the start."""
        self._announce(meaning)
        before, self._meaning = self._meaning, meaning
        self.stop_requested = False
        try:
            yield
        finally:
            self._meaning = before
            self._announce(before)

    def _announce(self, meaning: Meaning) -> None:
        os.write(self._writer, bytes([meaning.value]))

    def _handle(self, number: int, frame: object) -> None:
        if self._meaning is Meaning.STOP and not self.stop_requested:
            self.stop_requested = True
        else:
            self.interrupted |= self._meaning is not Meaning.RAISE
            raise KeyboardInterrupt

    def _watch(self) -> None:
        meaning, presses = Meaning.END, 0
        while (received := os.read(self._reader, 1)) and not self._left.is_set():
            if received[0] >= Meaning.END.value:
                meaning, presses = Meaning(received[0]), 0
                continue
            if received[0] != signal.SIGINT:
                continue
            presses += 1
            if meaning is Meaning.RAISE or (meaning is Meaning.STOP and presses == 1):
                continue
            if not self._left.wait(self._grace_s):
                os.write(2, b"\ninterrupted\n")
                os._exit(EXIT_CODE)


@contextlib.contextmanager
def _quiet_callbacks() -> Iterator[None]:
    """Inside, a KeyboardInterrupt that a callback swallowed is not printed."""
    before = sys.unraisablehook

    def hook(unraisable: "UnraisableHookArgs") -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def guarded(grace_s: float = GRACE_S) -> Iterator[Guard]:
    """Inside, Ctrl-C does what the yielded guard's `meaning` says; at first, END.

    Outside the main thread, where Python handles no signals, nothing is changed.
    """
    guard = Guard(grace_s)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:
        before = signal.signal(signal.SIGINT, guard._handle)
        wakeup_before = signal.set_wakeup_fd(guard._writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=guard._watch, name="ctrl-c", daemon=True)
    watcher.start()
    try:
        with _quiet_callbacks():
            yield guard
    finally:
        guard._left.set()
        if in_main_thread:
            signal.set_wakeup_fd(wakeup_before)
            signal.signal(signal.SIGINT, before)
        os.close(guard._writer)
        watcher.join()
        os.close(guard._reader)
