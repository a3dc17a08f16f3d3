"""Detection, on faked /proc and /sys trees, and once on the machine at hand."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from memsched.detection import disk_rate
from memsched.detection.compute_rate import measure_transfers
from memsched.detection.disk_rate import free_bytes, measure_disk
from memsched.detection.memory_limits import Room, main_memory
from memsched.detection.this_machine import (
    BLOCK_BYTES,
    RESERVE_BYTES,
    detect,
    plannable,
    with_limits,
)
from memsched.errors import DoesNotFitError, ProgramError, StoreError
from memsched.machine import Compute, Machine, Tier
from memsched.profiles import load_machine, write_machine

GIB = 1 << 30
V1_MOUNTS = """\
22 1 0:20 / /proc rw - proc proc rw
31 23 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
"""
V2_MOUNTS = "29 23 0:26 {top} /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def fake_root(root: Path, files: dict[str, str]) -> Path:
    """A tree with 8 GiB free and no limits, and other files over it."""
    given = {
        "proc/meminfo": f"MemTotal: 9000000 kB\nMemAvailable: {8 * GIB // 1024} kB\nX(y): 1 kB\n",
        "proc/self/limits": "Limit  Soft Limit  Hard Limit  Units\n"
        "Max data size             unlimited            unlimited            bytes     \n",
        "proc/self/status": "Name:\tpython\nVmSize:\t 1048576 kB\nVmData:\t 524288 kB\n",
    }
    for name, text in (given | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v1(path: str, top: str, group: str, limit: int, usage: int, droppable: int) -> dict[str, str]:
    where = f"sys/fs/cgroup/memory{group}"
    return {
        "proc/self/cgroup": f"5:cpu,cpuacct:/other\n4:memory:{path}\n0::/\n",
        "proc/self/mountinfo": V1_MOUNTS.format(top=top),
        f"{where}/memory.limit_in_bytes": f"{limit}\n",
        f"{where}/memory.usage_in_bytes": f"{usage}\n",
        f"{where}/memory.stat": f"inactive_file 7\ntotal_inactive_file {droppable}\n",
    }


def v2(path: str, groups: dict[str, tuple[str, int, int]]) -> dict[str, str]:
    files = {
        "proc/self/cgroup": f"0::{path}\n",
        "proc/self/mountinfo": V2_MOUNTS.format(top="/"),
    }
    for group, (limit, usage, droppable) in groups.items():
        files |= {
            f"sys/fs/cgroup{group}/memory.max": f"{limit}\n",
            f"sys/fs/cgroup{group}/memory.current": f"{usage}\n",
            f"sys/fs/cgroup{group}/memory.stat": f"anon 5\ninactive_file {droppable}\n",
        }
    return files


def test_without_limits_the_room_is_what_is_free(tmp_path: Path) -> None:
    assert main_memory(fake_root(tmp_path, {})) == Room(8 * GIB, "free main memory")


def test_a_group_of_version_1_limits(tmp_path: Path) -> None:
    files = v1("/user/job", "/", "/user/job", 2 * GIB, GIB, GIB // 4)
    room = main_memory(fake_root(tmp_path, files))
    assert room == Room(2 * GIB - GIB * 3 // 4, "memory.limit_in_bytes of 2,147,483,648 B")


def test_no_limit_of_version_1_is_none(tmp_path: Path) -> None:
    files = v1("/user", "/", "/user", 9223372036854771712, GIB, 0)
    assert main_memory(fake_root(tmp_path, files)).nbytes == 8 * GIB


def test_a_parent_of_version_1_limits_too(tmp_path: Path) -> None:
    files = v1("/user/job", "/", "/user", 3 * GIB, GIB, 0)
    assert main_memory(fake_root(tmp_path, files)).nbytes == 2 * GIB


@pytest.mark.parametrize(
    ("path", "top"),
    [("/docker/abc", "/docker/abc"), ("/docker/abc", "/"), ("/docker/abc/job", "/docker/abc")],
    ids=["bind mount", "foreign path", "below the mount"],
)
def test_in_a_container_the_mount_is_the_group(path: str, top: str, tmp_path: Path) -> None:
    files = v1(path, top, "", GIB, GIB // 2, 0)
    assert main_memory(fake_root(tmp_path, files)).nbytes == GIB // 2


def test_groups_of_version_2_limit_at_every_level(tmp_path: Path) -> None:
    groups = {
        "/a": ("max", 3 * GIB, 0),
        "/a/b": (str(4 * GIB), 3 * GIB, GIB),
        "/a/b/c": (str(5 * GIB), GIB, 0),
    }
    room = main_memory(fake_root(tmp_path, v2("/a/b/c", groups)))
    assert room == Room(2 * GIB, "memory.max of 4,294,967,296 B")


def test_a_group_beyond_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = v2("/a", {"/a": (str(GIB), 2 * GIB, 0)})
    assert main_memory(fake_root(tmp_path, files)).nbytes == 0


def test_own_limits_count_what_is_already_taken(tmp_path: Path) -> None:
    limits = (
        f"Max data size             {2 * GIB}           unlimited            bytes     \n"
        f"Max address space         {4 * GIB}           unlimited            bytes     \n"
    )
    room = main_memory(fake_root(tmp_path, {"proc/self/limits": limits}))
    assert room == Room(2 * GIB - GIB // 2, "RLIMIT_DATA of 2,147,483,648 B")


def test_the_process_s_real_limit_is_seen() -> None:
    # The child limits itself: a process with JAX's threads must not fork.
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({3 * GIB}, -1))\n"
        "from memsched.detection.memory_limits import main_memory; print(main_memory().limit)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.startswith("RLIMIT_DATA of 3,221,225,472 B"), done.stderr


def test_without_proc_the_system_is_asked(tmp_path: Path) -> None:
    room = main_memory(tmp_path)
    assert room.limit == "free main memory"
    assert room.nbytes > 0


def test_a_sixteenth_and_the_reserve_are_kept() -> None:
    assert plannable(Room(16 * GIB, "x"), "device", RESERVE_BYTES) == 15 * GIB - (256 << 20)


def test_too_little_memory_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(DoesNotFitError, match=r"memory\.max .* leaves 104,857,600 B") as caught:
        plannable(Room(100 << 20, "memory.max of 200 B"), "device", RESERVE_BYTES)
    assert caught.value.smallest == {"device": BLOCK_BYTES}
    least = int(str(caught.value).partition("; ")[2].partition(" B")[0].replace(",", ""))
    assert plannable(Room(least, "x"), "device", RESERVE_BYTES) >= BLOCK_BYTES
    with pytest.raises(DoesNotFitError):
        plannable(Room(least - 8192, "x"), "device", RESERVE_BYTES)


def test_here_main_memory_is_the_device(tmp_path: Path) -> None:
    root = fake_root(tmp_path / "root", {})
    machine = detect(tmp_path, measure_s=0.0, root=root)
    assert (machine.platform, machine.device_is_host) == ("cpu", True)
    assert machine.tier("device").capacity_bytes == 8 * GIB - 8 * GIB // 16 - RESERVE_BYTES
    assert machine.compute.threads == len(os.sched_getaffinity(0))
    write_machine(machine, tmp_path / "here.toml")
    assert load_machine(tmp_path / "here.toml") == machine


def test_here_rates_are_measured(tmp_path: Path) -> None:
    machine = detect(tmp_path, measure_s=0.02)
    free = free_bytes(tmp_path)
    assert machine.tier("nvme").capacity_bytes == pytest.approx(free * 15 / 16, rel=0.1)
    # Nothing that runs this is slower than this, or faster than that.
    assert 1e6 < machine.links[0].bytes_per_s < 1e12
    assert 1e8 < machine.compute.flops_per_s < 1e16
    assert 1e8 < machine.compute.bytes_per_s < 1e14
    assert 0 < machine.compute.latency_s < 1
    assert list(tmp_path.iterdir()) == []
    assert detect(tmp_path, measure_s=0.02).compute == machine.compute, "measured twice"


def accelerator(**stats: int) -> SimpleNamespace:
    return SimpleNamespace(
        platform="gpu", device_kind="some card", memory_stats=lambda: stats or None
    )


def test_an_accelerator_has_three_tiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = accelerator(bytes_limit=6 * GIB, bytes_in_use=2 * GIB)
    monkeypatch.setattr(jax, "local_devices", lambda: [card])
    machine = detect(tmp_path, measure_s=0.0, root=fake_root(tmp_path / "root", {}))
    assert [tier.name for tier in machine.tiers] == ["device", "host", "nvme"]
    assert machine.tier("device").capacity_bytes == 4 * GIB * 15 // 16
    assert machine.tier("host").capacity_bytes == 8 * GIB - 8 * GIB // 16 - RESERVE_BYTES
    write_machine(machine, tmp_path / "there.toml")
    assert load_machine(tmp_path / "there.toml") == machine


def test_a_device_that_hides_its_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "local_devices", lambda: [accelerator()])
    with pytest.raises(ProgramError, match="some card"):
        detect(tmp_path, measure_s=0.0)


def test_transfers_are_measured_between_memory_kinds() -> None:
    rates = measure_transfers(jax.local_devices()[0], seconds=0.0)
    assert 1e6 < rates.to_device_bytes_per_s < 1e13
    assert 1e6 < rates.to_host_bytes_per_s < 1e13


def test_a_negative_time_is_refused() -> None:
    with pytest.raises(ProgramError, match="-1"):
        detect(measure_s=-1.0)


def test_a_disk_without_direct_reads_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(file: int, command: int, flags: int = 0) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return 0

    monkeypatch.setattr(disk_rate.fcntl, "fcntl", refusing)
    rate = measure_disk(tmp_path, seconds=0.01)
    assert not rate.direct
    assert rate.read_bytes_per_s > 1e6
    assert rate.write_bytes_per_s > 1e6
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere: No such file"):
        measure_disk(tmp_path / "nowhere", seconds=0.01)


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_rate, "free_bytes", lambda directory: 31 << 20)
    with pytest.raises(StoreError, match="less than 33,554,432 B free"):
        measure_disk(tmp_path, seconds=0.01)


def test_a_write_error_names_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(file: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", failing)
    with pytest.raises(StoreError, match=r"No space left .*another one"):
        measure_disk(tmp_path, seconds=0.01)
    assert list(tmp_path.iterdir()) == []


MACHINE = Machine(
    "m", "cpu", (Tier("device", 1000, 1000, 64), Tier("nvme", 1000, 1000)), (), Compute(1.0, 1.0)
)


def test_limits_replace_capacities() -> None:
    limited = with_limits(MACHINE, {"device": 640, "nvme": 0})
    assert [tier.capacity_bytes for tier in limited.tiers] == [640, 0]


def test_a_limit_of_a_tier_that_is_not_there_is_refused() -> None:
    with pytest.raises(ProgramError, match="computes in main memory"):
        with_limits(MACHINE, {"host": 640})
