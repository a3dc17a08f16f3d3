"""Runs that are dispatched and may not have ended.

A dispatch returns at once and the step runs behind it, so the next one is prepared meanwhile. At
most two are under way, the second waiting for the first: never two working sets at a time.
"""

import collections
import time

import jax

from memsched.runtime.operations import RunOp
from memsched.runtime.record import Record, blame

# A result is ready when the whole dispatch that made it has ended, and so read all its inputs.
_UnderWay = tuple[RunOp, jax.Array, float]

# XLA:CPU says that a step has ended before it gives its workspace back: 0.5 ms before, where the
# thread that would do it has to wait for a core. Steps with large workspaces take 5 ms and more.
SETTLING_S = 3e-4


class Flight:
    """The dispatches of one run of a plan, in order."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._runs: collections.deque[_UnderWay] = collections.deque()
        self._free_s = record.start_s

    def make_room(self, op: RunOp) -> None:
        """Wait until `op` may be dispatched."""
        self.end(op.number - 2 if op.follows else op.number - 1)
        if op.settles:
            time.sleep(SETTLING_S)

    def began(self, op: RunOp, results: tuple[jax.Array, ...], start_s: float) -> None:
        """`op` was dispatched."""
        self._runs.append((op, results[op.witness], start_s))

    def end(self, number: int) -> None:
        """Wait until all dispatches up to `number` have ended.

        Raises:
            Exception: what the step raised, with a note of the action.
        """
        while self._runs and self._runs[0][0].number <= number:
            op, witness, start_s = self._runs[0]
            try:
                witness.block_until_ready()
            except Exception as error:
                blame(error, op.index, op.action)
                raise
            self._runs.popleft()
            end_s = time.perf_counter()
            self._record.busy(op.index, max(start_s, self._free_s), end_s, op.others)
            self._free_s = end_s

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
