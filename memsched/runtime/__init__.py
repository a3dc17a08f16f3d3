"""Carries out plans: one loop over three verbs, Copies in the background."""

from memsched.runtime.executor import Executor, Outcome
from memsched.runtime.once import execute

__all__ = ["Executor", "Outcome", "execute"]
