"""Predicted against measured, line by line."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from memsched.cost import Span, lane_of
from memsched.machine import NVME
from memsched.plan import Copy, Plan, Run
from memsched.report.summary import Summary


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """What one or several passes of a plan did. Times and bytes are of all `passes` together.

    `busy_s` goes by lane. Peaks are in bytes by tier; read and written bytes are the disk's.
    """

    passes: int
    seconds: float
    busy_s: Mapping[str, float]
    peak_bytes: Mapping[str, int]
    read_bytes: int
    written_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """One quantity of one pass, as predicted and as measured."""

    what: str
    unit: str
    predicted: float
    measured: float


def busy_seconds(plan: Plan, spans: Iterable[Span]) -> dict[str, float]:
    """Seconds in which each lane was busy. Spans of one lane that overlap are counted once."""
    lanes: dict[str, list[Span]] = {}
    for span in spans:
        action = plan.actions[span.index]
        if isinstance(action, Copy | Run):
            lanes.setdefault(lane_of(action), []).append(span)
    return {lane: _union_s(found) for lane, found in lanes.items()}


def comparison(summary: Summary, measured: Measured) -> tuple[Line, ...]:
    """Time, busy time of each lane, bytes of the disk, and the peak of each tier."""
    disk = {f"{NVME}->": measured.read_bytes, f"->{NVME}": measured.written_bytes}
    names = {f"{NVME}->": "read from disk", f"->{NVME}": "written to disk"}
    lines = [Line("a pass", "s", summary.seconds, measured.seconds / measured.passes)]
    lines += [
        Line(f"{lane} busy", "s", use.busy_s, measured.busy_s[lane] / measured.passes)
        for lane, use in summary.lanes.items()
        if lane in measured.busy_s
    ]
    for arrow, nbytes in disk.items():
        predicted = sum(count for lane, count in summary.link_bytes.items() if arrow in lane)
        lines.append(Line(names[arrow], "B", float(predicted), nbytes / measured.passes))
    lines += [
        Line(f"{name} peak", "B", float(tier.peak_bytes), float(measured.peak_bytes[name]))
        for name, tier in summary.occupancy.items()
        if name in measured.peak_bytes
    ]
    return tuple(lines)


def comparison_text(lines: Sequence[Line]) -> str:
    """A table with a column for the measured over the predicted."""
    rows = [f"{'':<24}{'predicted':>22}{'measured':>22}{'ratio':>10}"]
    for line in lines:
        digits = ",.0f" if line.unit == "B" else ",.4f"
        columns = [f"{value:{digits}} {line.unit}" for value in (line.predicted, line.measured)]
        ratio = f"{line.measured / line.predicted:.3f}" if line.predicted else "-"
        rows.append(f"{line.what:<24}{columns[0]:>22}{columns[1]:>22}{ratio:>10}")
    return "\n".join(rows) + "\n"


def _union_s(spans: list[Span]) -> float:
    total, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: (span.start_s, span.end_s)):
        total += max(0.0, span.end_s - max(span.start_s, reached))
        reached = max(reached, span.end_s)
    return total
