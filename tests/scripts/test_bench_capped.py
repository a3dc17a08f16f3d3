"""scripts/bench.py --capped at tiny sizes: limits hold, and the report agrees with itself."""

import contextlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from memsched.stores.direct import DirectFile
from qwen3vl_jax.benchmark import capped, capped_child
from qwen3vl_jax.benchmark.capped import Round, summary
from qwen3vl_jax.benchmark.capped_child import Worker
from qwen3vl_jax.benchmark.capped_group import MemoryGroup, memory_group
from qwen3vl_jax.benchmark.capped_process import Child, ChildError, child
from qwen3vl_jax.benchmark.capped_table import table
from qwen3vl_jax.planned.figures import disk_reader, own_groups

pytestmark = pytest.mark.usefixtures("shared_traces")

ROOT = Path(__file__).parents[2]
DENSE = ROOT / "tests" / "data" / "tiny" / "dense" / "config.json"
SHORT = ("--image", "64x32", "--prompt-tokens", "9", "--new-tokens", "2", "--repeats", "1")
# The weights take 3.3 MB, and a cache of 256 slots 0.5 MB.
LIMIT, PLANNED = 900_000_000, 2_000_000


class InThisProcess(Child):
    """A child without a process: its orders are carried out here."""

    def __init__(self) -> None:
        self._worker = Worker()

    def order(self, do: str, **arguments: Any) -> dict[str, Any]:
        # What goes through a pipe is JSON.
        found = getattr(self._worker, do)(**json.loads(json.dumps(arguments)))
        answer: dict[str, Any] = json.loads(json.dumps(found))
        return answer


@contextlib.contextmanager
def in_this_process(group: MemoryGroup | None) -> Iterator[InThisProcess]:
    yield InThisProcess()


