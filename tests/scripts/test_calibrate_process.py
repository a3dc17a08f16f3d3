"""scripts/calibrate.py as a program of its own, ended while it measures."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from quick import least_s

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "calibrate.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    ("ended_by", "code"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.alone),
        # These end a process at once, however busy the machine is.
        (signal.SIGTERM, -signal.SIGTERM),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_whatever_ends_it_no_weights_are_left(
    tmp_path: Path, ended_by: signal.Signals, code: int
) -> None:
    disk, out = tmp_path / "disk", tmp_path / "laptop.toml"
    disk.mkdir()
    places = ("--nvme-dir", disk, "--out", out)
    command = [sys.executable, SCRIPT, "--minutes", "0.05", *places]

    def ended_s() -> float:
        with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE) as child:
            try:
                _wait_for_weights(child, disk)
                sent = time.monotonic()
                child.send_signal(ended_by)
                _, complaints = child.communicate(timeout=60)
                taken_s = time.monotonic() - sent
            finally:
                child.kill()
        assert child.returncode == code, complaints
        assert complaints.count(b"\n") <= 4  # what it did before, and that it was interrupted
        assert list(disk.iterdir()) == []
        assert not out.exists()
        return taken_s

    assert least_s(ended_s, 3.0, most_s=15.0, attempts=3) < 3.0


def _wait_for_weights(child: subprocess.Popen[bytes], disk: Path) -> None:
    """Until some lie on the disk and are computed with."""
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith(b"planned 4 programs"):
            break
    while _bytes_there(child.pid, disk) < 100e6:
        assert child.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)


def _bytes_there(process: int, disk: Path) -> int:
    """Of the files on a disk, and of those that a process has open there without a name."""
    found = sum(file.stat().st_size for file in disk.rglob("*") if file.is_file())
    for one in Path(f"/proc/{process}/fd").iterdir():
        try:
            link = os.readlink(one)
            if link.startswith(f"{disk}/") and link.endswith(" (deleted)"):
                found += one.stat().st_size
        except FileNotFoundError:
            continue  # it was closed meanwhile
    return found
