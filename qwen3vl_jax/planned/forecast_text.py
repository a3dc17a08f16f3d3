"""A forecast to read: what fits, what moves, how fast, and why, in at most 100 columns."""

from collections.abc import Sequence

from memsched.cost.learned import describe
from memsched.report.rendering import Group, RenderableType, columns, line, plain
from memsched.report.text import bound_text, number_text, seconds_text, view
from memsched.sizes import LARGEST_BYTES
from qwen3vl_jax.planned.forecast import Forecast
from qwen3vl_jax.planned.forecast_data import (
    BESIDE_THE_PLAN,
    PARTS,
    first_token_seconds,
    is_compiled,
    rate_gains,
    request_text,
    tokens_of,
    tokens_per_s,
    workspace_source,
    workspaces,
)

# What `what_if` has more of, in words.
MORE = {
    "device": "1 GB more device memory",
    "host": "1 GB more host memory",
    "disk": "a disk twice as fast",
    "bus": "a bus twice as fast",
    "compute": "a processor twice as fast",
}
# A smaller part of the tokens/s that there are is no gain.
WORTH_SAYING = 0.005
# Steps with less workspace are only counted.
SHOWN_BYTES = 1 << 20


def forecast_text(found: Forecast) -> str:
    """A forecast without colours: the request as a whole, then every plan."""
    return plain(forecast_view(found))


def forecast_view(found: Forecast) -> RenderableType:
    """The same, for a terminal."""
    tokens = {one.work.name: tokens_of(one) for one in found.passes}
    each = {name: count for name, count in tokens.items() if count}
    return Group(*_headline(found), line(""), view(found.summaries, each))


def _headline(found: Forecast) -> list[RenderableType]:
    return [
        line(f"{found.config.model_type}, {found.dtype}, on {found.machine.name}", "bold"),
        line(f"  {request_text(found)}"),
        line(f"  {found.request.form_text}"),
        *_other_form(found),
        line(
            f"  planned in {found.plan_seconds:.2f} s ({found.plan_cpu_seconds:.2f} s of CPU); "
            f"the whole request takes {seconds_text(found.seconds)}"
        ),
        line(f"  times: {describe(found.cost)}"),
        line(""),
        *_speed(found),
        line(""),
        _room(found),
        line(f"  main memory beside it: {BESIDE_THE_PLAN}"),
        line(""),
        _parts(found),
        line(""),
        *_workspaces(found),
    ]


def _other_form(found: Forecast) -> Sequence[RenderableType]:
    """That blocks would be faster, if they would be."""
    seconds = found.in_blocks_s
    if seconds is None:
        return ()
    way = "in blocks it would take", "with --kv-blocks faster, and be rounded in another way"
    return (line(f"  {way[0]} {seconds_text(seconds)} {way[1]}"),)


def _speed(found: Forecast) -> Sequence[RenderableType]:
    """How fast, why not faster, and what would help."""
    decode = found.summaries["decode"]
    known = {name: seconds for name, seconds in decode.baselines.items() if seconds is not None}
    lines = [
        line(f"  {number_text(tokens_per_s(found))} tokens/s", "bold green"),
        line(f"  the first token after {seconds_text(first_token_seconds(found))}"),
        line(f"  a token: {bound_text(decode)}"),
    ]
    if known:
        name = min(known, key=lambda way: known[way])
        times = known[name] / decode.seconds
        text = f"the best plain way, {name}, takes {times:.2f} times this plan"
        if decode.is_no_faster_than(name):
            text = f"nothing faster than the plain way, {name}, was found"
        lines.append(line(f"  {text}"))
    lines += [
        line(f"  {MORE[name]}: +{number_text(gain)} tokens/s")
        for name, gain in rate_gains(found).items()
        if gain >= WORTH_SAYING * tokens_per_s(found)
    ]
    return lines


def _room(found: Forecast) -> RenderableType:
    """What fits: the peak of all passes in each tier, and the least that would do."""
    rows = []
    for tier in found.machine.tiers:
        peak = max(one.summary.occupancy[tier.name].peak_bytes for one in found.passes)
        limited = tier.capacity_bytes < LARGEST_BYTES
        has = f"{tier.capacity_bytes:,}" if limited else "no limit"
        rows.append((tier.name, f"{peak:,}", has, f"{found.smallest_bytes[tier.name]:,}"))
    return columns(("<fits", ">peak B", ">of B", ">the least that would do, B"), rows)


def _workspaces(found: Forecast) -> Sequence[RenderableType]:
    """Where they come from; if from XLA, its figures beside ours."""
    source = workspace_source(found.machine, compiled=is_compiled(found))
    rows = workspaces(found)
    shown = [
        (
            f"{row['pass']}: {row['step']}",
            f"{row['estimated_bytes']:,}",
            f"{row['compiled_bytes']:,}",
            "" if row["ratio"] is None else f"{row['ratio']:,.2f}",
        )
        for row in rows
        if max(row["estimated_bytes"], row["compiled_bytes"]) >= SHOWN_BYTES
    ]
    lines: list[RenderableType] = [line(f"  workspace of steps: {source}")]
    if shown:
        heads = ("<workspace of a step", ">our estimate, B", ">XLA's, B", ">ratio")
        lines.append(columns(heads, shown))
    if few := len(rows) - len(shown):
        lines.append(line(f"  {few} more kinds of steps take less than {SHOWN_BYTES:,} B"))
    return lines


def _parts(found: Forecast) -> RenderableType:
    rows = []
    for part in PARTS:
        passes = found.of_part(part)
        if passes:
            took_s = sum(one.work.count * one.summary.seconds for one in passes)
            bound_s = sum(one.work.count * one.summary.bound.seconds for one in passes)
            count = f"{sum(one.work.count for one in passes):,}"
            times = (took_s, bound_s, sum(one.moving_s for one in passes))
            rows.append((part, count, *(seconds_text(seconds) for seconds in times)))
    heads = ("<phase", ">passes", ">seconds", ">bound", ">weights moved before")
    return columns(heads, rows)
