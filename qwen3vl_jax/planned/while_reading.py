"""Seconds of steps that run while weights are read, as planning should see them."""

from memsched.cost.contention import BesideCopies as WhileReading

__all__ = ["WhileReading"]
