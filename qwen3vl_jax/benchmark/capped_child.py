"""The measured process: a model that does what it is told, and says how long it took.

python -m qwen3vl_jax.benchmark.capped_child

Every line of stdin is an order, a JSON object with the name of a method of `Worker` under "do" and
its arguments; every line of stdout the answer to one. An order that fails is answered by "error".
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qwen3vl_jax import console
from qwen3vl_jax.benchmark.work import Workload, inputs, repetitive_inputs

# Tokens that were seen are a thousand times as likely: so random weights repeat themselves.
REPEATING = 0.001
# The first token comes from the prompt, and before the second weights move to where decoding wants.
UNTIMED = 2


class Worker:
    """A model, and a conversation with it."""

    def __init__(self) -> None:
        self._model: Any = None
        self._cache: Any = None
        self._token = 0
        self._planned = False

    def load(self, path: str, dtype: str, device_memory: int | None) -> dict[str, Any]:
        """Opens a checkpoint: planned within a budget, or all in memory."""
        from qwen3vl_jax import Qwen3VL

        start = time.perf_counter()
        budget = None if device_memory is None else int(device_memory)
        self._model = Qwen3VL.from_pretrained(path, dtype=dtype, device_memory=budget)
        self._planned = budget is not None
        return {"load_s": time.perf_counter() - start}

    def start(self, text_tokens: int, new_tokens: int) -> dict[str, Any]:
        """Begins a conversation with a short prompt, with room for so many tokens."""
        arrays = inputs(self._workload(text_tokens), seed=0)
        cache = self._model.new_cache(batch=1, capacity=text_tokens + new_tokens)
        scores, self._cache = self._model.prefill(arrays, cache)
        self._token = int(np.argmax(scores))
        return {}

    def decode(self, tokens: int) -> dict[str, Any]:
        """Decodes, and says what a token took on average.

        One more comes first and is not counted: what was read ahead before the order came would
        flatter it.
        """
        self._decode_one()
        before, seconds, compute_s = _disk_bytes(), 0.0, 0.0
        for _ in range(tokens):
            start = time.perf_counter()
            self._decode_one()
            seconds += time.perf_counter() - start
            compute_s += self._figures().compute_s if self._planned else 0.0
        found = {
            "seconds": seconds / tokens,
            "read_bytes": (_disk_bytes() - before) // tokens,
        }
        if self._planned:
            figures = self._figures()
            found["compute_s"] = compute_s / tokens
            found["plan_bytes"] = figures.plan_bytes
            found["weight_bytes"] = figures.weight_bytes
        return found

    def _decode_one(self) -> None:
        token = np.array([self._token], np.int32)
        scores, self._cache = self._model.decode(token, self._cache)
        self._token = int(np.argmax(scores))

    def _figures(self) -> Any:
        from qwen3vl_jax.planned.figures import last_pass

        return last_pass(self._model, "decode")

    def prompt(self, text_tokens: int, width: int, height: int) -> dict[str, Any]:
        """Takes in a prompt with a picture up to its first token."""
        work = self._workload(text_tokens, width, height)
        arrays = inputs(work, seed=0)
        self._cache = None
        start = time.perf_counter()
        # First, as a conversation does: plans leave room for it.
        cache = self._model.new_cache(batch=1, capacity=work.prompt_tokens + 1)
        features = self._model.encode(arrays)
        if features is not None:
            features.tokens.block_until_ready()
        seen = time.perf_counter()
        scores, _ = self._model.prefill(arrays, cache, features=features)
        scores.block_until_ready()
        return {"vision_s": seen - start, "prefill_s": time.perf_counter() - seen}

    def answer(self, tokens: int, draft: str | None, room: int) -> dict[str, Any]:
        """Answers a prompt that repeats itself, with more than `UNTIMED` tokens."""
        from qwen3vl_jax.generation import GenerationSettings, Session

        arrays = repetitive_inputs(self._workload(1), seed=0)
        self._cache = None
        session = Session(self._model, batch=1, capacity=room)
        settings = GenerationSettings(
            max_new_tokens=tokens, repetition_penalty=REPEATING, draft=draft
        )
        session.prompt(arrays, capacity=room)
        chosen, times = [], []
        for step in session.answer(settings):
            chosen.append(int(step.tokens[0]))
            times.append(time.perf_counter())
        return {
            "tokens": chosen,
            "tokens_per_s": (len(times) - UNTIMED) / (times[-1] - times[UNTIMED - 1]),
            "passes": session.drafts.passes,
            "accepted": session.drafts.accepted,
        }

    def load_transformers(self, path: str, dtype: str) -> dict[str, Any]:
        """Opens a Hugging Face directory with transformers, its weights mapped into memory."""
        from qwen3vl_jax.benchmark.capped_peer import load

        start = time.perf_counter()
        self._model = load(Path(path), dtype)
        return {"load_s": time.perf_counter() - start}

    def decode_transformers(self, text_tokens: int, tokens: int) -> dict[str, Any]:
        """Generates with transformers; what a token took on average, the first one not counted."""
        from qwen3vl_jax.benchmark.capped_peer import generate

        marks: list[tuple[float, int]] = []
        generate(
            self._model,
            np.arange(text_tokens)[None],
            tokens + 1,
            lambda: marks.append((time.perf_counter(), _disk_bytes())),
        )
        (start, before), (end, after) = marks[0], marks[-1]
        return {"seconds": (end - start) / tokens, "read_bytes": (after - before) // tokens}

    def peaks(self) -> dict[str, Any]:
        """The most memory that the process has had, and its arrays by the runtime's own count."""
        found: dict[str, Any] = {"process_bytes": console.peak_process_bytes()}
        if self._planned:
            from qwen3vl_jax.planned.figures import ledger_peak_bytes

            found["ledger_bytes"] = ledger_peak_bytes(self._model)["device"]
        return found

    def _workload(self, text_tokens: int, width: int = 0, height: int = 0) -> Workload:
        model = self._model
        return Workload(model.config, model.dtype.name, text_tokens, height, width, 1)


def serve() -> int:
    """Carries out orders until there are no more."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = Worker()
    for line in sys.stdin:
        answers.write(json.dumps(_carry_out(worker, json.loads(line))) + "\n")
        answers.flush()
    return 0


def _carry_out(worker: Worker, order: dict[str, Any]) -> dict[str, Any]:
    orders: dict[str, Callable[..., dict[str, Any]]] = {
        "load": worker.load,
        "start": worker.start,
        "decode": worker.decode,
        "prompt": worker.prompt,
        "answer": worker.answer,
        "load_transformers": worker.load_transformers,
        "decode_transformers": worker.decode_transformers,
        "peaks": worker.peaks,
    }
    try:
        return orders[order.pop("do")](**order)
    except Exception as error:
        # Whoever gave the order decides what it means; the traceback is for the reader of stderr.
        traceback.print_exception(error)
        return {"error": f"{type(error).__name__}: {error}"}


def _disk_bytes() -> int:
    """Bytes that the system has fetched from disks for this process so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


if __name__ == "__main__":
    console.leave(serve())
