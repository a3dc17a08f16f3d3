"""Rounds of measurements, everything in turn, and what they say together."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwen3vl_jax.benchmark.ours import Run
from qwen3vl_jax.benchmark.work import Cost

PHASES = ("vision", "prefill", "prompt", "decode")


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    """What the machine could do, and what was done with it, within a minute."""

    read_bytes_per_s: float
    flops_per_s: float
    ours: Run
    theirs: Run | None
    others: Mapping[str, Run]


def measure(
    ours: Callable[[], Run],
    theirs: Callable[[], Run] | None,
    others: Mapping[str, Callable[[], Run]],
    *,
    read: Callable[[], float],
    multiply: Callable[[], float],
    repeats: int,
    say: Callable[[str], None],
) -> list[Round]:
    """`repeats` rounds after one that is not counted: it compiles, and touches memory first.

    Args:
        others: variants of ours, by name.
    """
    rounds = []
    for number in range(repeats + 1):
        say(f"round {number} of {repeats}" + (": warming up" if number == 0 else ""))
        before = read(), multiply()
        our_run = ours()
        # The better of two: a bound that a busy neighbour lowered would flatter us.
        after = read(), multiply()
        rates = max(before[0], after[0]), max(before[1], after[1])
        their_run = theirs() if theirs else None
        other_runs = {name: run() for name, run in others.items()}
        rounds.append(Round(*rates, our_run, their_run, other_runs))
    return rounds[1:]


def summary(rounds: Sequence[Round], costs: Mapping[str, Cost]) -> dict[str, Any]:
    """Medians over the rounds; a fraction is bound over time, both of the same round."""
    costs = {**costs, "prompt": costs["vision"] + costs["prefill"]}
    decode = [round_.ours.decode_s for round_ in rounds]
    return {
        "read_bytes_per_s": statistics.median(round_.read_bytes_per_s for round_ in rounds),
        "flops_per_s": statistics.median(round_.flops_per_s for round_ in rounds),
        "decode_tokens_per_s": 1 / statistics.median(decode),
        "phases": {phase: _phase(rounds, phase, costs[phase]) for phase in PHASES},
        "tokens_agree": _agreeing(rounds[-1]),
    }


def _phase(rounds: Sequence[Round], phase: str, cost: Cost) -> dict[str, Any]:
    seconds = [round_.ours.seconds(phase) for round_ in rounds]
    bounds = [
        cost.bound_s(read_bytes_per_s=round_.read_bytes_per_s, flops_per_s=round_.flops_per_s)
        for round_ in rounds
    ]
    their_seconds = [round_.theirs.seconds(phase) for round_ in rounds if round_.theirs]
    ratios = [theirs / ours for ours, theirs in zip(seconds, their_seconds, strict=False) if ours]
    return {
        "seconds": statistics.median(seconds),
        "least_s": min(seconds),
        "most_s": max(seconds),
        "read_bytes": cost.read_bytes,
        "flops": cost.flops,
        "bound_s": statistics.median(bounds),
        "fraction": statistics.median(
            bound / taken if taken else 0.0 for bound, taken in zip(bounds, seconds, strict=True)
        ),
        "transformers_s": statistics.median(their_seconds) if their_seconds else None,
        "times_as_fast": statistics.median(ratios) if ratios else None,
    }


def compared(rounds: Sequence[Round], name: str) -> dict[str, Any]:
    """A variant of ours: seconds of prefill and of a token, and how many times as fast that is."""
    found: dict[str, Any] = {}
    for phase in ("prefill", "decode"):
        pairs = [(one.ours.seconds(phase), one.others[name].seconds(phase)) for one in rounds]
        found[phase] = {
            "seconds": statistics.median(taken for _, taken in pairs),
            "times_as_fast": statistics.median(raw / taken for raw, taken in pairs),
        }
    return found


def _agreeing(last: Round) -> int | None:
    """How many tokens both chose before the first difference; None without a comparison."""
    if last.theirs is None:
        return None
    pairs = zip(last.ours.tokens, last.theirs.tokens, strict=True)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def table(result: Mapping[str, Any]) -> str:
    """The phases as lines of text."""
    lines = [
        f"memory {result['read_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"products {result['flops_per_s'] / 1e9:.0f} GFLOP/s, "
        f"kernels: {result['kernels']}",
        f"{'phase':8s}{'seconds':>10s}{'least':>10s}{'most':>10s}{'GB read':>9s}{'GFLOP':>9s}"
        f"{'bound s':>10s}{'reached':>9s}{'transformers s':>16s}{'times':>7s}",
    ]
    for name, phase in result["phases"].items():
        peer = phase["transformers_s"], phase["times_as_fast"]
        lines.append(
            f"{name:8s}{phase['seconds']:10.4f}{phase['least_s']:10.4f}{phase['most_s']:10.4f}"
            f"{phase['read_bytes'] / 1e9:9.2f}{phase['flops'] / 1e9:9.1f}"
            f"{phase['bound_s']:10.4f}{phase['fraction']:9.0%}"
            + ("" if None in peer else f"{peer[0]:16.4f}{peer[1]:7.2f}")
        )
    lines.append(f"decode: {result['decode_tokens_per_s']:.2f} tokens/s")
    return "\n".join([*lines, *_variant_lines(result["variants"])])


def _variant_lines(variants: Mapping[str, Any]) -> list[str]:
    if not variants:
        return []
    head = f"{'variant':14s}{'GB':>7s}{'prefill s':>11s}{'times':>7s}{'decode s':>10s}{'times':>7s}"
    lines = [f"{head}{'cosine':>10s}{'KL':>10s}"]
    for name, found in variants.items():
        times = "".join(
            f"{found[phase]['seconds']:{width}.4f}{found[phase]['times_as_fast']:7.2f}"
            for phase, width in (("prefill", 11), ("decode", 10))
        )
        far = f"{found['cosine']:10.6f}{found['kl']:10.2e}"
        lines.append(f"{name:14s}{found['weight_bytes'] / 1e9:7.2f}{times}{far}")
    return lines
