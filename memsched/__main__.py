"""Give items with known lifetimes their offsets in one memory.

python -m memsched pack IN.csv --out OUT.csv                  as low a peak as can be found
python -m memsched pack IN.csv --capacity N --out OUT.csv     any packing within N bytes

IN.csv has the columns id,lower,upper,size and may have alignment. An item takes `size` bytes from
time `lower` until just before `upper`; two that share a time share no byte. OUT.csv has one column
more: offset. Exit codes: 0; 2 wrong usage; 3 no packing within the capacity was found; 4 bad input;
5 input or output failed; 130 interrupted.
"""

import argparse
import math
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from memsched import __version__
from memsched.errors import MemschedError, ProgramError

# A little less than 10 and 60, so that with the start of Python those are kept too.
MINIMISE_S = 9.0
FIT_S = 55.0
INTERRUPTED = 130
_HELP = {
    2: "see --help for what can be given",
    3: "give a larger --capacity or more --seconds",
    4: "mend the file",
    5: "check the disk, its free space and permissions, and run again",
}


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a `ProgramError`."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse for a wrong command line."""
        raise ProgramError(" ".join(message.split()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code."""
    debug = False
    try:
        options = _parse(argv)
        debug = options.debug
        print(_pack(options), flush=True)
        return 0
    except SystemExit as left:  # --help and --version
        return int(left.code or 0)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exception(error)
        return _failed(error)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m memsched",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"memsched {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="pack")
    pack = commands.add_parser(
        "pack",
        help="choose offsets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = pack.add_argument
    add("input", metavar="IN.csv", type=Path, help="columns id,lower,upper,size[,alignment]")
    add("--out", metavar="OUT.csv", type=Path, required=True, help="the same and the offsets")
    add("--capacity", metavar="N", type=_bytes, help="bytes; default: as few as can be found")
    times = f"for all of it (default: {MINIMISE_S:.0f}; with --capacity {FIT_S:.0f} at most)"
    add("--seconds", metavar="S", type=_seconds, help=times)
    add("--seed", metavar="N", type=_bytes, default=0, help="of the search (default: 0)")
    add("--debug", action="store_true", help="show a traceback on errors")
    return parser.parse_args(argv)


def _bytes(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is not a whole number, 0 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= 1e6:
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is not a number from 0 to 1,000,000")
    return seconds


def _pack(options: argparse.Namespace) -> str:
    begin_s = time.monotonic()
    # Imported here: --help should not wait for numpy.
    from memsched.packing import pack
    from memsched.packing.table import read_items, write_items
    from memsched.whole_file import check_target

    items = read_items(options.input)
    check_target(options.out)
    seconds = options.seconds
    if seconds is None:
        seconds = MINIMISE_S if options.capacity is None else FIT_S
    left_s = max(0.0, seconds - (time.monotonic() - begin_s))
    packing = pack(items, capacity=options.capacity, seconds=left_s, seed=options.seed)
    write_items(options.out, items, packing.offsets)
    return (
        f"peak {packing.peak:,} B, bound {packing.bound:,} B, "
        f"fragmentation {packing.fragmentation:.2%}"
    )


def _failed(error: Exception) -> int:
    """Says what went wrong and what to do, and returns the exit code."""
    code = error.exit_code if isinstance(error, MemschedError) else 1
    if isinstance(error, OSError):
        code = 5
    cause, _, advice = " ".join(str(error).split()).rpartition("; ")
    if code == 1:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
        advice = "this is a mistake of ours; please report it with --debug's output"
    print(f"error: {cause or advice}", file=sys.stderr)
    print(advice if cause else _HELP[code], file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
