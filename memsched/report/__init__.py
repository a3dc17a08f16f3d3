"""What a plan does, before it does it, and how that compares with what it did."""

from memsched.report.bound import Bound, Prices, lower_bound
from memsched.report.comparison import (
    Line,
    Measured,
    busy_seconds,
    comparison,
    comparison_text,
)
from memsched.report.data import to_dict
from memsched.report.occupancy import Occupancy, occupancy
from memsched.report.summary import ArrayUse, LaneUse, Summary, summarize
from memsched.report.text import to_text

__all__ = [
    "ArrayUse",
    "Bound",
    "LaneUse",
    "Line",
    "Measured",
    "Occupancy",
    "Prices",
    "Summary",
    "busy_seconds",
    "comparison",
    "comparison_text",
    "lower_bound",
    "occupancy",
    "summarize",
    "to_dict",
    "to_text",
]
