"""Run by test_prompt_cache.py as its own process: `prompt_cache_child.py JSON`.

Answers a conversation with a model whose caches are all of one size. Prints one JSON object.
"""

import json
import sys
from pathlib import Path

MODEL = Path(__file__).parents[1] / "data" / "tiny" / "dense"


def main() -> None:
    from qwen3vl_jax import Processor, Qwen3VL

    task = json.loads(sys.argv[1])
    kept = task["prompt_cache"]
    model = Qwen3VL.from_pretrained(MODEL, max_context=1024, prompt_cache=kept)
    processor = Processor.from_pretrained(MODEL)
    inputs = processor(task["messages"])
    greedy = {"do_sample": False, "eos_token_id": ()}
    tokens = model.generate(**inputs, max_new_tokens=6, **greedy)[0]
    new = tokens[inputs["input_ids"].shape[1] :]
    cache = model.prompt_cache
    parts = [] if cache is None else cache.to_dict()["parts"]
    found = {
        "tokens": tokens.tolist(),
        "text": processor.decode(new),
        "restored": {part["what"]: part["restored"] for part in parts},
    }
    model.close()
    print(json.dumps(found))


main()
