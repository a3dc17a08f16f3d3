"""A Copy under way in the background."""

import functools
import time
from concurrent.futures import Future, wait
from typing import Any

from memsched.runtime.operations import CopyOp
from memsched.runtime.record import blame


class Transfer:
    """What a Copy will bring, and when it was busy.

    `times_s` is where it began and ended, the latter 0 while it is under way. A lane that serves
    transfers one after the other knows only when each ended: it was busy from the later of its
    issue and the end of the one before.
    """

    def __init__(self, op: CopyOp) -> None:
        self.op = op
        self.times_s = [time.perf_counter(), 0.0]
        self._value: Any = None
        self._future: Future[Any] | None = None

    def follow(self, future: Future[Any], value: Any = None) -> None:
        """The work has been handed in: it gives `value`, or what the future brings if None."""
        self._value = value
        self._future = future
        # No reference to the transfer itself: that would be a cycle, which only gc could free.
        future.add_done_callback(functools.partial(_ended, self.times_s))

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future is not None and self._future.done()

    def result(self) -> Any:
        """The array in its new place, once it is there.

        Raises:
            Exception: what the work raised, with a note of the action.
        """
        assert self._future is not None, "a transfer is waited for after it was handed in"
        try:
            made = self._future.result()
        except Exception as error:
            blame(error, self.op.index, self.op.action)
            raise
        return made if self._value is None else self._value

    def settle(self) -> None:
        """Wait until it has ended, whatever the outcome."""
        if self._future is not None and not self._future.cancel():
            wait([self._future])


def _ended(times_s: list[float], _future: Future[Any]) -> None:
    times_s[1] = time.perf_counter()
