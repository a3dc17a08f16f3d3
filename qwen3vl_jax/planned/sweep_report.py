"""A sweep to read and to look at: text, data, a page with a plot, a picture."""

import dataclasses
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memsched.report.line_plot import Curve, plot_svg
from memsched.report.rendering import Group, RenderableType, columns, line, plain
from memsched.report.text import number_text, seconds_text
from memsched.whole_file import write_whole
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.planned.knees import Knee, knees, value_text
from qwen3vl_jax.planned.sweep import Point, Sweep, points_dict

FORMATS = (".json", ".txt", ".html", ".png")

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
body {{ max-width: 60rem; margin: 1rem auto; padding: 0 1rem; }}
h1, p, li {{ overflow-wrap: anywhere; }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr));
  gap: 1rem; }}
svg {{ width: 100%; max-width: 36rem; height: auto; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th, td {{ padding: .2rem .8rem; text-align: right; white-space: nowrap; }}
th:last-child, td:last-child {{ text-align: left; }}
</style></head><body>
<h1>{title}</h1>
<p>times: {basis}</p>
<ul>{knees}</ul>
<div class="plots">{plots}</div>
<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>
</body></html>
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Swept:
    """A sweep that was carried out. `basis` says what its times rest on."""

    title: str
    basis: str
    sweep: Sweep
    points: tuple[Point, ...]

    @property
    def knees(self) -> tuple[Knee, ...]:
        """Where it pays to change the value, and where no longer."""
        return knees(self.sweep, self.points)


def sweep_dict(swept: Swept) -> dict[str, Any]:
    """As data, for JSON."""
    return {
        "title": swept.title,
        "cost_model": swept.basis,
        "axis": swept.sweep.axis,
        "unit": swept.sweep.unit,
        "points": points_dict(swept.sweep, swept.points),
        "knees": [{"value": knee.value, "what": knee.what} for knee in swept.knees],
    }


def sweep_view(swept: Swept) -> RenderableType:
    """To read, for a terminal."""
    found = [line(f"  {knee.what}") for knee in swept.knees]
    gap = [line("")] if found else []
    heading = line(swept.title, "bold"), line(f"times: {swept.basis}"), line("")
    return Group(*heading, *found, *gap, _table(swept.sweep, swept.points))


def write_sweep(path: Path, swept: Swept) -> None:
    """Text, data, page or picture, as the file's name says.

    Raises:
        UsageError: a picture, without the package that draws it.
    """
    match path.suffix:
        case ".json":
            write_whole(path, json.dumps(sweep_dict(swept), indent=1) + "\n")
        case ".html":
            write_whole(path, _page(swept))
        case ".png":
            write_whole(path, _png(swept))
        case _:
            write_whole(path, plain(sweep_view(swept)))


def _heads(sweep: Sweep) -> tuple[str, ...]:
    return (sweep.axis, "tokens/s", "first token", "read per token", "limited by")


def _rows(sweep: Sweep, points: Sequence[Point]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for point in points:
        where = value_text(sweep, point.value)
        if point.tokens_per_s is None or point.first_token_s is None:
            rows.append((where, "-", "-", "-", point.refused.partition(";")[0]))
            continue
        first = seconds_text(point.first_token_s)
        rate, read = number_text(point.tokens_per_s), f"{point.read_bytes:,} B"
        rows.append((where, rate, first, read, point.limited_by))
    return rows


def _table(sweep: Sweep, points: Sequence[Point]) -> RenderableType:
    first, *others, last = _heads(sweep)
    heads = (f"<{first}", *(f">{head}" for head in others), f"<{last}")
    return columns(heads, _rows(sweep, points))


def _curves(points: Sequence[Point]) -> tuple[Curve, Curve]:
    fitting = [point for point in points if point.fits]
    values = tuple(float(point.value) for point in fitting)
    return (
        Curve("tokens/s", values, tuple(point.tokens_per_s or 0.0 for point in fitting)),
        Curve("first token, s", values, tuple(point.first_token_s or 0.0 for point in fitting)),
    )


def _page(swept: Swept) -> str:
    sweep, points, found = swept.sweep, swept.points, swept.knees
    marks = tuple(float(knee.value) for knee in found)
    curves = [curve for curve in _curves(points) if curve.x]
    return _PAGE.format(
        title=html.escape(swept.title),
        basis=html.escape(swept.basis),
        knees="".join(f"<li>{html.escape(knee.what)}</li>" for knee in found),
        plots="".join(plot_svg(one, marks, lambda v: value_text(sweep, v)) for one in curves),
        heads="".join(f"<th>{html.escape(head)}</th>" for head in _heads(sweep)),
        rows="".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n"
            for row in _rows(sweep, points)
        ),
    )


def check_png() -> None:
    """Raises UsageError if there is nothing that could draw a picture."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "--report x.png needs matplotlib; pip install 'qwen3vl-jax[plot]', or name x.html"
        ) from None


def _png(swept: Swept) -> bytes:
    check_png()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), layout="constrained")
    sweep = swept.sweep
    for axes, curve in zip(figure.subplots(2, 1, sharex=True), _curves(swept.points), strict=True):
        axes.plot(curve.x, curve.y, marker="o")
        axes.set_xscale("log")
        axes.set_ylabel(curve.name)
        axes.grid(visible=True, alpha=0.3)
        for knee in swept.knees:
            axes.axvline(knee.value, linestyle=":", color="gray")
        axes.xaxis.set_major_formatter(lambda value, _: value_text(sweep, value))
        axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xlabel(sweep.axis)
    figure.suptitle(f"{swept.title}\n{swept.basis}")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
