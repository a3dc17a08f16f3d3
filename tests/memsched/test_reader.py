"""memsched.stores.reader: the bytes of files, exactly, or an error that names array and file."""

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import tensorstore
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memsched.errors import DamagedError, ProgramError, StoreError
from memsched.stores.blocks import Block, StoredArray, pieces
from memsched.stores.reader import Reader

RNG = np.random.default_rng(3)
CANARY = 0xA5
WAIT_S = 30


@pytest.fixture
def reader() -> Iterator[Reader]:
    made = Reader(queue_depth=4)
    yield made
    made.close()


def content(nbytes: int) -> bytes:
    return RNG.integers(0, 256, nbytes, dtype=np.uint8).tobytes()


def chunk(path: Path, payload: bytes, *, before: bytes = b"") -> Path:
    """A file with a payload and its checksum."""
    path.write_bytes(before + payload + google_crc32c.value(payload).to_bytes(4, "little"))
    return path


def stored_in_chunks(folder: Path, sizes: Sequence[int]) -> tuple[StoredArray, bytes]:
    payloads = [content(size) for size in sizes]
    blocks = [
        Block(chunk(folder / f"c.{i}", payload), 0, len(payload), len(payload), crc32c=True)
        for i, payload in enumerate(payloads)
    ]
    return StoredArray(sum(sizes), tuple(blocks)), b"".join(payloads)


def target_of(nbytes: int, shift: int = 0) -> np.ndarray:
    """Memory `shift` bytes behind a page boundary."""
    return np.frombuffer(mmap.mmap(-1, nbytes + shift + 1), np.uint8)[shift : shift + nbytes]


