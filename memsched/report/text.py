"""A report to read: plain text of at most 100 columns."""

from collections.abc import Iterable, Mapping

from memsched.report.occupancy import Occupancy
from memsched.report.summary import ArrayUse, Role, Summary
from memsched.sizes import LARGEST_BYTES, format_size

WIDTH = 100
# Longer lists are cut, and what is cut is counted.
LISTED = 5
LISTS: tuple[tuple[Role, str], ...] = (
    ("pinned", "stay on the device"),
    ("streamed", "streamed"),
    ("spilled", "spilled"),
    ("unread", "never read"),
)


def to_text(phases: Mapping[str, Summary], tokens: Mapping[str, int] | None = None) -> str:
    """All phases, one after another.

    `tokens` says how many tokens a pass of a phase is for: then times and bytes are also given
    for one token.
    """
    known = tokens or {}
    blocks = [_phase(name, summary, known.get(name)) for name, summary in phases.items()]
    return "\n\n".join("\n".join(_cut(line) for line in block) for block in blocks) + "\n"


def _phase(name: str, summary: Summary, tokens: int | None) -> list[str]:
    again = summary.runs - summary.steps
    lines = [
        f"{name}: {summary.steps:,} steps, {summary.actions:,} actions"
        + (f", {again:,} steps run again" if again else ""),
        _time(summary, tokens),
        *_bound(summary),
        "",
        *_tiers(summary.occupancy.values()),
        "",
        *_lanes(summary, tokens),
    ]
    lists = [line for role, title in LISTS for line in _list(title, summary.of_role(role))]
    lines += ["", *lists] if lists else []
    lines += ["", *_baselines(summary)] if summary.baselines else []
    return lines


def _time(summary: Summary, tokens: int | None) -> str:
    what = "a pass" if summary.repeated else "the plan"
    line = f"  {what} takes {seconds_text(summary.seconds)}"
    if tokens and summary.seconds:
        line += f", {tokens:,} tokens of it: {tokens / summary.seconds:,.3g} tokens/s"
    return line


def _bound(summary: Summary) -> list[str]:
    line = f"  no schedule beats {seconds_text(summary.bound.seconds)} ({summary.bound.lane})"
    if summary.gap is not None:
        line += f": this one takes {summary.gap:.3f} times that"
    worth = [
        f"  1 GB more {tier} memory saves {seconds_text(price)} of it"
        for tier, price in summary.prices_s_per_gb.items()
        if price > 0
    ]
    return [line, *worth]


def _tiers(found: Iterable[Occupancy]) -> list[str]:
    lines = [f"  {'tier':<8}{'peak B':>20}{'of B':>20}  made up of"]
    for tier in found:
        capacity = f"{tier.capacity_bytes:,}" if tier.capacity_bytes < LARGEST_BYTES else "no limit"
        parts = sorted(tier.parts.items(), key=lambda part: (-part[1], part[0]))
        rows = [f"{nbytes:>18,} {part}" for part, nbytes in parts] or [f"{0:>18} nothing"]
        lines.append(f"  {tier.tier:<8}{tier.peak_bytes:>20,}{capacity:>20}  {rows[0]}")
        lines += [" " * 52 + row for row in rows[1:]]
    return lines


def _lanes(summary: Summary, tokens: int | None) -> list[str]:
    lines = [f"  {'lane':<14}{'actions':>9}{'bytes':>20}{'busy':>12}{'of the time':>13}"]
    if tokens:
        lines[0] += f"{'bytes per token':>20}"
    for lane, use in summary.lanes.items():
        share = f"{use.busy_s / summary.seconds:.0%}" if summary.seconds else "-"
        line = f"  {lane:<14}{use.actions:>9,}{use.nbytes:>20,}{seconds_text(use.busy_s):>12}"
        line += f"{share:>13}"
        lines.append(line + (f"{use.nbytes / tokens:>20,.0f}" if tokens else ""))
    return lines


def _list(title: str, uses: tuple[ArrayUse, ...]) -> list[str]:
    """One list per tier, largest arrays first."""
    lines = []
    for tier in sorted({use.tier for use in uses}):
        here = [use for use in uses if use.tier == tier]
        verb = {"streamed": "streamed from", "spilled": "spilled to"}.get(title)
        heading = f"{verb} {tier}" if verb else title
        total = format_size(sum(use.nbytes for use in here))
        lines.append(f"  {heading}: {len(here):,} arrays, {total}")
        lines += [f"    {use.nbytes:>18,} B  {use.name}" for use in here[:LISTED]]
        if rest := here[LISTED:]:
            lines.append(f"    {sum(use.nbytes for use in rest):>18,} B  in {len(rest):,} others")
    return lines


def _baselines(summary: Summary) -> list[str]:
    lines = ["  other ways, predicted:"]
    for name, seconds in summary.baselines.items():
        if seconds is None:
            lines.append(f"    {name:<34} does not fit")
            continue
        times = f", {seconds / summary.seconds:.2f} times this plan" if summary.seconds else ""
        lines.append(f"    {name:<34} {seconds_text(seconds):>10}{times}")
    return lines


def seconds_text(seconds: float) -> str:
    """Seconds with a unit that keeps three digits readable."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(seconds) >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 else f"{seconds:,.0f} s"
    return f"{seconds * 1e9:.3g} ns" if seconds else "0 s"


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."
