"""Python's collector of cycles, left alone while many values are made that form none."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """While this lasts no cycles are looked for; also a decorator.

    A plan of 100,000 actions is made of millions of small values that all live on. To look through
    them again and again takes a third of the time of planning, and finds nothing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
