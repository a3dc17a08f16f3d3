"""Training: a loss, a jitted step with optax, Orbax checkpoints, a loop that survives a kill.

The loop knows no model: it gets a loss of (parameters, batch) and the batch of every step.
As batches depend only on their number, a killed run that is started again ends with the same bits.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from qwen3vl_jax.errors import UsageError

IGNORED = -100
Parameters = dict[str, jax.Array]
Batch = Any
Loss = Callable[[Parameters, Batch], tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How to optimise. `rates` are corners (step, learning rate) with straight lines between them.

    `average_decay` is that of the average of all weights, which is the result.
    """

    steps: int
    rates: tuple[tuple[int, float], ...]
    weight_decay: float = 0.05
    beta_one: float = 0.9
    beta_two: float = 0.98
    clip_norm: float = 1.0
    average_decay: float = 0.998
    save_every_steps: int = 250
    log_every_steps: int = 25


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """One line of the metrics log: means since the last one. `seconds` is training time."""

    step: int
    seconds: float
    learning_rate: float
    metrics: dict[str, float]


State = dict[str, Any]  # step, parameters, average, optimizer


def cross_entropy(
    logits: Float[Array, "batch tokens vocab"], labels: Int[Array, "batch tokens"]
) -> Float[Array, ""]:
    """Mean negative log-likelihood of labelled tokens, in float32; position t predicts token t + 1.

    Labels equal to IGNORED do not count; without any label the loss is 0.

    Source: transformers 5.23, `ForCausalLMLoss`.
    """
    wanted = labels[:, 1:]
    counted = wanted != IGNORED
    log_odds = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(log_odds, jnp.where(counted, wanted, 0)[:, :, None], axis=-1)[
        :, :, 0
    ]
    total = jnp.where(counted, -chosen, jnp.float32(0)).sum()
    return total / jnp.maximum(counted.sum(), 1).astype(jnp.float32)


def token_accuracy(
    logits: Float[Array, "batch tokens vocab"], labels: Int[Array, "batch tokens"]
) -> Float[Array, ""]:
    """Share of the labelled tokens that get the highest score."""
    wanted = labels[:, 1:]
    counted = wanted != IGNORED
    right = (jnp.argmax(logits[:, :-1], axis=-1) == wanted) & counted
    return right.sum().astype(jnp.float32) / jnp.maximum(counted.sum(), 1).astype(jnp.float32)


def learning_rate(settings: Settings) -> Callable[[Any], jax.Array]:
    """The learning rate at each step."""
    steps, rates = (np.array(values, np.float32) for values in zip(*settings.rates, strict=True))

    def rate(step: Any) -> jax.Array:
        return jnp.interp(jnp.asarray(step, jnp.float32), steps, rates)

    return rate


def adamw(settings: Settings) -> optax.GradientTransformation:
    """AdamW with clipped gradients; only matrices decay."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            learning_rate(settings),
            b1=settings.beta_one,
            b2=settings.beta_two,
            weight_decay=settings.weight_decay,
            mask=lambda parameters: jax.tree.map(lambda array: array.ndim > 1, parameters),
        ),
    )


def new_state(parameters: Parameters, rule: optax.GradientTransformation) -> State:
    """The state before the first step, with copies of `parameters`: the step donates its state."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "parameters": jax.tree.map(jnp.copy, parameters),
        "average": jax.tree.map(jnp.copy, parameters),
        "optimizer": rule.init(parameters),
    }


