"""When an action was busy. A prediction and a measurement are of this one type."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Action `index` of a plan was busy from `start_s` to `end_s`, in seconds of the plan.

    `unsure_s` is how much less or more than that it may have been: nobody looked when it ended.
    """

    index: int
    start_s: float
    end_s: float
    unsure_s: float = 0.0