def read(reader: Reader, stored: StoredArray, shift: int = 0) -> bytes:
    target = target_of(stored.nbytes, shift)
    reader.read("w", stored, target).result(WAIT_S)
    return target.tobytes()


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without O_DIRECT."""
    real = os.open

    def refusing(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)


LAYOUT = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 7, 512, 4096, 5000, 8192]),
        st.sampled_from([1, 4, 100, 512, 4096, 4608, 12288, 20000, 70000]),
        st.sampled_from([0, 0, 1, 512, 6000, 90000]),
        st.booleans(),
    ),
    min_size=1,
    max_size=5,
)


@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    layout=LAYOUT,
    shift=st.sampled_from([0, 64, 512, 4096, 4097]),
    block_bytes=st.sampled_from([4096, 16384, 4 << 20]),
    direct=st.booleans(),
)
def test_any_layout_reads_as_the_files_say_and_nothing_else_is_written(
    tmp_path: Path,
    layout: list[tuple[int, int, int, bool]],
    shift: int,
    block_bytes: int,
    direct: bool,
) -> None:
    blocks, wanted = [], b""
    for index, (offset, used, padding, checked) in enumerate(layout):
        payload = content(used + padding)
        path = chunk(tmp_path / f"f{index}", payload, before=content(offset))
        blocks.append(Block(path, offset, used + padding, used, crc32c=checked))
        wanted += payload[:used]
    stored = StoredArray(len(wanted), tuple(blocks))
    around = np.full(shift + len(wanted) + 9000, CANARY, np.uint8)
    start = -around.ctypes.data % 4096 + shift if shift < 4096 else shift
    reader = Reader(3, block_bytes)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if not direct:
            refuse_direct(monkeypatch)
        reader.record("w", stored)
        reader.read("w", stored, around[start : start + len(wanted)]).result(WAIT_S)
    reader.close()
    assert around[start : start + len(wanted)].tobytes() == wanted
    assert np.all(around[:start] == CANARY)
    assert np.all(around[start + len(wanted) :] == CANARY)
    assert (
        len(wanted)
        <= reader.read_bytes
        <= sum(b.nbytes + 3 * 4096 for b in blocks)
        + 3 * len(list(pieces(stored, block_bytes))) * 4096
    )


def test_a_zarr_array_that_tensorstore_wrote_is_read_where_it_lies(
    tmp_path: Path, reader: Reader
) -> None:
    values = RNG.integers(0, 2**16, (1000, 96), dtype=np.uint16)
    rows = 300
    tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{tmp_path}/"},
            "metadata": {
                "shape": [1000, 96],
                "data_type": "uint16",
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [rows, 96]}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
                "codecs": [
                    {"name": "bytes", "configuration": {"endian": "little"}},
                    {"name": "crc32c"},
                ],
            },
            "create": True,
        }
    ).result().write(values).result()
    row_bytes = 96 * 2
    blocks = tuple(
        Block(tmp_path / f"c.{i}.0", 0, rows * row_bytes, used * row_bytes, crc32c=True)
        for i, used in enumerate([300, 300, 300, 100])
    )
    assert read(reader, StoredArray(values.nbytes, blocks)) == values.tobytes()


def resident_pages(path: Path) -> int:
    """How many pages of a file the page cache holds."""
    size = path.stat().st_size
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=2)
    seen = (ctypes.c_ubyte * (-(-size // 4096)))()
    place = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    library = ctypes.CDLL(None, use_errno=True)
    assert library.mincore(ctypes.c_void_p(place), ctypes.c_size_t(size), seen) == 0
    return sum(page & 1 for page in seen)


@pytest.mark.parametrize("direct", [True, False])
def test_the_page_cache_is_not_filled(
    tmp_path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    stored, wanted = stored_in_chunks(tmp_path, [4 << 20, 4 << 20])
    for block in stored.blocks:
        with block.path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if sum(resident_pages(block.path) for block in stored.blocks):
        pytest.skip("this file system keeps its pages")
    if not direct:
        refuse_direct(monkeypatch)
    assert read(reader, stored) == wanted
    assert sum(resident_pages(block.path) for block in stored.blocks) <= 64
    assert reader.direct == direct
    assert reader.cached_bytes == (0 if direct else reader.read_bytes)


def preadv_that(monkeypatch: pytest.MonkeyPatch, act: Callable[..., int]) -> None:
    """Replace os.preadv by `act(real, descriptor, parts, offset)`."""
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: act(real, *arguments))


@pytest.mark.parametrize("most", [1024, 512 * 3, 1000, 4097])
@pytest.mark.parametrize("shift", [0, 64])
def test_short_reads_are_finished(
    tmp_path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch, most: int, shift: int
) -> None:
    def short(real: Any, descriptor: int, parts: list[np.ndarray], offset: int) -> int:
        # What a signal or a busy network file system may do: less than was asked for.
        return int(real(descriptor, [parts[0][:most]], offset))

    stored, wanted = stored_in_chunks(tmp_path, [4096 * 3, 10_000])
    preadv_that(monkeypatch, short)
    assert read(reader, stored, shift) == wanted


def test_a_file_system_that_refuses_only_the_direct_read_is_read_through_the_cache(
    tmp_path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def refusing(real: Any, descriptor: int, parts: list[np.ndarray], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "not aligned enough")
        return int(real(descriptor, parts, offset))

    stored, wanted = stored_in_chunks(tmp_path, [4096 * 3, 10_000])
    preadv_that(monkeypatch, refusing)
    assert read(reader, stored) == wanted
    assert not reader.direct


@pytest.mark.parametrize("failing", range(1, 6))
def test_a_read_error_names_array_and_file_and_later_reads_work(
    tmp_path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    calls: list[int] = []

    def broken(real: Any, descriptor: int, parts: list[np.ndarray], offset: int) -> int:
        calls.append(offset)
        if len(calls) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return int(real(descriptor, parts, offset))

    stored, wanted = stored_in_chunks(tmp_path, [4096] * 5)
    preadv_that(monkeypatch, broken)
    with pytest.raises(StoreError, match=r"'w' cannot be read from .*c\.\d: Input/output error"):
        read(reader, stored)
    assert read(reader, stored) == wanted


@pytest.mark.parametrize("damaged", [False, True])
def test_requests_of_one_chunk_are_under_way_together_and_it_is_checked_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    stored, wanted = stored_in_chunks(tmp_path, [3 * 4096])
    together = threading.Barrier(3)

    def waiting(real: Any, descriptor: int, parts: list[np.ndarray], offset: int) -> int:
        together.wait(WAIT_S)
        return int(real(descriptor, parts, offset))

    if damaged:
        path = stored.blocks[0].path
        found = path.read_bytes()
        path.write_bytes(bytes([found[0] ^ 1]) + found[1:])
    preadv_that(monkeypatch, waiting)
    reader = Reader(3, block_bytes=4096)
    if damaged:
        with pytest.raises(DamagedError, match="is damaged"):
            read(reader, stored)
    else:
        assert read(reader, stored) == wanted
    reader.close()


def test_after_an_error_the_rest_of_the_array_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def broken(real: Any, descriptor: int, parts: list[np.ndarray], offset: int) -> int:
        calls.append(offset)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    stored, _ = stored_in_chunks(tmp_path, [512] * 20)
    preadv_that(monkeypatch, broken)
    reader = Reader(1)
    with pytest.raises(StoreError, match="Input/output error"):
        read(reader, stored)
    reader.close()
    assert len(calls) == 1


def test_every_flipped_bit_is_found(tmp_path: Path, reader: Reader) -> None:
    payload = content(5000)
    path = chunk(tmp_path / "c.0", payload)
    stored = StoredArray(4000, (Block(path, 0, 5000, 4000, crc32c=True),))
    good = path.read_bytes()
    for place in [0, 511, 512, 3999, 4000, 4999, 5000, 5003, *RNG.integers(0, 5004, 40)]:
        bad = bytearray(good)
        bad[place] ^= 1 << int(place) % 8
        path.write_bytes(bad)
        fresh = Reader(1)
        with pytest.raises(DamagedError, match=r"'w': .*c\.0 at byte 0 is damaged: its crc32c is"):
            read(fresh, stored)
        fresh.close()
    path.write_bytes(good)
    assert read(reader, stored) == payload[:4000]


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("left", [0, 1, 512, 4096, 12_288, 12_291])
def test_a_cut_file_is_refused(tmp_path: Path, reader: Reader, left: int, recorded: bool) -> None:
    stored, _ = stored_in_chunks(tmp_path, [12_288])
    os.truncate(stored.blocks[0].path, left)
    with pytest.raises(DamagedError, match=rf"'w': .*c\.0 ends at byte {left:,}, wanted 12,292"):
        reader.record("w", stored) if recorded else read(reader, stored)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_missing_file_and_one_that_is_no_file_are_refused(
    tmp_path: Path, reader: Reader, recorded: bool
) -> None:
    def look(path: Path) -> None:
        stored = StoredArray(8, (Block(path, 0, 8, 8, crc32c=False),))
        reader.record("w", stored) if recorded else read(reader, stored)

    with pytest.raises(DamagedError, match=r"'w': .*nothing is missing"):
        look(tmp_path / "nothing")
    with pytest.raises(DamagedError, match=r"'w': .* is no regular file"):
        look(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DamagedError, match=r"'w': .*pipe is no regular file"):
        look(tmp_path / "pipe")


def changed(path: Path, how: str) -> None:
    match how:
        case "rewritten":
            status = path.stat()
            path.write_bytes(path.read_bytes())
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        case "replaced":
            other = path.with_name("other")
            other.write_bytes(path.read_bytes())
            os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
            other.rename(path)
        case "grown":
            status = path.stat()
            with path.open("ab") as file:
                file.write(b"x")
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("how", ["rewritten", "replaced", "grown"])
def test_a_file_that_changed_since_opening_is_refused(
    tmp_path: Path, reader: Reader, how: str
) -> None:
    stored, _ = stored_in_chunks(tmp_path, [4096, 4096])
    reader.record("w", stored)
    changed(stored.blocks[1].path, how)
    with pytest.raises(DamagedError, match=r"'w': .*c\.1 is not the file that was opened"):
        read(reader, stored)


def test_a_change_while_a_block_without_checksum_is_read_is_noticed(
    tmp_path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content(9000))

    def slow(real: Any, descriptor: int, parts: list[np.ndarray], offset: int) -> int:
        count = int(real(descriptor, parts, offset))
        changed(path, "rewritten")
        return count

    preadv_that(monkeypatch, slow)
    with pytest.raises(DamagedError, match="is not the file that was opened"):
        read(reader, StoredArray(8000, (Block(path, 100, 8000, 8000, crc32c=False),)))


def test_blocks_begin_in_the_order_of_the_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real = os.open

    def noting(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        order.append(Path(path).name)
        return real(path, flags, *rest, **more)

    stored, wanted = stored_in_chunks(tmp_path, [512] * 20)
    reader = Reader(1)
    monkeypatch.setattr(os, "open", noting)
    arrays = [StoredArray(512, (block,)) for block in stored.blocks]
    targets = [target_of(512) for _ in arrays]
    futures = [reader.read(str(i), array, targets[i]) for i, array in enumerate(arrays)]
    for future in futures:
        future.result(WAIT_S)
    monkeypatch.undo()
    reader.close()
    assert [name for name in order if name.startswith("c.")] == [f"c.{i}" for i in range(20)]
    assert b"".join(target.tobytes() for target in targets) == wanted


def test_closing_ends_all_threads_and_fails_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, _ = stored_in_chunks(tmp_path, [512] * 50)
    begun, go_on = threading.Event(), threading.Event()

    def waiting(real: Any, descriptor: int, parts: list[np.ndarray], offset: int) -> int:
        begun.set()
        assert go_on.wait(WAIT_S)
        return int(real(descriptor, parts, offset))

    preadv_that(monkeypatch, waiting)
    reader = Reader(2)
    future = reader.read("w", stored, target_of(stored.nbytes))
    assert begun.wait(WAIT_S)
    closing = threading.Thread(target=reader.close)
    closing.start()
    assert not future.done(), "the system may still write into the target"
    go_on.set()
    closing.join(WAIT_S)
    with pytest.raises(StoreError, match="closed before its work was done"):
        future.result(WAIT_S)
    with pytest.raises(StoreError, match="the read store is closed"):
        reader.read("w", stored, target_of(stored.nbytes))
    assert not [thread for thread in threading.enumerate() if "memsched-read" in thread.name]


def test_a_target_that_does_not_fit_is_refused(tmp_path: Path, reader: Reader) -> None:
    stored, _ = stored_in_chunks(tmp_path, [512])
    frozen = target_of(512)
    frozen.flags.writeable = False
    for target in (target_of(511), target_of(1024)[::2], target_of(512).reshape(2, 256), frozen):
        with pytest.raises(ProgramError, match="'w': 512 B cannot be read into uint8 of shape"):
            reader.read("w", stored, target)


def test_an_empty_array_is_read_at_once(reader: Reader) -> None:
    assert reader.read("w", StoredArray(0, ()), target_of(0)).done()


def test_blocks_that_make_no_sense_are_refused() -> None:
    for offset, nbytes, used in [(-1, 4, 4), (0, 4, 5), (0, 4, 0)]:
        with pytest.raises(ProgramError, match="wanted 0 <= offset"):
            Block(Path("f"), offset, nbytes, used, crc32c=False)
    with pytest.raises(ProgramError, match="stored array of 5 B has blocks of 4 B"):
        StoredArray(5, (Block(Path("f"), 0, 4, 4, crc32c=False),))
