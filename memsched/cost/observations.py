"""What was measured: features of actions with their seconds, and a file that collects them.

A pass of a plan gives one observation for all steps with equal features, and one for each row of
transfers that followed one another without a gap: a transfer by itself says little, because its
blocks are read while the one before it ends.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from memsched.cost.features import RunFeatures, copy_features, run_features
from memsched.cost.reading import from_disk, lane_of
from memsched.cost.span import Span
from memsched.machine import Machine
from memsched.plan import Copy, Plan, Run
from memsched.program import Program, Step

# So many durations of equal steps are kept of a pass: enough for its quantiles.
MOST_SECONDS = 8
# What is not known of the time of a step is at most this, or this part of it; others say nothing:
# of two steps of 2 ms the first seemed to take 4 ms, where the second had ended, too, when the
# thread that looks got a core.
UNSURE_S, UNSURE_PART = 1e-4, 0.1
# Transfers that begin within this of the end of the one before it follow it.
GAP_S = 2e-5


@dataclasses.dataclass(frozen=True, slots=True)
class RunObservation:
    """Steps with equal features in one pass of program `case`.

    `beside` is the part of their time that they were slowed by copies, of `run_beside`.
    """

    case: str
    features: RunFeatures
    beside: float
    seconds: tuple[float, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class CopyObservation:
    """Transfers that followed one another on a link, together: how many, and in how many requests.

    `beside` is the part of the time in which a step ran, to one digit.
    """

    case: str
    link: str
    copies: int
    blocks: int
    nbytes: int
    beside: float
    seconds: float


Observation = RunObservation | CopyObservation


def observe(
    plan: Plan,
    program: Program,
    machine: Machine,
    spans: Sequence[Span],
    *,
    carried_s: float = 0.0,
    case: str = "",
    most_seconds: int = MOST_SECONDS,
) -> tuple[Observation, ...]:
    """What one pass says. A pass of fused steps says nothing: nobody knows what each of them took.

    Args:
        carried_s: seconds at the beginning in which transfers of the pass before went on.
        case: what the observations belong together by; the program's digest by default.
        most_seconds: so many durations of equal steps.
    """
    case = case or program.digest
    runs = [span for span in spans if isinstance(plan.actions[span.index], Run)]
    copies = [span for span in spans if isinstance(plan.actions[span.index], Copy)]
    if any(span.end_s <= span.start_s for span in runs):
        return ()
    # What is under way when the last step ends has no end of its own.
    end_s = max((span.end_s for span in runs), default=0.0)
    copying, computing = union([Span(0, 0.0, carried_s), *copies]), union(runs)
    whole = [span for span in copies if span.end_s < end_s]
    return (
        *_runs(runs, copying, plan, program, case, most_seconds),
        *_copies(whole, computing, plan, program, machine, carried_s, case),
    )


def _runs(
    spans: Sequence[Span],
    copying: list[Span],
    plan: Plan,
    program: Program,
    case: str,
    most_seconds: int,
) -> Iterator[RunObservation]:
    found: dict[tuple[RunFeatures, float], list[float]] = {}
    known: dict[str, RunFeatures] = {}
    fetched = from_disk(plan.actions)
    for span in spans:
        action = plan.actions[span.index]
        assert isinstance(action, Run)
        taken_s = span.end_s - span.start_s
        if span.unsure_s > max(UNSURE_S, UNSURE_PART * taken_s):
            continue
        step = program.step(action.step)
        if step.name not in known:
            known[step.name] = run_features(step, program)
        key = known[step.name], run_beside(span, step, copying, fetched)
        found.setdefault(key, []).append(taken_s)
    for (features, part), seconds in found.items():
        yield RunObservation(case, features, part, _few(sorted(seconds), most_seconds))


def _copies(
    spans: Sequence[Span],
    computing: list[Span],
    plan: Plan,
    program: Program,
    machine: Machine,
    carried_s: float,
    case: str,
) -> Iterator[CopyObservation]:
    """Rows of transfers; not those that follow the pass before without a gap."""
    lanes: dict[str, list[tuple[Span, Copy]]] = {}
    for span in spans:
        action = plan.actions[span.index]
        assert isinstance(action, Copy)
        lanes.setdefault(lane_of(action), []).append((span, action))
    for link, found in lanes.items():
        for row in _rows(found):
            features = [copy_features(action, program, machine) for _, action in row]
            whole = Span(0, row[0][0].start_s, max(span.end_s for span, _ in row))
            if whole.end_s > whole.start_s and (whole.start_s > carried_s + GAP_S or not carried_s):
                yield CopyObservation(
                    case,
                    link,
                    len(row),
                    sum(one.blocks for one in features),
                    sum(one.nbytes for one in features),
                    beside(whole, computing),
                    whole.end_s - whole.start_s,
                )


def _rows(found: list[tuple[Span, Copy]]) -> Iterator[list[tuple[Span, Copy]]]:
    """Transfers of a link, cut where it had nothing to do.

    Cut anywhere else, what follows seems faster than it is: it was read at the same time. The end
    of a row is the latest one: small transfers overtake large ones.
    """
    row: list[tuple[Span, Copy]] = []
    end_s = 0.0
    for span, action in sorted(found, key=lambda one: (one[0].start_s, one[0].index)):
        if row and span.start_s > end_s + GAP_S:
            yield row
            row = []
        row.append((span, action))
        end_s = max(end_s, span.end_s)
    if row:
        yield row


def run_beside(span: Span, step: Step, copying: Sequence[Span], fetched: set[str]) -> float:
    """The part of a step's time that it is as slow as beside a transfer, to one digit.

    All of it where what it reads came from disk in this pass: such weights take 1.45 times as long
    to read as those that stayed where they were, with nothing copied meanwhile; beside transfers
    both take 1.5 times as long.

    Args:
        copying: of `union`.
        fetched: of `from_disk`.
    """
    return beside(span, copying) if fetched.isdisjoint(step.inputs) else 1.0


def _few(seconds: list[float], most: int) -> tuple[float, ...]:
    """Of sorted durations at most so many, at equal distances."""
    count = len(seconds)
    if count <= most:
        return tuple(seconds)
    return tuple(seconds[(2 * i + 1) * count // (2 * most)] for i in range(most))


def beside(span: Span, others: Sequence[Span]) -> float:
    """The part of a span that others overlap, to one digit. `others` are of `union`."""
    overlap = sum(
        max(0.0, min(span.end_s, other.end_s) - max(span.start_s, other.start_s))
        for other in others
        if other.end_s > span.start_s and other.start_s < span.end_s
    )
    return round(overlap / (span.end_s - span.start_s), 1)


def union(spans: Iterable[Span]) -> list[Span]:
    """The time that spans cover, as spans that do not meet."""
    merged: list[Span] = []
    for span in sorted(spans, key=lambda one: one.start_s):
        if merged and span.start_s <= merged[-1].end_s:
            end_s = max(merged[-1].end_s, span.end_s)
            merged[-1] = Span(0, merged[-1].start_s, end_s)
        else:
            merged.append(span)
    return merged
