"""A dry run with the batch that gives the most tokens/s."""

import dataclasses
from collections.abc import Callable

from qwen3vl_jax.checkpoints.encodings import NOTHING_ENCODED, Encodings
from qwen3vl_jax.config import Config
from qwen3vl_jax.planned.batches import batches_dict, best_rows, choose_batch
from qwen3vl_jax.planned.dry_run import DryRun, dry_run
from qwen3vl_jax.planned.loading import Budgets
from qwen3vl_jax.planned.request import Request
from qwen3vl_jax.planned.sweep import Point, figures, refused


def dry_run_best_batch(
    config: Config,
    request: Request,
    budgets: Budgets,
    *,
    dtype: str | None,
    encodings: Encodings = NOTHING_ENCODED,
    say: Callable[[str], None] = lambda _: None,
) -> DryRun:
    """`dry_run` with the batch that gives the most tokens/s, whatever the request's own.

    Args:
        encodings: of weights that rest encoded.
        say: gets a line before every batch that is planned.

    Raises:
        UsageError: a request or a budget that makes no sense.
    """
    request.capacity(config)
    points: dict[int, Point] = {}
    kept: dict[int, DryRun] = {}

    def plan(rows: int) -> Point:
        say(f"planning batch {rows:,}")
        asked = dataclasses.replace(request, batch=rows)
        kept[rows] = dry_run(config, asked, budgets, dtype=dtype, encodings=encodings)
        points[rows] = _point(rows, kept[rows])
        # Traces and plans of the others are large.
        for other in kept.keys() - {best_rows(points)}:
            del kept[other]
        return points[rows]

    batches = choose_batch(plan)
    (run,) = kept.values()
    if batches is None:
        return run
    data = run.data | {"batches": batches_dict(batches)}
    return dataclasses.replace(run, data=data, batches=batches)


def _point(rows: int, run: DryRun) -> Point:
    if run.found is not None:
        return figures(rows, run.found)
    assert run.error is not None
    return refused(rows, run.error)
