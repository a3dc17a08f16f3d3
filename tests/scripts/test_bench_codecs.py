"""scripts/bench_codecs.py at tiny sizes."""

import importlib.util
import json
import types
from pathlib import Path

import numpy as np
import pytest

from memsched.codecs import CODECS

ROOT = Path(__file__).parents[2]
SMALL = ("--out", "96", "--in", "80", "--repeats", "1")


@pytest.fixture(scope="module")
def bench_codecs() -> types.ModuleType:
    """The script as a module."""
    path = ROOT / "scripts" / "bench_codecs.py"
    spec = importlib.util.spec_from_file_location("bench_codecs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_has_a_line_and_its_bytes_and_error_are_those_of_the_matrix(
    name: str, bench_codecs: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_codecs.main([*SMALL, "--codec", name]) == 0
    _, line, last = capsys.readouterr().out.splitlines()
    (case,) = json.loads(last)["cases"]
    codec, raw = CODECS[name], 96 * 80 * 2
    assert (line.split()[0], case["codec"]) == (name, name)
    assert case["nbytes"] == codec.nbytes((96, 80), "bfloat16")
    assert case["share"] == pytest.approx(case["nbytes"] / raw)
    numbers = np.random.default_rng(0).standard_normal((96, 80), np.float32).astype("bfloat16")
    decoded = codec.decode(codec.encode(numbers), numbers.shape, "bfloat16").astype(np.float64)
    exact = numbers.astype(np.float64)
    wanted = np.linalg.norm(decoded - exact) / np.linalg.norm(exact)
    assert case["error"] == pytest.approx(wanted, rel=1e-6)
    speeds = ("decode_GB_per_s", "one_row_GB_per_s", "many_rows_GFLOP_per_s")
    assert all(0 < case[speed] < 1e6 for speed in speeds)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (("--in", "0"), "--in must be 1 or more, not 0"),
        (("--codec", "int5"), "codec 'int5' is unknown"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_one_line(
    wrong: tuple[str, ...],
    says: str,
    bench_codecs: types.ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bench_codecs.main([*SMALL, *wrong]) == 2
    assert says in capsys.readouterr().err.splitlines()[0]
