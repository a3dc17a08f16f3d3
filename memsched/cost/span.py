"""When an action was busy. A prediction and a measurement are of this one type."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Action `index` of a plan was busy from `start_s` to `end_s`, in seconds of the plan."""

    index: int
    start_s: float
    end_s: float
