"""The whole way from a picture to an answer loads no torch, even where torch is installed."""

import json
import subprocess
import sys
from pathlib import Path

import tiny

ANSWER = """
import importlib, json, pkgutil, sys
import numpy as np
import qwen3vl_jax
from PIL import Image

names = [found.name for found in pkgutil.walk_packages(qwen3vl_jax.__path__, "qwen3vl_jax.")]
for name in names:
    importlib.import_module(name)
model = qwen3vl_jax.Qwen3VL.from_pretrained(sys.argv[1])
processor = qwen3vl_jax.Processor.from_pretrained(sys.argv[1])
picture = Image.fromarray(np.zeros((64, 96, 3), np.uint8))
content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
inputs = processor([{"role": "user", "content": content}])
tokens = model.generate(**inputs, max_new_tokens=3, temperature=0.0)
print(json.dumps({
    "modules": len(names),
    "new": int(tokens.shape[1] - inputs["input_ids"].shape[1]),
    "torch": sorted(name for name in sys.modules if name.split(".")[0].startswith("torch")),
}))
"""


def test_importing_everything_and_generating_loads_no_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ANSWER, str(tiny.checkpoint("dense", tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["modules"] > 20
    assert 1 <= found["new"] <= 3
    assert found["torch"] == []
