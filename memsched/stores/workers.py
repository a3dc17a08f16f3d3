"""Threads that carry out jobs first in, first out, and never die of one."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from memsched.errors import StoreError

Job = Callable[[], None]


class Workers:
    """At most `threads` threads, each started when first needed."""

    def __init__(self, threads: int, name: str) -> None:
        self._name = name
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"memsched-{name}")
        self._closed = False

    def submit(self, jobs: Sequence[Job]) -> Future[None]:
        """Start jobs in this order.

        Returns:
            Done when the last of them has ended; with the first exception, if there was one. After
            one, jobs that have not begun are left out.

        Raises:
            StoreError: if the workers are closed, or no thread can be had.
        """
        if self._closed:
            raise StoreError(f"the {self._name} store is closed; open a new one")
        whole = _Whole(len(jobs))
        try:
            for job in jobs:
                self._pool.submit(self._carry_out, job, whole)
        except RuntimeError as error:
            raise StoreError(f"the {self._name} store cannot work: {error}") from None
        return whole.future

    def close(self) -> None:
        """Leave out what has not begun, wait for the rest, end the threads."""
        self._closed = True
        self._pool.shutdown(wait=True)

    def _carry_out(self, job: Job, whole: "_Whole") -> None:
        error: BaseException | None = None
        try:
            if self._closed:
                raise StoreError(f"the {self._name} store was closed before its work was done")
            if not whole.failed:
                job()
        except BaseException as raised:
            # Whatever it is belongs to whoever waits for the result, not to this thread.
            error = raised
        whole.end_one(error)


class _Whole:
    """Several jobs as one future."""

    def __init__(self, jobs: int) -> None:
        self.future: Future[None] = Future()
        # From here on it cannot be cancelled: threads may be writing into the caller's memory.
        self.future.set_running_or_notify_cancel()
        self._left = jobs
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        if not jobs:
            self.future.set_result(None)

    @property
    def failed(self) -> bool:
        return self._error is not None

    def end_one(self, error: BaseException | None) -> None:
        with self._lock:
            self._error = self._error or error
            self._left -= 1
            last = not self._left
        if not last:
            return
        if self._error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(self._error)
