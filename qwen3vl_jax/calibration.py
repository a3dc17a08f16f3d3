"""What measuring on a few prompts begins with: these as one batch, and the whole model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.model import Qwen3VL
from qwen3vl_jax.phases import Direct
from qwen3vl_jax.processing.processor import Processor

MOST_PROMPTS = 8
MOST_TOKENS = 128  # of each prompt, its last ones


def inputs_of(path: Path, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """The first 8 prompts that are not empty as one batch, padded on the left.

    Raises:
        UsageError: there is none.
    """
    kept = [line.strip() for line in prompts if line.strip()][:MOST_PROMPTS]
    if not kept:
        raise UsageError("there is no prompt to calibrate with; give a file with one on each line")
    processor = Processor.from_pretrained(path)
    given = processor([[{"role": "user", "content": prompt}] for prompt in kept])
    return {name: array[:, -MOST_TOKENS:] for name, array in given.items()}


def model_in_memory(path: Path, *, dtype: str | None) -> Qwen3VL:
    """The model of a checkpoint, without plans.

    Raises:
        UsageError: there is no room for the weights.
    """
    model = Qwen3VL.from_pretrained(path, dtype=dtype)
    if not isinstance(model.runner, Direct):
        model.close()
        raise UsageError(
            f"{path}: all its weights must fit in memory to be calibrated, and do not; "
            "leave out --calibrate, or do this on a larger machine"
        )
    return model
