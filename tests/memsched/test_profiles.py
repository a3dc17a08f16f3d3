"""Machines in TOML files: the five that come along, and every rule for writing another."""

import dataclasses
from pathlib import Path

import pytest

from memsched.errors import MemschedError, ProgramError, StoreError
from memsched.machine import Compute, Link, Machine, Tier
from memsched.profiles import load_machine, write_machine

PROFILES = sorted((Path(__file__).parents[2] / "configs" / "machines").glob("*.toml"))

TINY = """
name = "tiny"
platform = "cpu"
[compute]
flops_per_s = 1e9
bytes_per_s = 2e9
threads = 3
[[tiers]]
name = "device"
capacity_bytes = "1.5KiB"
alignment_bytes = 128
[[tiers]]
name = "nvme"
capacity_bytes = 4096
max_array_bytes = "1kB"
[[links]]
source = "nvme"
target = "device"
bytes_per_s = 100
latency_s = 0.5
block_bytes = "8KiB"
queue_depth = 7
[[links]]
source = "device"
target = "nvme"
bytes_per_s = 50.5
"""

TINY_MACHINE = Machine(
    name="tiny",
    platform="cpu",
    tiers=(Tier("device", 1536, 1 << 60, 128), Tier("nvme", 4096, 1000)),
    links=(
        Link("nvme", "device", 100.0, 0.5, 8192, 7),
        Link("device", "nvme", 50.5),
    ),
    compute=Compute(1e9, 2e9, threads=3),
)


def written(directory: Path, text: str) -> Path:
    path = directory / "machine.toml"
    path.write_text(text)
    return path


def test_a_file_says_exactly_its_machine(tmp_path: Path) -> None:
    assert load_machine(written(tmp_path, TINY)) == TINY_MACHINE


def test_there_are_five_profiles() -> None:
    assert [path.stem for path in PROFILES] == [
        "desktop-24gb",
        "h200",
        "i5-10210u-sm61-nvme",
        "laptop-cpu",
        "tpu-v5e-host",
    ]


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_profile_is_named_after_its_file_and_reads_back(path: Path, tmp_path: Path) -> None:
    machine = load_machine(path)
    assert machine.name == path.stem
    assert machine.device_is_host == (machine.platform == "cpu")
    write_machine(machine, tmp_path / "again.toml")
    assert load_machine(tmp_path / "again.toml") == machine


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_rate_of_a_profile_says_where_it_comes_from(path: Path) -> None:
    physical = ("_per_s =", "latency_s =", "capacity_bytes =")
    for line in path.read_text().splitlines():
        if any(word in line for word in physical):
            comment = line.partition("#")[2]
            known = ("data sheet", "assumed", "as above", "CUDA")
            assert any(word in comment for word in known), line


def test_the_laptop_of_the_predecessor_keeps_its_figures() -> None:
    machine = load_machine(PROFILES[2])
    device, disk = machine.tier("device"), machine.link("nvme", "host")
    assert machine.compute.threads == 4
    assert (device.alignment_bytes, device.max_array_bytes) == (64, 512 << 20)
    assert machine.compute.shared_bytes_per_block == 48 << 10
    assert machine.compute.threads_per_block == 1024
    assert disk is not None
    assert (disk.block_bytes, disk.queue_depth) == (4 << 20, 32)
    assert all(tier.alignment_bytes % 64 == 0 for tier in machine.tiers)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("flops_per_s = 1e9", "flops_per_sec = 1e9", r"compute\.flops_per_sec .*'flops_per_s'"),
        ("flops_per_s = 1e9", "", r"compute\.flops_per_s is missing"),
        ("flops_per_s = 1e9", "flops_per_s = inf", r"compute\.flops_per_s .*inf"),
        ("flops_per_s = 1e9", "flops_per_s = nan", r"compute\.flops_per_s .*nan"),
        ("flops_per_s = 1e9", "flops_per_s = true", r"compute\.flops_per_s .*True"),
        ("threads = 3", "threads = 3.0", r"compute\.threads must be a whole number"),
        ("threads = 3", "threads = 0", r"compute\.threads .*from 1 to"),
        ("alignment_bytes = 128", "alignment_bytes = 96", r"tiers\[0\]\.alignment_bytes .*power"),
        ("capacity_bytes = 4096", "capacity_bytes = -1", r"tiers\[1\]\.capacity_bytes .*from 0"),
        ("capacity_bytes = 4096", 'capacity_bytes = "4 lots"', "'4 lots'"),
        ('name = "nvme"', 'name = "host"', "tiers must be device, host, nvme"),
        ('name = "nvme"', "name = 3", r"tiers\[1\]\.name"),
        ('name = "tiny"', 'name = "a\\nb"', "name must be a name"),
        ('name = "tiny"', "", "name must be a name"),
        ('platform = "cpu"', 'platform = "abacus"', "platform must be one of"),
        ("bytes_per_s = 50.5", "bytes_per_s = 0", r"links\[1\]\.bytes_per_s"),
        ("queue_depth = 7", "queue_depth = 0", r"links\[0\]\.queue_depth"),
        ('target = "device"', 'target = "nvme"', "links must be device->nvme, nvme->device, once"),
        ("[compute]", "[[compute]]", "compute must be a table"),
        ("[compute]", "colour = 1\n[compute]", "colour is unknown"),
        ("[compute]", "[compute", "not TOML"),
    ],
)
def test_a_broken_file_is_refused_by_its_key(old: str, new: str, says: str, tmp_path: Path) -> None:
    assert TINY.count(old) == 1
    with pytest.raises(ProgramError, match=says):
        load_machine(written(tmp_path, TINY.replace(old, new)))


def test_a_link_twice_is_refused(tmp_path: Path) -> None:
    again = TINY[TINY.rindex("[[links]]") :]
    with pytest.raises(ProgramError, match="once each"):
        load_machine(written(tmp_path, TINY + again))


@pytest.mark.parametrize(
    "body", [b"\xff\xfe", b"name = " + b"[" * 5000, b"#" * (1 << 21)], ids=["bytes", "deep", "long"]
)
def test_a_hostile_file_is_refused(body: bytes, tmp_path: Path) -> None:
    (tmp_path / "machine.toml").write_bytes(body)
    with pytest.raises(ProgramError, match=r"machine\.toml"):
        load_machine(tmp_path / "machine.toml")


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"none\.toml: No such file"):
        load_machine(tmp_path / "none.toml")


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    nameless = dataclasses.replace(TINY_MACHINE, name="")
    with pytest.raises(MemschedError, match="name"):
        write_machine(nameless, tmp_path / "machine.toml")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StoreError, match="no such directory"):
        write_machine(TINY_MACHINE, tmp_path / "missing" / "machine.toml")
