"""The same workload through transformers and torch, on the very same weights in memory.

torch is optional: it is looked for when a comparison is asked for, and nothing else needs it.
"""

import importlib
import importlib.util
import json
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen3vl_jax.benchmark.checkpoint import hf_tensors
from qwen3vl_jax.benchmark.ours import Run
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import UsageError


def require_torch() -> Any:
    """The torch module.

    Raises:
        UsageError: if it is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise UsageError("--against transformers: torch is not installed; pip install '.[test]'")
    return importlib.import_module("torch")


class Peer:
    """transformers' model around our arrays: no second copy of a weight, but for experts."""

    def __init__(
        self,
        values: Mapping[str, Any],
        config: Config,
        parameters: Mapping[str, Any],
        *,
        dtype: str,
    ) -> None:
        self._torch = require_torch()
        self._dtype = getattr(self._torch, dtype)
        with self._torch.device("meta"):
            self._model = self._make(values)
        tensors = _shared(self._torch, config, parameters)
        if config.tie_word_embeddings:
            tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
        self._model.load_state_dict(tensors, assign=True)
        self._fill_buffers(values)
        self._model.eval()
        self._model.generation_config.pad_token_id = 0

    def run(self, inputs: Mapping[str, np.ndarray], new_tokens: int) -> Run:
        """Vision alone, then `generate` with greedy choice; prefill is its rest up to a token."""
        torch = self._torch
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        vision_s, clock = 0.0, _Clock()
        with torch.inference_mode():
            if "pixel_values" in tensors:
                tensors["pixel_values"] = tensors["pixel_values"].to(self._dtype)
                start = time.perf_counter()
                self._model.get_image_features(tensors["pixel_values"], tensors["image_grid_thw"])
                vision_s = time.perf_counter() - start
            start = time.perf_counter()
            tokens = self._model.generate(
                **tensors,
                max_new_tokens=new_tokens + 1,
                min_new_tokens=new_tokens + 1,
                do_sample=False,
                streamer=clock,
            )
        steps = np.diff(clock.times)
        first_s = clock.times[0] - start
        chosen = tokens[0, inputs["input_ids"].shape[1] :].tolist()
        return Run(vision_s, first_s - vision_s, float(np.median(steps)), tuple(chosen))

    def _make(self, values: Mapping[str, Any]) -> Any:
        transformers = importlib.import_module("transformers")
        config = transformers.CONFIG_MAPPING[values["model_type"]].from_dict(values)
        return transformers.AutoModelForImageTextToText.from_config(config, dtype=self._dtype)

    def _fill_buffers(self, values: Mapping[str, Any]) -> None:
        """Rotary frequencies, which no checkpoint holds, from a model of one layer."""
        small = json.loads(json.dumps(values))
        small["text_config"] |= {"num_hidden_layers": 1, "vocab_size": 8}
        small["text_config"] |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        if "num_experts" in small["text_config"]:
            small["text_config"] |= {"num_experts": 1, "num_experts_per_tok": 1}
        small["vision_config"] |= {"depth": 1, "deepstack_visual_indexes": []}
        for name, buffer in self._make(small).named_buffers():
            owner, _, last = name.rpartition(".")
            setattr(self._model.get_submodule(owner), last, buffer)


class _Clock:
    """A streamer that notes when each new token came; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is left to do."""


def _shared(torch: Any, config: Config, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Our arrays as torch tensors under transformers' names, sharing memory."""
    tensors = {}
    for name, entries in hf_tensors(config).items():
        parts = [torch.from_dlpack(parameters[entry.path]) for entry in entries]
        tensors[name] = parts[0] if entries[0].expert is None else torch.stack(parts)
    return tensors
