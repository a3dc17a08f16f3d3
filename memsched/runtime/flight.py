"""Runs that are dispatched and may not have ended.

A dispatch returns at once and the step runs behind it, so the next one is prepared meanwhile. At
most two are under way, the second waiting for the first: never two working sets at a time.
"""

import collections
import time
from typing import Any

from memsched.runtime.operations import RunOp
from memsched.runtime.record import Record, blame

# A result is ready when the whole dispatch that made it has ended, and so read all its inputs. It
# is a jax.Array, whose types do not know that it `is_ready`.
_Result = Any
_UnderWay = tuple[RunOp, _Result, float]

# XLA:CPU says that a step has ended before it gives its workspace back: 0.5 ms before, where the
# thread that would do it has to wait for a core. Steps with large workspaces take 5 ms and more.
SETTLING_S = 3e-4


class Flight:
    """The dispatches of one run of a plan, in order."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._runs: collections.deque[_UnderWay] = collections.deque()
        self._free_s = self._looked_s = record.start_s
        self._unsure_s = 0.0

    def look(self) -> None:
        """Note what has ended by now: of an end between two looks no more is known than that.

        Only while another run waits behind it: XLA tells those who asked last first, and a run that
        is dispatched later would begin before this thread hears of the end.
        """
        if len(self._runs) < 2:
            return
        if self._runs[0][1].is_ready():
            self._end_first()
        else:
            self._looked_s = time.perf_counter()

    def make_room(self, op: RunOp) -> None:
        """Wait until `op` may be dispatched."""
        self.end(op.number - 2 if op.follows else op.number - 1)
        if op.settles:
            time.sleep(SETTLING_S)

    def began(self, op: RunOp, results: tuple[_Result, ...], start_s: float) -> None:
        """`op` was dispatched."""
        self._runs.append((op, results[op.witness], start_s))

    def end(self, number: int) -> None:
        """Wait until all dispatches up to `number` have ended.

        Raises:
            Exception: what the step raised, with a note of the action.
        """
        while self._runs and self._runs[0][0].number <= number:
            self._end_first()

    def end_all(self) -> None:
        """Wait until nothing runs."""
        if self._runs:
            self.end(self._runs[-1][0].number)

    def abandon(self) -> None:
        """Wait until nothing runs, whatever the outcome."""
        while self._runs:
            try:
                self.end_all()
            except Exception:
                # The error that led here is the one that is told.
                self._runs.popleft()

    def _end_first(self) -> None:
        """Wait until the first run has ended, and write down when it was busy."""
        op, witness, start_s = self._runs[0]
        is_late = witness.is_ready()
        try:
            witness.block_until_ready()
        except Exception as error:
            blame(error, op.index, op.action)
            raise
        self._runs.popleft()
        end_s, busy_s = time.perf_counter(), max(start_s, self._free_s)
        start_unsure_s = self._unsure_s if busy_s > start_s else 0.0
        self._unsure_s = end_s - max(busy_s, self._looked_s) if is_late else 0.0
        self._free_s = self._looked_s = end_s
        unsure_s = start_unsure_s + self._unsure_s
        self._record.busy(op.index, busy_s, end_s, others=op.others, unsure_s=unsure_s)
