"""Run by test_convert_faults.py as its own process:

    conversion_killer.py SRC FOLDER KILLS SIGNAL [OPTION...]

Imports the converter once, then forks a child for every conversion, so that a start costs
milliseconds. Each of KILLS conversions gets SIGNAL at a random moment and is run again to its end.
Prints one JSON object: for each how it died, how many lines its journal had, and what the second
run returned.
"""

import contextlib
import importlib.util
import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert.py"


def load_script() -> Callable[[list[str]], int]:
    specification = importlib.util.spec_from_file_location("convert", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    # What a conversion imports when it starts.
    import rich.progress  # noqa: F401

    import qwen3vl_jax.checkpoints.verification  # noqa: F401

    main: Callable[[list[str]], int] = module.main
    return main


def start(convert: Callable[[list[str]], int], options: list[str], destination: Path) -> int:
    """Fork a child that converts; returns its process id once it does."""
    begun, begins = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            os.write(begins, b".")
            code = convert([*options, str(destination)])
        os._exit(code)
    os.close(begins)
    os.read(begun, 1)
    os.close(begun)
    return child


def result(child: int) -> int:
    """Exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(source: str, folder: Path, kills: int, number: int, *options: str) -> None:
    convert, given = load_script(), [*options, source]
    begin = time.monotonic()
    assert result(start(convert, given, folder / "undisturbed")) == 0
    seconds = time.monotonic() - begin
    chosen = random.Random(0)
    trials: list[dict[str, object]] = []
    while len(trials) < kills:
        destination = folder / f"trial{len(trials)}-{chosen.randrange(10**9)}"
        child = start(convert, given, destination)
        time.sleep(chosen.random() * seconds)
        begin = time.monotonic()
        os.kill(child, number)
        died = result(child)
        answer_s = time.monotonic() - begin
        if died == 0:
            seconds *= 0.8  # it was faster than the signal
            continue
        left = destination.exists()
        journal = destination.with_name(destination.name + ".partial") / "journal.jsonl"
        noted = journal.read_bytes().count(b"\n") if journal.exists() else 0
        if noted <= 1 and not left:
            seconds *= 1.1  # the machine is busier than it was: nothing had been done yet
        code = result(start(convert, given, destination))
        # Killed between the last rename and tidying up: DST is complete, the answer is "exists".
        again = 0 if left and code == 2 else code
        trial = {"name": destination.name, "died": died, "again": again, "noted": noted}
        trials.append({**trial, "answer_s": answer_s})
    heavy = sorted({"jax", "flax", "transformers", "orbax", "torch"} & sys.modules.keys())
    print(json.dumps({"trials": trials, "heavy": heavy}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
