"""The parent's side of a measured process: it is started, ordered about, and ended."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from qwen3vl_jax.benchmark.capped_group import MemoryGroup

COMMAND = (sys.executable, "-m", "qwen3vl_jax.benchmark.capped_child")
# Main memory is what is limited: an accelerator's own would hide what a model takes.
PLATFORM = {"JAX_PLATFORMS": "cpu"}
END_S = 30.0


class ChildError(Exception):
    """The process refused an order, or is gone."""


class Child:
    """A process of `capped_child`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def order(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Its answer.

        Raises:
            ChildError: the order failed, or the process was killed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            why = "killed, which is what the kernel does when memory is out" if code < 0 else ""
            raise ChildError(f"order {do!r}: the process ended with {code} {why}".rstrip())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ChildError(f"order {do!r}: {answer['error']}")
        return answer


@contextlib.contextmanager
def child(group: MemoryGroup | None) -> Iterator[Child]:
    """A process that waits for orders, inside a group if there is one."""
    command = list(COMMAND) if group is None else group.inside(COMMAND)
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **PLATFORM},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield Child(process)
        process.stdin.close()
        process.wait(END_S)
    finally:
        process.kill()
        process.wait()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
