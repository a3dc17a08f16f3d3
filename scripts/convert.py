"""Convert a checkpoint: Hugging Face or Orbax to our store, and a store back to either.

python scripts/convert.py SRC DST                a store, from a Hugging Face directory or Orbax
python scripts/convert.py SRC DST --codec int4   a store whose layers rest in fewer bytes
python scripts/convert.py SRC DST --codec auto   the codec of each matrix by what it would change
python scripts/convert.py STORE DST --to-hf      safetensors files, as they were
python scripts/convert.py STORE DST --to-orbax   an Orbax checkpoint
python scripts/convert.py STORE --verify         read a store again, check every byte
python scripts/convert.py SRC DST --verify       convert unless DST exists, then read both again

--codec encodes the matrices of all decoder layers, and the head; of a raw store, too. An encoded
store is smaller on disk and in memory, and what is lost is lost: --to-hf and --to-orbax write what
it decodes to, not the original (and a tied head as its table again). Names: int8, int8:64,
int8:128, int4 (that is int4:32), int4:64, int4:32:zero, int4:64:zero, fp16, bf16, sparse:2:4,
sparse:block=S, svd:rank=R, svd:fraction=F; raw is none.

--codec auto chooses for every matrix, so that the store is as small as the level's error budget
allows: the matrix's own error by each codec, times how sensitive the logits are to it. Levels are
the files in configs/levels; minimal changes no bit. Sensitivities are defaults by role, or measured
with --calibrate, and then kept in the store. encoding_report.json in the store says why each matrix
is what it is.

--calibrate FILE, with a prompt on each line (8 are used; all weights must fit in memory), also fits
the codes of int8 and int4, chosen or not, to what these prompts multiply them with: the same bytes,
and an error of the logits that is usually smaller. The mean squares of these inputs are kept in the
store, so --verify can fit again; that they are those of your prompts it cannot see.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3vl_jax import console
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.interrupts import EXIT_CODE as INTERRUPTED
from qwen3vl_jax.interrupts import Guard
from qwen3vl_jax.planned.options import LEVELS

if TYPE_CHECKING:
    from qwen3vl_jax.checkpoints.input_squares import Inputs, Squares
    from qwen3vl_jax.checkpoints.selection import Selection
    from qwen3vl_jax.progress import ProgressBar

AUTO = "auto"
MOST_PROMPT_BYTES = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run one conversion. Returns 0, 2 wrong usage, 4 bad input, 5 input/output, 130 Ctrl-C."""
    return console.main(_parse, _work, argv)


def _work(arguments: argparse.Namespace, _: Guard) -> int:
    try:
        print(_run(arguments))
    except KeyboardInterrupt:
        console.say("error: interrupted")
        console.say("run the same command again to continue")
        return INTERRUPTED
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = console.described(__doc__)
    parser.add_argument("source", metavar="SRC", type=Path, help="directory to read")
    parser.add_argument("destination", metavar="DST", type=Path, nargs="?", help="new directory")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--to-hf", action="store_true", help="write safetensors files")
    target.add_argument("--to-orbax", action="store_true", help="write an Orbax checkpoint")
    parser.add_argument(
        "--dtype",
        choices=("keep", "float32", "bfloat16", "float16"),
        help="dtype of the arrays in the new store (default: keep)",
    )
    parser.add_argument("--codec", metavar="NAME", help="encode the layers and the head")
    auto = parser.add_argument_group("--codec auto")
    auto.add_argument("--level", choices=LEVELS, help="what may change (default: balanced)")
    auto.add_argument(
        "--error-budget",
        type=float,
        metavar="E",
        help="relative error of the logits, predicted, in place of the level's",
    )
    parser.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="fit codes to the prompts in a file"
    )
    parser.add_argument("--verify", action="store_true", help="read everything again and compare")
    arguments = parser.parse_args(argv)
    exports = arguments.to_hf or arguments.to_orbax
    made = exports or arguments.dtype or arguments.codec
    if arguments.destination is None and (made or not arguments.verify):
        parser.error("DST is missing; without it only --verify can be done")
    if exports and arguments.dtype:
        parser.error("--dtype is chosen when a store is made; an export keeps it")
    if exports and arguments.codec:
        parser.error("--codec is chosen when a store is made; an export writes numbers")
    if arguments.codec != AUTO and (arguments.level, arguments.error_budget) != (None, None):
        parser.error("--level and --error-budget need --codec auto")
    if arguments.calibrate and not arguments.codec:
        parser.error("--calibrate needs a --codec, whose codes it fits")
    if arguments.dtype == "keep":
        arguments.dtype = None
    return arguments