def make_step(
    loss: Loss, rule: optax.GradientTransformation, *, average_decay: float
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """The jitted training step; the state is donated. Metrics are the loss's own, and `loss`."""

    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        gradient_of = jax.value_and_grad(loss, has_aux=True)
        (value, metrics), gradients = gradient_of(state["parameters"], batch)
        # optax multiplies its whole-number step count by floats, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, momenta = rule.update(gradients, state["optimizer"], state["parameters"])
        parameters = optax.apply_updates(state["parameters"], updates)
        # Early weights are forgotten faster than the decay says: (1 + step) / (10 + step).
        count = state["step"].astype(jnp.float32)
        decay = jnp.minimum(jnp.float32(average_decay), (1 + count) / (10 + count))
        average = jax.tree.map(
            lambda old, new: old + (1 - decay) * (new - old), state["average"], parameters
        )
        following = {
            "step": state["step"] + 1,
            "parameters": parameters,
            "average": average,
            "optimizer": momenta,
        }
        return following, {"loss": value, **metrics}

    return jax.jit(step, donate_argnums=0)


def train(
    loss: Loss,
    parameters: Parameters,
    batch_at: Callable[[int], Batch],
    settings: Settings,
    directory: Path,
    *,
    rule: optax.GradientTransformation | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Parameters:
    """Trains until `settings.steps`, from the newest checkpoint in `directory` if there is one.

    The last two checkpoints are in `directory/checkpoints`, metrics in `directory/metrics.jsonl`.

    Args:
        rule: the optimiser; `adamw(settings)` by default.

    Returns:
        The averaged weights.
    """
    import orbax.checkpoint as ocp

    rule = adamw(settings) if rule is None else rule
    directory.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager((directory / "checkpoints").absolute(), options=options) as manager:
        state = new_state(parameters, rule)
        newest = manager.latest_step()
        if newest is not None:
            state = manager.restore(
                newest, args=ocp.args.StandardRestore(jax.tree.map(_shape_of, state))
            )
        first = 0 if newest is None else newest
        log = _Log(directory / "metrics.jsonl", first, settings)
        step = make_step(loss, rule, average_decay=settings.average_decay)
        for number, batch in _ahead(batch_at, first, settings.steps):
            state, metrics = step(state, batch)
            progress = log.add(number + 1, metrics)
            if progress is not None:
                report(progress)
            if (number + 1) % settings.save_every_steps == 0 or number + 1 == settings.steps:
                manager.save(number + 1, args=ocp.args.StandardSave(state))
                log.write()
    return state["average"]


def newest_average(
    directory: Path, parameters: Parameters, rule: optax.GradientTransformation
) -> tuple[int, Parameters]:
    """Step and averaged weights of the newest checkpoint of a run; `parameters` give the shapes.

    Raises:
        UsageError: the run has no checkpoint yet.
    """
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(create=False, read_only=True)
    if not (directory / "checkpoints").is_dir():
        raise UsageError(f"{directory}: holds no training checkpoint; train there first")
    with ocp.CheckpointManager((directory / "checkpoints").absolute(), options=options) as manager:
        newest = manager.latest_step()
        if newest is None:
            raise UsageError(f"{directory}: holds no training checkpoint; train there first")
        shapes = jax.tree.map(_shape_of, new_state(parameters, rule))
        state = manager.restore(newest, args=ocp.args.StandardRestore(shapes))
    return newest, state["average"]


def _shape_of(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _ahead(batch_at: Callable[[int], Batch], first: int, end: int) -> Iterator[tuple[int, Batch]]:
    """Batches in order, the next two made in a thread while a step runs."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = [pool.submit(batch_at, number) for number in range(first, min(first + 2, end))]
        for number in range(first, end):
            batch = waiting.pop(0).result()
            if number + 2 < end:
                waiting.append(pool.submit(batch_at, number + 2))
            yield number, batch


class _Log:
    """Sums metrics between lines; lines reach the file with the checkpoint that covers them."""

    def __init__(self, path: Path, first: int, settings: Settings) -> None:
        self._path = path
        self._settings = settings
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._lines = [line for line in lines if json.loads(line)["step"] <= first]
        self._seconds = json.loads(self._lines[-1])["seconds"] if self._lines else 0.0
        self._started = time.monotonic()
        self._sums: dict[str, list[Any]] = {}

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> Progress | None:
        for name, value in metrics.items():
            self._sums.setdefault(name, []).append(value)
        if step % self._settings.log_every_steps and step != self._settings.steps:
            return None
        means = {name: _mean(values) for name, values in self._sums.items()}
        self._sums = {}
        seconds = self._seconds + time.monotonic() - self._started
        rate = float(learning_rate(self._settings)(step))
        self._lines.append(
            json.dumps({"step": step, "seconds": round(seconds, 1), "rate": rate, **means})
        )
        return Progress(step, seconds, rate, means)

    def write(self) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text("\n".join(self._lines) + "\n", encoding="utf-8")
        partial.replace(self._path)


def _mean(values: list[Any]) -> float:
    """Mean of the numbers among `values`: a metric that a batch does not have is a NaN there."""
    known = [float(value) for value in values if not math.isnan(float(value))]
    return float(np.mean(known)) if known else math.nan
