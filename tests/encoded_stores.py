"""What the tests of encoded stores share: which arrays are encoded, written out by name."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memsched.codecs import CODECS, Codec, parse_codec
from qwen3vl_jax.checkpoints.conversion import to_store
from qwen3vl_jax.checkpoints.encodings import everywhere
from qwen3vl_jax.config import load_config
from qwen3vl_jax.progress import Silent

# Every kind that there is; of rank 64 the matrices of tiny models would not become smaller.
NAMES = ("svd:rank=8", *sorted(CODECS.keys() - {"raw", "svd:rank=64"}))
Body = dict[str, Any]
TABLE, HEAD = "language_model.embed_tokens.weight", "lm_head.weight"
_MATRIX = re.compile(
    r"language_model\.layers\.\d+\.("
    r"self_attn\.[qkvo]_proj\.weight|mlp\.(gate|up|down)_proj\.weight|"
    r"mlp\.experts\.\d+\.(gate_up|down)_proj)"
)


def encoded_store(source: Path, destination: Path, codec: str, *, dtype: str = "keep") -> Path:
    """As scripts/convert.py --codec makes it."""
    codecs = everywhere(load_config(source), codec)
    to_store(source, destination, dtype=dtype, progress=Silent(), codecs=codecs)
    return destination


def is_encoded(name: str, codec: Codec) -> bool:
    """Whether an array should be: a matrix of a decoder layer, or the head if it can be cut."""
    return bool(_MATRIX.fullmatch(name)) or (name.startswith(HEAD) and codec.cut == 1)


def decoded(values: np.ndarray, codec_name: str) -> np.ndarray:
    """What is left of an array."""
    codec = parse_codec(codec_name)
    return codec.decode(codec.encode(values), values.shape, values.dtype.name)


def forge(store: Path, change: Callable[[Body], None]) -> None:
    """A manifest with a right digest and wrong content, as an attacker would write it."""

    def spelled(value: Mapping[str, Any]) -> bytes:
        return json.dumps(value, sort_keys=True, indent=1).encode() + b"\n"

    path = store / "manifest.json"
    body = json.loads(path.read_text())
    del body["digest"]
    change(body)
    digest = hashlib.sha256(spelled(body)).hexdigest()
    path.write_bytes(spelled(body | {"digest": digest}))
