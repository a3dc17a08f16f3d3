"""memsched.stores.spill: what is moved out comes back as it was, or not at all."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memsched.errors import DamagedError, ProgramError, StoreError
from memsched.stores.extents import Extents
from memsched.stores.spill import Spill

RNG = np.random.default_rng(5)
PAGE = 4096
WAIT_S = 30


@pytest.fixture
def spill(tmp_path: Path) -> Iterator[Spill]:
    made = Spill(tmp_path / "scratch", 64 * PAGE, block_bytes=4 * PAGE)
    yield made
    made.close()


def content(nbytes: int) -> np.ndarray:
    return RNG.integers(0, 256, nbytes, dtype=np.uint8)


def back(spill: Spill, array: str, generation: int, nbytes: int) -> np.ndarray:
    target = np.zeros(nbytes, np.uint8)
    spill.read(array, generation, target).result(WAIT_S)
    return target


def without_named_files(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A file system that has no O_TMPFILE."""
    real = os.open

    def refusing(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "read", "free"]),
        st.sampled_from("abcde"),
        st.sampled_from([0, 1, 100, PAGE, 3 * PAGE, 5 * PAGE + 17, 20 * PAGE]),
    ),
    max_size=40,
)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(actions=ACTIONS)
def test_it_behaves_as_a_dictionary_of_limited_size(
    tmp_path: Path, actions: list[tuple[str, str, int]]
) -> None:
    spill = Spill(tmp_path, 40 * PAGE, block_bytes=2 * PAGE)
    kept: dict[str, tuple[int, np.ndarray]] = {}
    reads = []
    for generation, (verb, array, nbytes) in enumerate(actions):
        if verb == "write":
            data = content(nbytes)
            kept.pop(array, None)
            room = 40 - sum(-(-old.size // PAGE) for _, old in kept.values())
            if -(-nbytes // PAGE) > room:
                with pytest.raises(StoreError, match=f"'{array}' takes .* raise the nvme space"):
                    spill.write(array, generation, data)
            else:
                spill.write(array, generation, data)
                kept[array] = generation, data
        elif verb == "free":
            spill.free(array)
            kept.pop(array, None)
        elif array in kept:
            target = np.zeros(kept[array][1].size, np.uint8)
            reads.append((spill.read(array, kept[array][0], target), target, kept[array][1]))
        assert spill.used_bytes == sum(-(-old.size // PAGE) * PAGE for _, old in kept.values())
    for future, target, wanted in reads:
        future.result(WAIT_S)
        assert np.array_equal(target, wanted)
    for array, (generation, data) in kept.items():
        assert np.array_equal(back(spill, array, generation, data.size), data)
    spill.close()


def test_nothing_fragments() -> None:
    extents = Extents(10 * PAGE + 5)
    taken = [extents.take(PAGE) for _ in range(10)]
    assert all(piece is not None for piece in taken)
    assert extents.take(PAGE) is None
    for index in (1, 3, 5, 7, 9):
        piece = taken[index]
        assert piece is not None
        extents.give_back(piece)
    scattered = extents.take(5 * PAGE)
    assert scattered is not None
    assert sorted(offset // PAGE for offset, _ in scattered) == [1, 3, 5, 7, 9]


def test_any_dtype_and_shape_comes_back(spill: Spill) -> None:
    arrays = {
        "bf16": RNG.standard_normal((3, 5, 7)).astype(ml_dtypes.bfloat16),
        "f32": RNG.standard_normal((2, 3000)).astype(np.float32),
        "scalar": np.array(7, np.int64),
    }
    for name, array in arrays.items():
        spill.write(name, 1, array)
    for name, array in arrays.items():
        assert back(spill, name, 1, array.nbytes).tobytes() == array.tobytes()


def test_another_generation_or_array_is_refused(spill: Spill) -> None:
    spill.write("kv", 4, content(100))
    with pytest.raises(StoreError, match="'kv', generation 3, is there as 4"):
        back(spill, "kv", 3, 100)
    with pytest.raises(StoreError, match="'vk', generation 4, is not there"):
        back(spill, "vk", 4, 100)
    spill.write("kv", 5, content(100))
    with pytest.raises(StoreError, match="'kv', generation 4, is there as 5"):
        back(spill, "kv", 4, 100)
    spill.free("kv")
    with pytest.raises(StoreError, match="'kv', generation 5, is not there"):
        back(spill, "kv", 5, 100)


def test_what_was_written_is_counted(spill: Spill) -> None:
    spill.write("a", 1, content(3 * PAGE + 1)).result(WAIT_S)
    assert spill.written_bytes == 4 * PAGE
    back(spill, "a", 1, 3 * PAGE + 1)
    assert 3 * PAGE + 1 <= spill.read_bytes <= 4 * PAGE
    assert spill.used_bytes == 4 * PAGE


@pytest.mark.parametrize("flipped", [0, PAGE - 1, 5 * PAGE, 6 * PAGE + 16])
def test_a_flipped_bit_is_found(spill: Spill, flipped: int) -> None:
    data = content(6 * PAGE + 17)
    spill.write("kv", 1, data).result(WAIT_S)
    spill.write("other", 1, data).result(WAIT_S)
    descriptor = spill._file.descriptor
    copy = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
    os.pwrite(copy, bytes([int(data[flipped]) ^ 4]), flipped)
    os.close(copy)
    with pytest.raises(DamagedError, match=r"'kv': the spill file in .* is damaged"):
        back(spill, "kv", 1, data.size)
    assert np.array_equal(back(spill, "other", 1, data.size), data)


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_disk_that_fills_up_later_is_a_clear_error_and_the_others_stay(
    spill: Spill, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    first, second = content(PAGE), content(10 * PAGE)
    spill.write("first", 1, first).result(WAIT_S)
    calls: list[int] = []
    real = os.pwritev

    def full(descriptor: int, parts: list[np.ndarray], offset: int) -> int:
        calls.append(offset)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, parts, offset)

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(
        StoreError, match=r"'second' cannot be written to .*No space left on device"
    ):
        spill.write("second", 1, second).result(WAIT_S)
    with pytest.raises(StoreError, match="'second' cannot be written"):
        back(spill, "second", 1, second.size)
    assert np.array_equal(back(spill, "first", 1, first.size), first)
    spill.write("second", 2, second).result(WAIT_S)
    assert np.array_equal(back(spill, "second", 2, second.size), second)


@pytest.mark.parametrize("most", [512, PAGE, 1000])
def test_short_writes_and_reads_are_finished(
    spill: Spill, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    write, read = os.pwritev, os.preadv
    monkeypatch.setattr(
        os, "pwritev", lambda fd, parts, offset: write(fd, [parts[0][:most]], offset)
    )
    monkeypatch.setattr(os, "preadv", lambda fd, parts, offset: read(fd, [parts[0][:most]], offset))
    data = content(3 * PAGE + 100)
    spill.write("a", 1, data)
    assert np.array_equal(back(spill, "a", 1, data.size), data)


def test_a_full_disk_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = os.statvfs(tmp_path)
    too_much = status.f_blocks * status.f_frsize * 2
    with pytest.raises(StoreError, match=rf"{too_much:,} B cannot be reserved in .*are free there"):
        Spill(tmp_path, too_much)

    def over_quota(*_: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "posix_fallocate", over_quota)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(StoreError, match=r"4,096 B cannot be reserved in .*Disk quota exceeded"):
        Spill(tmp_path, PAGE)
    assert os.listdir("/proc/self/fd") == before
    assert not list(tmp_path.iterdir())


def test_the_space_is_reserved_at_once(tmp_path: Path) -> None:
    spill = Spill(tmp_path, 1 << 20)
    assert os.fstat(spill._file.descriptor).st_blocks * 512 >= 1 << 20
    spill.close()


@pytest.mark.parametrize("number", [None, errno.EOPNOTSUPP, errno.EISDIR])
def test_the_file_is_private_and_has_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    if number is not None:
        without_named_files(monkeypatch, number)
    old = os.umask(0)
    try:
        spill = Spill(tmp_path / "new" / "scratch", PAGE)
    finally:
        os.umask(old)
    status = os.fstat(spill._file.descriptor)
    assert (stat.S_IMODE(status.st_mode), status.st_nlink) == (0o600, 0)
    assert stat.S_IMODE((tmp_path / "new" / "scratch").stat().st_mode) == 0o700
    assert not list((tmp_path / "new" / "scratch").iterdir())
    data = content(PAGE)
    spill.write("a", 1, data)
    assert np.array_equal(back(spill, "a", 1, PAGE), data)
    spill.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(spill._file.descriptor)


def test_without_direct_input_and_output_it_works_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)
    spill = Spill(tmp_path, 64 * PAGE)
    assert not spill.direct
    data = content(5 * PAGE + 3)
    spill.write("a", 1, data)
    assert np.array_equal(back(spill, "a", 1, data.size), data)
    spill.close()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"no file can be made in .*choose another directory"):
        Spill(tmp_path / "file" / "scratch", PAGE)


def test_data_and_targets_of_the_wrong_form_are_refused(spill: Spill) -> None:
    with pytest.raises(ProgramError, match="'a' is not contiguous"):
        spill.write("a", 1, content(100)[::2])
    spill.write("a", 1, content(100))
    for target in (np.zeros(99, np.uint8), np.zeros(200, np.uint8)[::2]):
        with pytest.raises(ProgramError, match="'a': 100 B cannot be read into"):
            spill.read("a", 1, target)


def test_closing_ends_all_threads(tmp_path: Path) -> None:
    spill = Spill(tmp_path, 64 * PAGE)
    spill.write("a", 1, content(PAGE)).result(WAIT_S)
    spill.close()
    assert not [thread for thread in threading.enumerate() if "memsched-spill" in thread.name]
    with pytest.raises(StoreError, match="the spill store is closed"):
        spill.write("b", 1, content(PAGE))


def test_two_processes_and_a_kill_in_the_middle_leave_nothing(tmp_path: Path) -> None:
    source = """
import sys, json, pathlib, numpy as np
from memsched.stores.spill import Spill
spill = Spill(pathlib.Path(sys.argv[1]), 8 << 20, block_bytes=1 << 18)
data = np.frombuffer(np.random.default_rng(int(sys.argv[2])).bytes(1 << 20), np.uint8)
generation = 0
while True:
    future = spill.write("a", generation, data)
    print(json.dumps(generation), flush=True)
    target = np.zeros(1 << 20, np.uint8)
    spill.read("a", generation, target).result()
    assert np.array_equal(target, data)
    generation += 1
"""
    # The directory is made by us: nobody may look into it while it is used.
    directory = tmp_path / "scratch"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", source, directory, str(seed)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        for seed in range(2)
    ]
    for child in children:
        assert child.stdout is not None
        for generation in range(3):
            assert json.loads(child.stdout.readline()) == generation
    for child in children:
        child.send_signal(signal.SIGKILL)
        assert child.wait(WAIT_S) == -signal.SIGKILL
        assert child.stdout is not None
        child.stdout.close()
    assert not list(directory.iterdir())