def _run(arguments: argparse.Namespace) -> str:
    from qwen3vl_jax.checkpoints import verification
    from qwen3vl_jax.progress import ProgressBar

    source, destination = arguments.source, arguments.destination
    with ProgressBar() as progress:
        if destination is None:
            verification.verify_store(source, progress=progress)
            return f"{source}: every byte is as the manifest says"
        if not (arguments.verify and destination.exists()):
            _convert(arguments, progress)
        if arguments.verify:
            encoded = verification.verify(source, destination, progress=progress)
            same = "what its codecs make of" if encoded else "the same model as"
            return f"{destination} holds {same} {source}"
    return f"wrote {destination}"


def _convert(arguments: argparse.Namespace, progress: "ProgressBar") -> None:
    source, destination = arguments.source, arguments.destination
    if arguments.to_orbax:
        from qwen3vl_jax.checkpoints.orbax_export import to_orbax

        to_orbax(source, destination, progress=progress)
    elif arguments.to_hf:
        from qwen3vl_jax.checkpoints.hf_export import to_hf

        to_hf(source, destination, progress=progress)
    else:
        _to_store(arguments, progress)


def _to_store(arguments: argparse.Namespace, progress: "ProgressBar") -> None:
    """Makes a store; says on stderr what was chosen, and how far the prompts' logits move."""
    from qwen3vl_jax.checkpoints.conversion import to_store
    from qwen3vl_jax.checkpoints.selection import summary

    prompts = None if arguments.calibrate is None else _prompts(arguments.calibrate)
    automatic = arguments.codec == AUTO
    selection = _selection(arguments, prompts) if automatic else None
    choice = to_store(
        arguments.source,
        arguments.destination,
        dtype=arguments.dtype or "keep",
        progress=progress,
        codecs=None if automatic else _codecs(arguments),
        selection=selection,
        inputs=None if prompts is None else _inputs(arguments, prompts),
    )
    if choice is not None and selection is not None:
        console.say(summary(choice, selection.level))
    if prompts is not None:
        from qwen3vl_jax.perturbation import measured_error

        error = measured_error(
            arguments.source, arguments.destination, prompts, dtype=arguments.dtype
        )
        console.say(f"measured on these prompts: {error:.4f}")


def _selection(arguments: argparse.Namespace, prompts: list[str] | None) -> "Selection":
    from qwen3vl_jax.checkpoints.selection import Calibration, Selection, level_of

    level = level_of(arguments.level or "balanced")
    if arguments.error_budget is not None:
        level = level.with_budget(arguments.error_budget)
    if prompts is None:
        return Selection(level)

    def measure() -> dict[str, float]:
        from qwen3vl_jax.perturbation import measured_sensitivities  # JAX

        return measured_sensitivities(
            arguments.source, prompts, dtype=arguments.dtype, say=console.say
        )

    return Selection(level, Calibration(measure, _digest(prompts)))


def _inputs(arguments: argparse.Namespace, prompts: list[str]) -> "Inputs":
    from qwen3vl_jax.checkpoints.input_squares import Inputs

    def measure() -> "Squares":
        from qwen3vl_jax.activations import measured_input_squares  # JAX

        return measured_input_squares(arguments.source, prompts, dtype=arguments.dtype)

    return Inputs(measure, _digest(prompts))


def _digest(prompts: list[str]) -> str:
    from qwen3vl_jax.checkpoints.files import sha256

    return sha256("\n".join(prompts).encode())


def _prompts(file: Path) -> list[str]:
    """The lines of a file, one of which must be a prompt.

    Raises:
        UsageError: none is.
    """
    prompts = console.read_text(file, MOST_PROMPT_BYTES).splitlines()
    if not any(map(str.strip, prompts)):
        raise UsageError(f"{file} has no prompt to calibrate with; write one on each line")
    return prompts


def _codecs(arguments: argparse.Namespace) -> dict[str, str] | None:
    """The codec of every array that gets one."""
    from qwen3vl_jax.checkpoints.encodings import codec_name, everywhere
    from qwen3vl_jax.checkpoints.input_squares import check_fitted
    from qwen3vl_jax.config import load_config

    if arguments.codec is None:
        return None
    name = codec_name(arguments.codec)
    if arguments.calibrate is not None:
        check_fitted(name)
    return None if name == "raw" else everywhere(load_config(arguments.source), name)


if __name__ == "__main__":
    raise SystemExit(main())
