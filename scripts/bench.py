"""How fast a model of an official size runs here, against what this machine could do.

Random weights of the size are made once; then every round measures the machine (bytes read and
arithmetic per second), the picture, the prompt and decoding, and with --against transformers the
same there, on the same weights. A fraction is the bound over the time, both of one round.

With --capped the model is given less memory than it has, in a control group of its own, and the
bound is that of the disk: bytes that its plan reads over what the disk could read meanwhile. With
--codec the same follows for a store in each codec.

python scripts/bench.py --size 2b --layers 4
python scripts/bench.py --size 2b --against transformers
python scripts/bench.py --size 2b --codec int8 --codec int4
python scripts/bench.py --size 2b --capped 2GB --capped 30% --codec int8 --scratch DIR
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3vl_jax import console
from qwen3vl_jax.errors import UsageError

if TYPE_CHECKING:
    from qwen3vl_jax import Qwen3VL
    from qwen3vl_jax.benchmark.capped import Task
    from qwen3vl_jax.benchmark.ours import Run
    from qwen3vl_jax.benchmark.rounds import Round
    from qwen3vl_jax.benchmark.work import Workload

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "models"


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """A model, and how it came into memory."""

    model: "Qwen3VL"
    made_s: float | None  # None if the checkpoint was there already
    load_s: float | None  # None without --scratch


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table; the last line is one JSON object."""
    return console.main(_parse, lambda options, guard: bench(options), argv)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = console.described(__doc__)
    add = parser.add_argument
    add("--size", default="2b", help="2b, 4b, 8b, 30b, ..., or the path of a config.json")
    add(
        "--layers",
        type=int,
        help="only so many decoder layers and vision blocks; the report says so",
    )
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--prompt-tokens", type=_positive, default=512, help="of text; the picture's come on top")
    add("--image", type=_picture, default=(448, 448), metavar="WxH", help="448x448 or none")
    add("--new-tokens", type=_positive, default=16, help="decoded in each round")
    add("--repeats", type=_positive, default=3, help="rounds; the first of all is not counted")
    add("--against", choices=("transformers",), help="run it too, in turn, on the same weights")
    add(
        "--codec",
        action="append",
        default=[],
        metavar="NAME",
        help="run the same model in turn with layers and head in int8, int4, ...; may be repeated",
    )
    add("--kv", choices=("int8",), help="run it in turn with such a KV cache, too")
    add("--scratch", type=Path, help="keep the weights here as a checkpoint, and time loading it")
    add("--seed", type=int, default=0)
    _add_capped(parser)
    return parser.parse_args(argv)


def _add_capped(parser: argparse.ArgumentParser) -> None:
    from qwen3vl_jax.benchmark.capped import OWN_BYTES, PARTS

    group = parser.add_argument_group("in less memory", "Needs --scratch. Sizes are like 1.5GB.")
    add = group.add_argument
    add(
        "--capped",
        action="append",
        type=_limit,
        metavar="SIZE",
        help="a limit, or 30%% of the raw text weights beside what the process takes; may be given "
        "several times",
    )
    add(
        "--own-memory",
        type=_size,
        metavar="SIZE",
        help="what of a limit is left to Python, JAX and compiled programs (default "
        f"{', '.join(f'{size} for {part}' for part, size in OWN_BYTES.items())})",
    )
    add(
        "--part",
        action="append",
        choices=PARTS,
        help="decode, lookup (drafts), prompt or fits (everything in memory); default all",
    )


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _size(text: str) -> int:
    """Bytes of a size like 1.5GB."""
    from memsched.sizes import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _limit(text: str) -> int | float:
    """The same, or the part of 30%."""
    if not text.endswith("%"):
        return _size(text)
    try:
        percent = float(text[:-1])
    except ValueError:
        percent = 0.0
    if not 0 < percent <= 1000:
        raise argparse.ArgumentTypeError(f"{text}: a size like 2GB or a part like 30% is wanted")
    return percent / 100


def _picture(text: str) -> tuple[int, int]:
    """Width and height in pixels; 0, 0 for none."""
    if text == "none":
        return 0, 0
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text}: a size like 448x448, or none, is wanted")
    return int(width), int(height)


