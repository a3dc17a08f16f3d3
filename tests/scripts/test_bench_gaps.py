"""scripts/bench_gaps.py at tiny sizes."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_table_has_a_line_for_each_machine_and_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = importlib.util.spec_from_file_location("bench_gaps", ROOT / "scripts" / "bench_gaps.py")
    assert spec is not None
    assert spec.loader is not None
    bench_gaps = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench_gaps)
    models = [str(ROOT / "tests/data/tiny" / name / "config.json") for name in ("dense", "moe")]
    machines = [str(ROOT / f"configs/machines/{name}.toml") for name in ("h200", "laptop-cpu")]
    short = ["--prompt-tokens", "8", "--new-tokens", "4"]
    assert bench_gaps.main(["--models", *models, "--machines", *machines, *short]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        [machine, "config"] for machine in ("h200", "h200", "laptop-cpu", "laptop-cpu")
    ]
    assert all(" compute " in line for line in lines[1:])
