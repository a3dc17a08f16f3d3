"""Entries of a prompt cache: whole, checked, private, bounded; nothing in them is believed."""

import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import ml_dtypes
import numpy as np
import pytest

from qwen3vl_jax.errors import BadInputError, StorageError, UsageError
from qwen3vl_jax.prompt_files import LEFT_BEHIND_S, MAGIC, Entries, Form

ROOM = 1 << 20
ARRAYS = (
    np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    np.arange(10, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(5, 2),
)
FORMS: tuple[Form, ...] = tuple((array.shape, array.dtype) for array in ARRAYS)
FILE_BYTES = 8 + 32 + 2 * 4 + 96 + 20


def key(digit: str) -> str:
    return digit * 64


def wrote(entries: Entries, *keys: str) -> None:
    """Entries, each used later than the one before."""
    for index, name in enumerate(keys):
        assert entries.write(name, FORMS, ARRAYS) == FILE_BYTES
        moment = time.time_ns() + index * 1_000_000_000
        os.utime(entries.directory / f"{name}.kv", ns=(moment, moment))


def there(entries: Entries, keys: Sequence[str]) -> list[bool]:
    return [entries.has(name, FORMS) for name in keys]


def test_what_was_written_is_read_and_lies_as_documented(tmp_path: Path) -> None:
    entries = Entries(tmp_path / "cache", ROOM)
    wrote(entries, key("a"))
    for found, array in zip(entries.read(key("a"), FORMS), ARRAYS, strict=True):
        assert (found.shape, found.dtype) == (array.shape, array.dtype)
        assert found.tobytes() == array.tobytes()
    sums = [google_crc32c.value(array.tobytes()).to_bytes(4, "little") for array in ARRAYS]
    wanted = MAGIC + b"\xaa" * 32 + b"".join(sums) + b"".join(a.tobytes() for a in ARRAYS)
    assert (entries.directory / f"{key('a')}.kv").read_bytes() == wanted


def test_nobody_else_can_read_them(tmp_path: Path) -> None:
    entries = Entries(tmp_path / "cache", ROOM)
    wrote(entries, key("a"))
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "cache").iterdir()]
    assert ((tmp_path / "cache").stat().st_mode & 0o777, modes) == (0o700, [0o600])


def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(UsageError, match=r"mode 777; it must be yours .* chmod 700"):
        Entries(tmp_path, ROOM)


def test_a_place_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot make the prompt cache"):
        Entries(tmp_path / "file", ROOM)


@pytest.mark.parametrize(
    ("at", "says"),
    [
        (0, "does not begin with its own name"),
        (20, "does not begin with its own name"),
        (41, r"damaged between bytes 48 and 144: CRC-32C"),
        (100, r"damaged between bytes 48 and 144: CRC-32C"),
        (FILE_BYTES - 1, r"damaged between bytes 144 and 164: CRC-32C"),
    ],
    ids=["magic", "key", "checksum", "first array", "last byte"],
)
def test_a_changed_byte_is_noticed_wherever_it_is(tmp_path: Path, at: int, says: str) -> None:
    entries = Entries(tmp_path, ROOM)
    wrote(entries, key("a"))
    path = tmp_path / f"{key('a')}.kv"
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=says):
        list(entries.read(key("a"), FORMS))


@pytest.mark.parametrize("nbytes", [0, 47, FILE_BYTES - 1, FILE_BYTES + 1])
def test_an_entry_of_another_size_is_none(tmp_path: Path, nbytes: int) -> None:
    entries = Entries(tmp_path, ROOM)
    wrote(entries, key("a"))
    path = tmp_path / f"{key('a')}.kv"
    path.write_bytes((path.read_bytes() + b"\0")[:nbytes])
    assert not entries.has(key("a"), FORMS)
    with pytest.raises(BadInputError, match=rf"has {nbytes} B, wanted {FILE_BYTES} B"):
        list(entries.read(key("a"), FORMS))


def test_a_link_in_the_place_of_an_entry_is_not_followed(tmp_path: Path) -> None:
    entries = Entries(tmp_path / "cache", ROOM)
    wrote(entries, key("a"))
    path = entries.directory / f"{key('a')}.kv"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert not entries.has(key("a"), FORMS)
    with pytest.raises(BadInputError, match="symbolic link"):
        list(entries.read(key("a"), FORMS))


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    entries = Entries(tmp_path, 3 * FILE_BYTES)
    keys = [key(digit) for digit in "abcd"]
    wrote(entries, *keys[:3])
    os.utime(tmp_path / f"{keys[1]}.kv", ns=(1, 1))
    os.utime(tmp_path / f"{keys[0]}.kv", ns=(2, 2))
    entries.touch([keys[1]])
    entries.write(keys[3], FORMS, ARRAYS)
    assert there(entries, keys) == [False, True, True, True]
    assert entries.used_bytes == 3 * FILE_BYTES


def test_of_a_chain_the_end_goes_first(tmp_path: Path) -> None:
    entries = Entries(tmp_path, 2 * FILE_BYTES)
    wrote(entries, key("b"), key("a"))
    entries.touch([key("a"), key("b")])
    entries.write(key("c"), FORMS, ARRAYS)
    assert there(entries, [key("a"), key("b"), key("c")]) == [True, False, True]


def test_what_is_larger_than_all_of_the_space_is_not_kept_and_removes_nothing(
    tmp_path: Path,
) -> None:
    entries = Entries(tmp_path, FILE_BYTES)
    wrote(entries, key("a"))
    large = np.zeros(FILE_BYTES, np.uint8)
    assert entries.write(key("b"), [(large.shape, large.dtype)], [large]) == 0
    assert there(entries, [key("a")]) == [True]


def test_foreign_files_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(bytes(10 * FILE_BYTES))
    entries = Entries(tmp_path, FILE_BYTES)
    wrote(entries, key("a"), key("b"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{key('b')}.kv", "notes.txt"]


def test_a_full_disk_leaves_nothing_of_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = Entries(tmp_path, ROOM)
    write, calls = os.pwrite, []

    def full(*arguments: object) -> int:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match="No space left on device; free some space"):
        entries.write(key("a"), FORMS, ARRAYS)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_an_hour_later(tmp_path: Path) -> None:
    for name, age_s in ((".old.part", LEFT_BEHIND_S + 60), (".new.part", 0.0)):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    Entries(tmp_path, ROOM)
    assert [path.name for path in tmp_path.iterdir()] == [".new.part"]
