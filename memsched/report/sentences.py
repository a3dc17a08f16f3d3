"""What a plan does in a few sentences: what fits, what moves, how fast, and what sets the pace."""

from memsched.machine import DEVICE
from memsched.report.chapter import Chapter
from memsched.report.text import seconds_text

_UNITS = ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB"))
# A lane that is busy for so much of the time sets the pace.
_BUSY = 0.95


def sentences(chapter: Chapter) -> list[str]:
    """Each is true of the plan by its own numbers."""
    return [*_stays(chapter), *_moves(chapter), *_pace(chapter), *_others(chapter)]


def _stays(chapter: Chapter) -> list[str]:
    summary = chapter.summary
    wanted = {name for step in chapter.program.steps for name in step.reads}
    weights = [use for use in summary.arrays if use.kind == "weight" and use.name in wanted]
    total = sum(use.nbytes for use in weights)
    pinned = [use for use in weights if use.role == "pinned"]
    kept = sum(use.nbytes for use in pinned)
    if not total:
        return ["No weight is read."]
    if kept == total:
        return [f"All weights that are read stay on the {DEVICE}: {_size(kept)}."]
    return [
        f"{_size(kept)} of the {_size(total)} of weights that are read stay on the "
        f"{DEVICE}: {len(pinned):,} of {len(weights):,} arrays."
    ]


def _moves(chapter: Chapter) -> list[str]:
    moved = {link: nbytes for link, nbytes in chapter.summary.link_bytes.items() if nbytes}
    when = "in every pass" if chapter.summary.repeated else "in all"
    if not moved:
        return ["Nothing moves between tiers."]
    ways = ", ".join(f"{_size(nbytes)} over {link}" for link, nbytes in moved.items())
    return [f"What moves {when}: {ways}."]


def _pace(chapter: Chapter) -> list[str]:
    summary = chapter.summary
    if not summary.seconds:
        return []
    lane, use = max(summary.lanes.items(), key=lambda item: item[1].busy_s)
    share = use.busy_s / summary.seconds
    takes = f"{lane} is busy for {seconds_text(use.busy_s)} of {seconds_text(summary.seconds)}"
    if share >= _BUSY:
        return [f"{takes}, {share:.0%}: it sets the pace."]
    return [f"{takes}, {share:.0%}, more than any other; the rest is waiting for one another."]


def _others(chapter: Chapter) -> list[str]:
    summary = chapter.summary
    known = {name: s for name, s in summary.baselines.items() if s is not None}
    if not known or not summary.seconds:
        return []
    name = min(known, key=lambda one: known[one])
    if summary.is_no_faster_than(name):
        return [f"Nothing faster than the plain way {name!r} was found."]
    return [
        f"The best plain way, {name!r}, would take "
        f"{known[name] / summary.seconds:.2f} times as long."
    ]


def _size(nbytes: int) -> str:
    """Short: tables have every byte."""
    for power, unit in _UNITS:
        if nbytes >= 1024**power:
            return f"{nbytes / 1024**power:,.2f} {unit}"
    return f"{nbytes:,} B"
