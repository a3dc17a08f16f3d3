"""Qwen3-VL in JAX and Flax: checkpoint, pictures and videos in; logits and text out.

Public names are imported when they are first used, so `import qwen3vl_jax` alone is quick.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen3vl_jax.config import Config, load_config
    from qwen3vl_jax.errors import (
        BadInputError,
        ConfigError,
        MediaError,
        PromptError,
        Qwen3VLError,
        StorageError,
        UsageError,
        WeightError,
    )
    from qwen3vl_jax.model import Qwen3VL
    from qwen3vl_jax.processing.processor import Processor

__all__ = [
    "BadInputError",
    "Config",
    "ConfigError",
    "MediaError",
    "Processor",
    "PromptError",
    "Qwen3VL",
    "Qwen3VLError",
    "StorageError",
    "UsageError",
    "WeightError",
    "__version__",
    "load_config",
]

__version__ = "0.2.0"

_HOME = {
    "BadInputError": "errors",
    "Config": "config",
    "ConfigError": "errors",
    "MediaError": "errors",
    "Processor": "processing.processor",
    "PromptError": "errors",
    "Qwen3VL": "model",
    "Qwen3VLError": "errors",
    "StorageError": "errors",
    "UsageError": "errors",
    "WeightError": "errors",
    "load_config": "config",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
