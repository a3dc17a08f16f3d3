"""How long actions take, and what that makes of a plan."""

from memsched.cost.reading import lane_of
from memsched.cost.remembered import Remembered
from memsched.cost.roofline import CostModel, Roofline
from memsched.cost.simulate import is_steady, plan_seconds, simulate, simulate_rounds
from memsched.cost.span import Span

__all__ = [
    "CostModel",
    "Remembered",
    "Roofline",
    "Span",
    "is_steady",
    "lane_of",
    "plan_seconds",
    "simulate",
    "simulate_rounds",
]
