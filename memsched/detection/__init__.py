"""The machine at hand: how much it has free, and how fast it is."""

from memsched.detection.this_machine import detect, with_limits

__all__ = ["detect", "with_limits"]
