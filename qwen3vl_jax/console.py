"""What command lines share: one line of cause and one of help for every failure, and exit codes."""

import argparse
import contextlib
import io
import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from qwen3vl_jax import __version__
from qwen3vl_jax.errors import BadInputError, StorageError, UsageError
from qwen3vl_jax.interrupts import EXIT_CODE as INTERRUPTED
from qwen3vl_jax.interrupts import Guard, guarded

OUT_OF_MEMORY = 3

_HELP = {
    UsageError.exit_code: "see --help for what can be given",
    OUT_OF_MEMORY: "give it more memory, or ask for less",
    BadInputError.exit_code: "mend or replace the input; --debug shows where it was refused",
    StorageError.exit_code: "check the disk, its free space and permissions, and run again",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a `UsageError`."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse for a wrong command line."""
        raise UsageError(message)


def described(description: str) -> Parser:
    """A parser with what all scripts have: --debug and --version."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show a traceback on errors")
    version = f"%(prog)s (qwen3vl-jax) {__version__}"
    parser.add_argument("--version", action="version", version=version)
    return parser


def main(
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
    work: Callable[[argparse.Namespace, Guard], int],
    argv: Sequence[str] | None,
) -> int:
    """A whole script: reads its command line, does its work, returns the exit code of `run`."""
    try:
        options = parse(argv)
    except UsageError as error:
        return failed(error, debug=False)
    except SystemExit as left:  # --help and --version
        return int(left.code or 0)
    except KeyboardInterrupt:
        return _interrupted()
    return run(lambda guard: work(options, guard), debug=options.debug)


def run(work: Callable[[Guard], int], *, debug: bool) -> int:
    """Calls `work` with Ctrl-C guarded, and turns whatever it raises into messages and a code.

    0; 2 wrong usage; 3 out of memory; 4 bad input; 5 I/O; 130 Ctrl-C; 1 for a mistake of ours.
    A reader of stdout that goes away is no failure.
    """
    if sys.stdout is None:  # who started this has closed it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  it stays open
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Where the terminal cannot show a character, it should not end the answer.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with guarded() as guard, _ctrl_c_stays(guard):
            code = work(guard)
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        # Python flushes stdout once more at its end; nobody reads it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        return failed(error, debug=debug)


@contextlib.contextmanager
def _ctrl_c_stays(guard: Guard) -> Iterator[None]:
    """What Ctrl-C becomes in C code that it ends, a SystemError say, is Ctrl-C still."""
    try:
        yield
    except Exception:
        if guard.interrupted:
            raise KeyboardInterrupt from None
        raise


def _interrupted() -> int:
    say("\ninterrupted")
    return INTERRUPTED


def leave(code: int) -> NoReturn:
    """Ends the process at once: taking XLA down in order takes up to a second and is of no use."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def read_text(file: Path | None, most_bytes: int) -> str:
    """The text of a file, or of stdin if None; no more than so many bytes of it.

    Raises:
        BadInputError: there is no such file, or it is no text.
    """
    name = "stdin" if file is None else str(file)
    try:
        if file is None:
            return sys.stdin.buffer.read(most_bytes).decode()
        with file.open("rb") as opened:
            return opened.read(most_bytes).decode()
    except UnicodeDecodeError as error:
        raise BadInputError(f"{name}: not UTF-8 text at byte {error.start}") from None
    except (FileNotFoundError, IsADirectoryError):
        raise BadInputError(f"{name}: no such file; name a text file") from None


def failed(error: Exception, *, debug: bool) -> int:
    """Says what went wrong and what to do, and returns the exit code."""
    if debug:
        traceback.print_exception(error)
    # Our errors and the planner's, which model code does not know, say their own exit code.
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        # Their messages name the way out, where there is one, after the last semicolon.
        cause, _, advice = str(error).rpartition("; ")
        if not cause:
            cause, advice = advice, _HELP[code]
        return _report(f"error: {cause}", advice, code)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return _report(
            "error: out of memory",
            "use --dtype bfloat16, a lower --max-pixels, or fewer --max-new-tokens",
            OUT_OF_MEMORY,
        )
    if isinstance(error, OSError):
        return _report(f"error: {error}", _HELP[StorageError.exit_code], StorageError.exit_code)
    cause = f"error: {type(error).__name__}: {' '.join(str(error).split())}"
    return _report(cause, "this is a mistake of ours; please report it with --debug's output", 1)


def _report(cause: str, advice: str, code: int) -> int:
    say(cause)
    say(advice)
    return code


def say(message: str) -> None:
    """A line to stderr, which may have gone away."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  it stays open


def peak_process_bytes() -> int:
    """The most memory that this process has had in RAM so far.

    Linux counts what the parent had when it forked into `ru_maxrss`, but not into VmHWM.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_bytes() -> int | None:
    """Bytes that this process has read through system calls so far; None where no one counts."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return int(dict(line.split(": ") for line in lines)["rchar"])
