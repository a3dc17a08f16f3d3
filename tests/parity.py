"""How far the port is from reference answers, and what counts as equal.

float32 products in another order differ by about 1e-6 of the largest value; every porting mistake
that we know of moves the logits by at least 1e-5 of it (tests/qwen3vl_jax/test_mutations.py).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from qwen3vl_jax import Qwen3VL

Arrays = Mapping[str, np.ndarray]

# Largest difference allowed, as a share of the largest reference value: 5e-5 at a scale of 5.
TOLERANCE = 1e-5


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference as a share of the largest wanted value."""
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    wide = np.asarray(found, np.float64)
    return float(np.abs(wide - wanted).max() / np.abs(wanted).max())


def vision_differences(model: "Qwen3VL", given: Arrays, answer: Arrays) -> dict[str, float]:
    """Relative difference of the vision tokens and of every DeepStack feature, images first."""
    features = model.encode(given)
    assert features is not None
    sets = {"embeds": features.tokens}
    sets |= {f"deepstack_{index}": part for index, part in enumerate(features.deepstack)}
    found = {}
    for name, part in sets.items():
        keys = [f"{kind}_{name}" for kind in ("image", "video") if f"{kind}_{name}" in answer]
        wanted = np.concatenate([answer[key] for key in keys])
        found[name] = relative(np.asarray(part)[: len(wanted)], wanted)
    return found


def logits_difference(model: "Qwen3VL", given: Arrays, answer: Arrays) -> float:
    """Relative difference of the logits at real tokens."""
    real = given["attention_mask"].astype(bool)
    logits = np.asarray(model(**given))
    assert logits.dtype == np.float32
    assert logits.shape == answer["logits"].shape
    return relative(logits[real], answer["logits"][real])


def greedy(model: "Qwen3VL", given: Arrays, count: int) -> np.ndarray:
    """The next `count` most likely tokens of every row, by prefill and cached decoding."""
    batch, tokens = given["input_ids"].shape
    cache = model.new_cache(batch=batch, capacity=tokens + count)
    logits, cache = model.prefill(dict(given), cache)
    chosen = []
    for step in range(count):
        chosen.append(np.asarray(logits).argmax(axis=-1).astype(np.int32))
        if step + 1 < count:
            logits, cache = model.decode(chosen[-1], cache)
    return np.stack(chosen, axis=1)
