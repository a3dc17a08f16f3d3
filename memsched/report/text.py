"""A report to read, of at most 100 columns: what fits, what moves, how fast, and why."""

from collections.abc import Iterable, Mapping

from rich.text import Text

from memsched.report.occupancy import IDLE, WORKSPACE, Occupancy
from memsched.report.reasons import Role, of_many
from memsched.report.rendering import Group, RenderableType, columns, line, plain
from memsched.report.summary import ArrayUse, Summary
from memsched.sizes import LARGEST_BYTES, format_size

# Longer lists are cut, and what is cut is counted.
LISTED = 5
LISTS: tuple[tuple[Role, str], ...] = (
    ("pinned", "stay on the device"),
    ("streamed", "streamed from"),
    ("spilled", "spilled to"),
    ("unread", "never read"),
)
BAR_CELLS = 16
# What a bar shows of a tier: a letter and a colour for each kind.
KINDS = {
    "weight": ("w", "white on blue"),
    "cache": ("c", "white on magenta"),
    "feature": ("f", "black on cyan"),
    "embedding": ("e", "black on bright_blue"),
    "input": ("i", "black on green"),
    "activation": ("a", "black on yellow"),
    WORKSPACE: ("k", "white on red"),
    IDLE: ("-", "dim"),
}
FREE = "."


def to_text(phases: Mapping[str, Summary], tokens: Mapping[str, int] | None = None) -> str:
    """All phases, one after another, without colours.

    `tokens` says how many tokens a pass of a phase is for: then times and bytes are also given
    for one token.
    """
    return plain(view(phases, tokens))


def view(phases: Mapping[str, Summary], tokens: Mapping[str, int] | None = None) -> RenderableType:
    """The same, for a terminal."""
    known = tokens or {}
    blocks: list[RenderableType] = []
    for name, summary in phases.items():
        blocks += [line(""), *_phase(name, summary, known.get(name))]
    return Group(*blocks[1:])


def _phase(name: str, summary: Summary, tokens: int | None) -> list[RenderableType]:
    again = summary.runs - summary.steps
    title = f"{name}: {summary.steps:,} steps, {summary.actions:,} actions"
    lists = [row for role, start in LISTS for row in _list(role, start, summary.of_role(role))]
    blocks = [
        line(title + (f", {again:,} steps run again" if again else ""), "bold"),
        *_time(summary, tokens),
        line(""),
        _tiers(summary.occupancy.values()),
        line(""),
        _lanes(summary, tokens),
    ]
    blocks += [line(""), *lists] if lists else []
    blocks += [line(""), *ways(summary)] if summary.baselines else []
    return blocks


def _time(summary: Summary, tokens: int | None) -> list[RenderableType]:
    what = "a pass" if summary.repeated else "the plan"
    took = f"  {what} takes {seconds_text(summary.seconds)}"
    if tokens and summary.seconds:
        many = "1 token" if tokens == 1 else f"{tokens:,} tokens"
        took += f", {many} of it: {number_text(tokens / summary.seconds)} tokens/s"
    return [line(took), line("  " + bound_text(summary))]


def bound_text(summary: Summary) -> str:
    """What no schedule can beat, and how near the plan comes."""
    text = f"no schedule beats {seconds_text(summary.bound.seconds)} ({summary.bound.lane})"
    if summary.gap is None:
        return text
    aside = ", contention aside" if summary.contended else ""
    return f"{text}{aside}: this one takes {summary.gap:.1%} more"


def _tiers(found: Iterable[Occupancy]) -> RenderableType:
    rows: list[tuple[str | Text, ...]] = []
    for tier in found:
        limited = tier.capacity_bytes < LARGEST_BYTES
        capacity = f"{tier.capacity_bytes:,}" if limited else "no limit"
        parts = sorted(tier.parts.items(), key=lambda part: (-part[1], part[0]))
        digits = max((len(f"{nbytes:,}") for _, nbytes in parts), default=0)
        named = [f"{nbytes:>{digits},} {part}" for part, nbytes in parts] or ["0 nothing"]
        rows.append((tier.tier, f"{tier.peak_bytes:,}", capacity, _bar(tier, parts), named[0]))
        rows += [("", "", "", "", part) for part in named[1:]]
    heads = ("<tier", ">peak B", ">of B", "<", "<made up of, B")
    return columns(heads, rows, gap=2)


def _bar(tier: Occupancy, parts: list[tuple[str, int]]) -> Text:
    """What fills a tier: a letter for every 16th of it, rounded so that none is cheated by one."""
    whole = max(tier.capacity_bytes if tier.capacity_bytes < LARGEST_BYTES else 0, tier.peak_bytes)
    bar, done_bytes = Text("|"), 0
    for part, nbytes in parts:
        first, done_bytes = _cell(done_bytes, whole), done_bytes + nbytes
        letter, style = KINDS.get(part, ("?", ""))
        bar.append(letter * (_cell(done_bytes, whole) - first), style)
    return bar.append(FREE * (BAR_CELLS - _cell(done_bytes, whole)), "dim").append("|")


def _cell(nbytes: int, whole_bytes: int) -> int:
    return round(BAR_CELLS * nbytes / whole_bytes) if whole_bytes else 0


def _lanes(summary: Summary, tokens: int | None) -> RenderableType:
    rows = []
    for lane, use in summary.lanes.items():
        if not use.actions:
            continue
        share = f"{use.busy_s / summary.seconds:.0%}" if summary.seconds else "-"
        row = (lane, f"{use.actions:,}", f"{use.nbytes:,}", seconds_text(use.busy_s), share)
        rows.append((*row, f"{use.nbytes / tokens:,.0f}") if tokens else row)
    heads = ("<lane", ">actions", ">bytes", ">busy", ">of the time")
    return columns((*heads, ">bytes per token") if tokens else heads, rows)


def _list(role: Role, start: str, uses: tuple[ArrayUse, ...]) -> list[RenderableType]:
    """One list per tier and reason, largest arrays first; of what nobody reads the sum."""
    lines: list[str] = []
    for tier, reason in sorted({(use.tier, use.reason) for use in uses}):
        here = [use for use in uses if (use.tier, use.reason) == (tier, reason)]
        heading = f"{start} {tier}" if start.endswith((" from", " to")) else start
        total = format_size(sum(use.nbytes for use in here))
        lines.append(f"  {heading}: {len(here):,} arrays, {total}")
        if role == "unread":
            continue
        lines.append(f"    {of_many(reason)}")
        lines += [f"    {use.nbytes:>18,} B  {use.name}" for use in here[:LISTED]]
        if rest := here[LISTED:]:
            nbytes = sum(use.nbytes for use in rest)
            lines.append(f"    {nbytes:>18,} B  in {len(rest):,} others")
    return [line(text) for text in lines]


def ways(summary: Summary) -> list[RenderableType]:
    """What plainer ways would take, beside this plan."""
    rows = []
    for name, seconds in summary.baselines.items():
        if seconds is None:
            rows.append((name, "does not fit", ""))
            continue
        times = f"{seconds / summary.seconds:.2f} times this plan" if summary.seconds else ""
        rows.append((name, seconds_text(seconds), times))
    return [line("  other ways, predicted:"), columns(("<", ">", "<"), rows, indent=4)]


def seconds_text(seconds: float) -> str:
    """Seconds with a unit that keeps three digits readable."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(seconds) >= scale:
            return f"{number_text(seconds / scale)} {unit}"
    return f"{number_text(seconds * 1e9)} ns" if seconds else "0 s"


def number_text(number: float) -> str:
    """Three digits, or from a hundred on a whole number: nobody reads 1.2e+03."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"
