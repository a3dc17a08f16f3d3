"""transformers in as little memory: its weights are the file, mapped, and come by page faults.

torch is optional: it is looked for when a comparison is asked for, and nothing else needs it.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from qwen3vl_jax.benchmark.peer import require_torch


def load(folder: Path, dtype: str) -> Any:
    """transformers' model of a Hugging Face directory.

    Raises:
        UsageError: torch is not installed.
    """
    torch = require_torch()
    transformers = importlib.import_module("transformers")
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=getattr(torch, dtype), low_cpu_mem_usage=True
    )
    model.eval()
    model.generation_config.pad_token_id = 0
    return model


def generate(
    model: Any, ids: Int[np.ndarray, "1 tokens"], tokens: int, mark: Callable[[], None]
) -> None:
    """Greedy choice of so many tokens; `mark` is called when each of them is there."""
    torch = require_torch()
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.ones(ids.shape).long()}
    with torch.inference_mode():
        model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            streamer=_Marks(mark),
        )


class _Marks:
    """A streamer that notes every new token; the prompt comes first."""

    def __init__(self, mark: Callable[[], None]) -> None:
        self._mark = mark
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        if self._prompt_seen:
            self._mark()
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is left to do."""