def bench(options: argparse.Namespace) -> int:
    """Measures what the options ask for, and prints it."""
    from qwen3vl_jax.benchmark.machine import multiplier, reader
    from qwen3vl_jax.benchmark.ours import run
    from qwen3vl_jax.benchmark.peer import require_torch
    from qwen3vl_jax.benchmark.rounds import measure, summary, table
    from qwen3vl_jax.benchmark.work import costs, inputs

    if options.capped:
        return bench_capped(options)
    if options.against:
        require_torch()
    values, work, layers = _workload(options)
    loaded = _load(options, values, work)
    model = loaded.model
    arrays = inputs(work, seed=options.seed)
    others = _variants(options, model)
    rounds = measure(
        lambda: run(model, arrays, work.new_tokens),
        _peer(values, model, arrays, work) if options.against else None,
        {name: partial(run, other, arrays, work.new_tokens) for name, other in others.items()},
        read=reader(),
        multiply=multiplier(work.dtype),
        repeats=options.repeats,
        say=console.say,
    )
    result = {
        **_settings(options, work, layers),
        **summary(rounds, costs(work)),
        "weight_bytes": _weight_bytes(model),
        "made_s": loaded.made_s,
        "load_s": loaded.load_s,
        "peak_bytes": console.peak_process_bytes(),
        "variants": _compared(rounds, model, others, arrays, options.seed),
    }
    print(_headline(result))
    print(table(result))
    print(json.dumps(result))
    return 0


def bench_capped(options: argparse.Namespace) -> int:
    """Measures planned models under limits, and prints it."""
    from qwen3vl_jax.benchmark.capped import measure
    from qwen3vl_jax.benchmark.capped_stores import disk_of, limit_bytes, store_of
    from qwen3vl_jax.benchmark.capped_table import table
    from qwen3vl_jax.benchmark.peer import require_torch

    if options.scratch is None:
        raise UsageError("--capped: weights are streamed from a disk; name a place, --scratch DIR")
    if options.kv is not None:
        raise UsageError("--kv has no part in --capped; leave one of them out")
    if options.against:
        require_torch()
    values, work, layers = _workload(options)
    checkpoint = _checkpoint(options, values, work)[0]
    task = _capped_task(options, work, checkpoint)
    limits = [limit_bytes(limit, task) for limit in options.capped]
    found = measure(task, limits)
    for codec in options.codec:
        store = store_of(checkpoint, codec, console.say)
        found["caps"] += measure(task.of_codec(codec, store, disk_of(store)), limits)["caps"]
    result = {**_settings(options, work, layers), **found}
    print(table(result))
    print(json.dumps(result))
    return 0


def _capped_task(options: argparse.Namespace, work: "Workload", checkpoint: Path) -> "Task":
    from qwen3vl_jax.benchmark.capped import OWN_BYTES, PARTS, Task
    from qwen3vl_jax.benchmark.capped_stores import disk_of, raw_bytes, store_of
    from qwen3vl_jax.planned.figures import own_groups

    store = store_of(checkpoint, "raw", console.say)
    weight_bytes, text_bytes = raw_bytes(work)
    return Task(
        store=store,
        dtype=work.dtype,
        weight_bytes=weight_bytes,
        text_bytes=text_bytes,
        own_bytes=OWN_BYTES
        if options.own_memory is None
        else dict.fromkeys(OWN_BYTES, options.own_memory),
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        prompt_tokens=options.prompt_tokens,
        image=options.image,
        parts=tuple(options.part or PARTS),
        groups=tuple(own_groups()),
        disk=disk_of(store),
        say=console.say,
        peer=checkpoint if options.against else None,
    )


def _settings(options: argparse.Namespace, work: "Workload", layers: int) -> dict[str, Any]:
    from qwen3vl_jax import kernels

    return {
        "size": options.size,
        "layers": work.config.text.num_hidden_layers,
        "layers_of_the_model": layers,
        "dtype": work.dtype,
        "prompt_tokens": work.prompt_tokens,
        "image": [work.image_width, work.image_height],
        "new_tokens": work.new_tokens,
        "repeats": options.repeats,
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "kernels": kernels.status().reason,
    }


def _headline(result: Mapping[str, Any]) -> str:
    shown, whole = result["layers"], result["layers_of_the_model"]
    part = "" if shown == whole else f" SHRUNK to {shown} of {whole} layers,"
    picture = "x".join(map(str, result["image"])) if any(result["image"]) else "no"
    ways = ("made", result["made_s"]), ("loaded", result["load_s"])
    came = ", ".join(f"{way} in {taken:.1f} s" for way, taken in ways if taken is not None)
    weights = f"{result['dtype']}, {result['weight_bytes'] / 1e9:.2f} GB {came}"
    prompt = f"{result['prompt_tokens']} prompt tokens with {picture} picture"
    rounds = f"medians of {result['repeats']} rounds on {result['cores']} cores"
    return f"{result['size']}:{part} {weights}; {prompt}; {rounds}"


