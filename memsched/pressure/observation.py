"""What one look at the system's memory tells."""

import dataclasses

MARGIN_PART = 16
MOST_MARGIN_BYTES = 512 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Observation:
    """Main memory at one moment.

    Attributes:
        time_s: when, on a clock that never goes back.
        spare_bytes: what can be taken before the tightest limit is as near as its margin. Below 0:
            what has to be given back.
        limit: which limit that is.
        stalled_percent: how much of the last ten seconds some task waited for memory ("some avg10"
            of pressure stall information); None where the kernel does not say.
        alarms: how often the kernel was out of memory in the process's groups so far.
    """

    time_s: float
    spare_bytes: int
    limit: str
    stalled_percent: float | None
    alarms: int


def margin_bytes(limit_bytes: int) -> int:
    """What stays free below a limit: others come and go, and page tables are not planned."""
    return min(limit_bytes // MARGIN_PART, MOST_MARGIN_BYTES)