def counted_reads(patch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts what this process reads of weights; call it for the bytes so far."""
    read, counts = DirectFile.read, [0]

    def counted(file: DirectFile, *arguments: Any) -> int:
        counts.append(read(file, *arguments))
        return counts[-1]

    patch.setattr(DirectFile, "read", counted)
    return lambda: sum(counts)


@pytest.fixture(scope="module")
def bench() -> types.ModuleType:
    """scripts/bench.py."""
    spec = importlib.util.spec_from_file_location("bench_script", ROOT / "scripts" / "bench.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoints are kept from test to test."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capped, "DISK_S", 0.01)
    monkeypatch.setattr(capped, "LOOKUP_TOKENS", 40)


def command(
    scratch: Path,
    *more: str,
    limits: Sequence[str] = (str(LIMIT),),
    own_bytes: int = LIMIT - PLANNED,
) -> list[str]:
    model = ["--size", str(DENSE), "--dtype", "float32", "--scratch", str(scratch), *SHORT]
    given = [word for limit in limits for word in ("--capped", limit)]
    return [*model, *given, "--own-memory", str(own_bytes), *more]


def writable_groups() -> tuple[Path, ...]:
    """Control groups below which a limit can be set, or skip."""
    groups = tuple(own_groups())
    with memory_group(1 << 30, groups) as group:
        if group is None:
            pytest.skip("control groups cannot be written here")
    return groups


def test_the_report_is_complete_and_its_numbers_agree(
    bench: types.ModuleType,
    scratch: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(capped, "child", in_this_process)
    assert bench.main(command(scratch)) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    (row,) = found["caps"]
    assert row["errors"] == {}
    assert row["device_memory"] == dict.fromkeys(("decode", "lookup", "prompt"), PLANNED)
    # Everything but what the budget holds is read for every token.
    assert row["weight_bytes"] - PLANNED <= row["plan_bytes"] <= row["weight_bytes"]
    assert row["ledger_bytes"] <= PLANNED
    slowest = max(row["compute_s"], row["plan_bytes"] / row["disk_bytes_per_s"])
    assert row["bound_s"] == pytest.approx(slowest)
    assert row["fraction"] == pytest.approx(row["bound_s"] / row["seconds"])
    assert row["tokens_per_s"] == pytest.approx(1 / row["seconds"])
    lookup = row["lookup"]
    assert lookup["same_tokens"]
    # The answer repeats itself: seven tokens are guessed at a time.
    assert lookup["accepted"] > lookup["tokens"] // 2 > lookup["passes"]
    assert row["prompt"]["ratio"] > 0
    assert found["fits"]["ratio"] == pytest.approx(
        found["fits"]["plain_s"] / found["fits"]["seconds"]
    )


def test_encoded_stores_follow_the_raw_one_and_a_limit_may_be_a_part_of_its_weights(
    bench: types.ModuleType,
    scratch: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(capped, "child", in_this_process)
    # What the system reads for this process is also pages of programs, if memory is short.
    monkeypatch.setattr(capped_child, "_disk_bytes", counted_reads(monkeypatch))
    parts = ("--part", "decode", "--codec", "int8")
    assert bench.main(command(scratch, *parts, limits=("60%", "150%"), own_bytes=1000)) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["caps"]
    assert [row["codec"] for row in rows] == ["raw", "raw", "int8", "int8"]
    small, large, small_int8, _ = rows
    weights = large["weight_bytes"]
    assert weights * 0.6 < small["cap_bytes"] < weights * 0.7  # embeddings are not read whole
    assert small["cap_bytes"] == small_int8["cap_bytes"]
    assert large["plan_bytes"] == 0 < small["plan_bytes"]
    assert small_int8["weight_bytes"] < 0.5 * weights  # a quarter, and float32 embeddings
    assert small["read_bytes"] >= small["plan_bytes"] * 0.9
    assert small_int8["plan_bytes"] == 0
    assert small_int8["read_bytes"] == 0


def test_a_part_that_does_not_fit_is_told_and_the_rest_is_measured(
    bench: types.ModuleType, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_bytes = LIMIT - 100_000
    assert bench.main(command(scratch, "--part", "decode", own_bytes=own_bytes)) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = json.loads(lines[-1])["caps"]
    assert row["load_s"] > 0
    assert "order 'start': DoesNotFitError: the program needs at least" in row["errors"]["decode"]
    assert "fraction" not in row
    assert any("DoesNotFitError" in line for line in lines[:-1])


def test_transformers_decodes_the_same_checkpoint(bench: types.ModuleType, scratch: Path) -> None:
    pytest.importorskip("torch")
    options = bench._parse(command(scratch, "--against", "transformers"))
    folder, _ = bench._checkpoint(options, *bench._workload(options)[:2])
    worker = Worker()
    worker.load_transformers(str(folder), "float32")
    found = worker.decode_transformers(5, 3)
    assert found["seconds"] > 0
    assert found["read_bytes"] >= 0


def test_a_fraction_is_of_the_same_round() -> None:
    # Disk, seconds, compute, bytes of the plan, bytes read, bytes of the weights.
    rounds = [
        Round(1e9, 2.0, 0.5, 10**9, 10**9, 3 * 10**9),
        Round(4e9, 1.0, 0.5, 10**9, 10**9, 3 * 10**9),
        Round(2e9, 1.0, 0.4, 10**9, 10**9, 3 * 10**9),
    ]
    found = summary(rounds, 2_000_000_000)
    assert [round_.bound_s for round_ in rounds] == [1.0, 0.5, 0.5]
    assert (found["seconds"], found["bound_s"], found["fraction"]) == (1.0, 0.5, 0.5)
    assert (found["least_s"], found["most_s"]) == (1.0, 2.0)
    assert found["wanted_bytes"] == 1_500_000_000


def test_where_no_group_can_be_written_the_report_says_so(tmp_path: Path) -> None:
    # An ordinary folder is no control group.
    with memory_group(1 << 30, [tmp_path]) as group:
        assert group is None
    assert list(tmp_path.iterdir()) == []
    row = {"cap_bytes": 2_000_000_000, "codec": "raw", "limited": False, "errors": {}}
    assert "NO LIMIT" in table({"caps": [row]})
    assert "NO LIMIT" not in table({"caps": [row | {"limited": True}]})


@pytest.mark.parametrize("version", ["memory.max", "memory.limit_in_bytes"])
def test_both_versions_of_control_groups_are_limited(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(folder: Path, *_: object) -> None:
        # As the kernel does: a new group has its files at once.
        real_mkdir(folder)
        (folder / version).touch()

    real_mkdir = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", mkdir)
    with memory_group(123_456, [tmp_path]) as group:
        assert group is not None
        (folder,) = tmp_path.iterdir()
        assert (folder / version).read_text() == "123456"
        assert group.peak_bytes is None
        assert str(folder / "cgroup.procs") in group.inside(["true"])


def test_a_process_in_a_group_cannot_take_more_than_the_limit() -> None:
    groups = writable_groups()
    code = "import sys; x = b'x' * int(sys.argv[1]); print(len(x))"
    taken = {}
    for nbytes in (20 << 20, 200 << 20):
        with memory_group(100 << 20, groups) as group:
            assert group is not None
            line = group.inside([sys.executable, "-c", code, str(nbytes)])
            taken[nbytes] = subprocess.run(line, capture_output=True).returncode
            peak = group.peak_bytes
        assert peak is None or peak <= 100 << 20
    assert taken[20 << 20] == 0
    assert taken[200 << 20] != 0
    ours = f"qwen3vl-bench-{os.getpid()}-*"
    assert not list(itertools.chain.from_iterable(g.glob(ours) for g in groups))


def test_a_process_that_is_killed_is_an_error_that_says_so() -> None:
    groups = writable_groups()
    with (
        memory_group(60 << 20, groups) as group,
        pytest.raises(ChildError, match="order 'load': the process ended with -9 killed"),
        child(group) as small,
    ):
        # JAX alone takes more than the limit.
        small.order("load", path="nowhere", dtype="float32", device_memory=1 << 20)


def test_the_disk_is_measured_with_other_files_each_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"x" * 10_000)
    measure = disk_reader(tmp_path.iterdir())
    assert measure(0.001) > 0
    (tmp_path / "one").unlink()
    with pytest.raises(OSError, match="one"):
        measure(0.01)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--capped", "2GB"], "name a place, --scratch DIR"),
        (["--capped", "2XB", "--scratch", "x"], "size '2XB' is none"),
        (["--capped", "2GB", "--scratch", "x", "--part", "all"], "invalid choice: 'all'"),
        (["--capped", "0%", "--scratch", "x"], "a part like 30% is wanted"),
        (["--capped", "2GB", "--scratch", "x", "--kv", "int8"], "--kv has no part in --capped"),
    ],
    ids=["scratch", "size", "part", "percent", "kv"],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, bench: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(arguments) == 2
    assert says in capsys.readouterr().err
