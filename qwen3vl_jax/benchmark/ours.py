"""One timed run of our model over a workload."""

import dataclasses
import time
from collections.abc import Mapping

import jax
import numpy as np

from qwen3vl_jax.model import Qwen3VL


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Seconds of every phase of one run, and the tokens it chose (greedily)."""

    vision_s: float
    prefill_s: float  # from the picture's features to the first token
    decode_s: float  # per token, the median
    tokens: tuple[int, ...]

    def seconds(self, phase: str) -> float:
        """Of vision, prefill or decode; of prompt, which is the first two."""
        match phase:
            case "vision":
                return self.vision_s
            case "prefill":
                return self.prefill_s
            case "decode":
                return self.decode_s
            case "prompt":
                return self.vision_s + self.prefill_s
        raise ValueError(f"phase {phase!r}: vision, prefill, prompt or decode")


def run(model: Qwen3VL, inputs: Mapping[str, np.ndarray], new_tokens: int) -> Run:
    """Vision, prefill and `new_tokens` decoded tokens; a token is timed until it is on the host."""
    start = time.perf_counter()
    features = jax.block_until_ready(model.encode(inputs))
    seen = time.perf_counter()
    prompt = inputs["input_ids"].shape[1]
    cache = model.new_cache(batch=1, capacity=prompt + new_tokens)
    scores, cache = model.prefill(inputs, cache, features=features)
    tokens = [int(np.argmax(scores))]
    filled = time.perf_counter()
    steps = []
    for _ in range(new_tokens):
        before = time.perf_counter()
        scores, cache = model.decode(np.array(tokens[-1:], np.int32), cache)
        tokens.append(int(np.argmax(scores)))
        steps.append(time.perf_counter() - before)
    return Run(seen - start, filled - seen, float(np.median(steps)), tuple(tokens))