def _workload(options: argparse.Namespace) -> tuple[dict[str, Any], "Workload", int]:
    """config.json's values as measured, the work, and how many layers the whole model has."""
    from qwen3vl_jax.benchmark.checkpoint import shrunk_values
    from qwen3vl_jax.benchmark.work import Workload, config_file, shrunk
    from qwen3vl_jax.config import load_config

    file = config_file(options.size, CONFIGS)
    whole = load_config(file)
    config = shrunk(whole, options.layers)
    width, height = options.image
    step = config.vision.patch_size * config.vision.spatial_merge_size
    if width % step or height % step:
        raise UsageError(f"--image {width}x{height}: both must be multiples of {step}")
    work = Workload(config, options.dtype, options.prompt_tokens, height, width, options.new_tokens)
    values = shrunk_values(json.loads(file.read_text()), config, options.dtype)
    return values, work, whole.text.num_hidden_layers


def _load(options: argparse.Namespace, values: Mapping[str, Any], work: "Workload") -> Loaded:
    from qwen3vl_jax import Qwen3VL

    if options.scratch is None:
        return Loaded(*_made(options, work), None)
    folder, made_s = _checkpoint(options, values, work)
    start = time.perf_counter()
    model = Qwen3VL.from_pretrained(folder, dtype=work.dtype)
    return Loaded(model, made_s, time.perf_counter() - start)


def _made(options: argparse.Namespace, work: "Workload") -> tuple["Qwen3VL", float]:
    """Random weights, and how long they took."""
    from qwen3vl_jax import Qwen3VL

    console.say("making random weights")
    start = time.perf_counter()
    model = Qwen3VL.random(work.config, dtype=work.dtype, seed=options.seed)
    return model, time.perf_counter() - start


def _variants(options: argparse.Namespace, model: "Qwen3VL") -> dict[str, "Qwen3VL"]:
    """The model in other forms, by name."""
    from qwen3vl_jax.benchmark.variants import with_cache, with_codec

    found = {}
    for codec in options.codec:
        console.say(f"encoding as {codec}")
        found[codec] = with_codec(model, codec)
    return found | (
        {} if options.kv is None else {f"kv {options.kv}": with_cache(model, options.kv)}
    )


def _compared(
    rounds: Sequence["Round"],
    model: "Qwen3VL",
    others: Mapping[str, "Qwen3VL"],
    arrays: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:
    """Speed and bytes of every variant, and how far its scores are from the model's."""
    from qwen3vl_jax.benchmark.rounds import compared
    from qwen3vl_jax.benchmark.variants import distance, trial_scores

    if not others:
        return {}
    console.say("comparing scores")
    raw = trial_scores(model, arrays, seed=seed)
    return {
        name: compared(rounds, name)
        | dataclasses.asdict(distance(raw, trial_scores(other, arrays, seed=seed)))
        | {"weight_bytes": _weight_bytes(other)}
        for name, other in others.items()
    }


def _weight_bytes(model: "Qwen3VL") -> int:
    return sum(array.nbytes for array in model.parameters.values())


def _checkpoint(
    options: argparse.Namespace, values: Mapping[str, Any], work: "Workload"
) -> tuple[Path, float | None]:
    """The checkpoint of random weights in the scratch directory; seconds if they had to be made."""
    from qwen3vl_jax.benchmark.checkpoint import write

    config = work.config
    name = f"{Path(options.size).stem}-{config.text.num_hidden_layers}-{work.dtype}-{options.seed}"
    folder = options.scratch / f"bench-{name}"
    if (folder / "config.json").exists():
        return folder, None
    model, made_s = _made(options, work)
    console.say(f"writing them to {folder}")
    write(folder, values, config, model.parameters)
    return folder, made_s


def _peer(
    values: Mapping[str, Any], model: "Qwen3VL", arrays: Mapping[str, Any], work: "Workload"
) -> Callable[[], "Run"]:
    from qwen3vl_jax.benchmark.peer import Peer

    console.say("building transformers' model around the same weights")
    peer = Peer(values, work.config, model.parameters, dtype=work.dtype)
    return lambda: peer.run(arrays, work.new_tokens)


if __name__ == "__main__":
    console.leave(main())
