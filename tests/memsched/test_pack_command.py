"""`python -m memsched pack`: what it writes, and what it says to files it should not trust."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

import memsched.packing
from memsched.__main__ import main
from memsched.packing import table

ROOT = Path(__file__).parents[2]
GOOD = "id,lower,upper,size\nb1,0,3,4\nb2,3,9,4\nb3,0,9,4\nb4,9,21,4\nb5,0,21,4\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.csv"
    path.write_text(GOOD)
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(*words: str | Path) -> int:
    return main(["pack", *map(str, words), "--seconds", "2"])


def test_the_output_is_the_input_and_an_offset(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = source.with_name("out.csv")
    assert run(source, "--out", out, "--capacity", "12") == 0
    written = rows(out)
    assert [{**row, "offset": ""} for row in written] == [
        {**row, "offset": ""} for row in rows(source)
    ]
    # Packed by hand: b5 is always there, then b3 or b4, then b1 or b2; each fills its 4 bytes.
    offsets = {row["id"]: int(row["offset"]) for row in written}
    assert sorted((offsets["b5"], offsets["b3"], offsets["b1"])) == [0, 4, 8]
    assert sorted((offsets["b5"], offsets["b3"], offsets["b2"])) == [0, 4, 8]
    assert offsets["b4"] in {0, 4, 8} - {offsets["b5"]}
    assert capsys.readouterr() == ("peak 12 B, bound 12 B, fragmentation 0.00%\n", "")


def test_columns_may_come_in_any_order_and_be_aligned(source: Path) -> None:
    source.write_text("\ufeffsize,alignment, id,upper,lower\n5,1,a,2,0\n\n6,4,b,2,0\n", "utf-8")
    out = source.with_name("out.csv")
    assert run(source, "--out", out) == 0
    first, second = rows(out)
    assert list(first) == ["id", "lower", "upper", "size", "alignment", "offset"]
    # Aligned b goes first: behind a it would begin at 8 and end at 14.
    assert (first["offset"], second["offset"]) == ("6", "0")


def test_a_table_without_items_gives_one(source: Path) -> None:
    source.write_text("id,lower,upper,size\n")
    out = source.with_name("out.csv")
    assert run(source, "--out", out) == 0
    assert out.read_text() == "id,lower,upper,size,offset\n"


def test_too_small_a_capacity_is_3_and_writes_nothing(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = source.with_name("out.csv")
    assert run(source, "--out", out, "--capacity", "11") == 3
    assert capsys.readouterr() == (
        "",
        "error: 5 items take 12 B as packed and at least 12 B in any way, but the capacity is "
        "11 B\ngive more capacity\n",
    )
    assert not out.exists()


HEADER = "id,lower,upper,size\n"
BAD = {
    "empty": ("", "line 1: there is no column 'id'"),
    "no size": ("id,lower,upper\na,0,1\n", "line 1: there is no column 'size'"),
    "column twice": ("id,id,lower,upper,size\n", "column 'id' is there twice"),
    "unknown column": ("id,lower,upper,size,gaps\n", "column 'gaps' is not known"),
    "few fields": (HEADER + "a,0,1\n", "line 2 has 3 fields; wanted 4"),
    "many fields": (HEADER + "a,0,1,2,3\n", "line 2 has 5 fields"),
    "no number": (HEADER + "a,0,1,2\nb,0,1,x\n", "line 3: size is 'x'; wanted a whole number"),
    "fraction": (HEADER + "a,0,1,2.5\n", "size is '2.5'"),
    "not finite": (HEADER + "a,0,inf,2\n", "upper is 'inf'"),
    "underscore": (HEADER + "a,0,1_0,2\n", "upper is '1_0'"),
    "foreign digit": (HEADER + "a,0,\u0663,2\n", r"upper is '\u0663'"),
    "no digit": (HEADER + "a,,1,2\n", "lower is ''"),
    "negative time": (HEADER + "a,-1,1,2\n", "lower is '-1'; wanted a whole number, 0 or more"),
    "negative size": (HEADER + "a,0,1,-2\n", "size is '-2'"),
    "large": (HEADER + f"a,0,1,{10**17}\n", "size is 100,000,000,000,000,000; wanted at most"),
    "very large": (HEADER + f"a,0,1,{'9' * 5000}\n", "size is '9999999999"),
    "never alive": (HEADER + "a,3,3,2\n", "item 'a' lives from 3 to 3; upper must be above"),
    "backwards": (HEADER + "a,3,1,2\n", "item 'a' lives from 3 to 1"),
    "id twice": (HEADER + "a,0,1,2\nb,0,1,2\na,5,6,7\n", "line 4: id 'a' was there on line 2"),
    "no id": (HEADER + " ,0,1,2\n", "line 2: the id is empty"),
    "line in id": (HEADER + '"a\nb",3,1,2\n', r"item 'a\nb' lives"),
    "open quote": (HEADER + '"a,0,1,2\n', "unexpected end of data"),
    "alignment 0": ("id,lower,upper,size,alignment\na,0,1,2,0\n", "alignment 0; wanted 1"),
    "long field": (HEADER + "a" * 200_000 + ",0,1,2\n", "field larger than field limit"),
}


@pytest.mark.parametrize(("text", "says"), BAD.values(), ids=BAD)
def test_a_bad_table_is_4_with_a_cause_and_a_way_out(
    source: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    source.write_text(text, "utf-8")
    out = source.with_name("out.csv")
    assert run(source, "--out", out) == 4
    printed, said = capsys.readouterr()
    cause, advice, end = said.split("\n")
    assert says in f"{cause}; {advice}"
    assert cause.startswith(f"error: {source}, line ")
    assert (printed, end) == ("", "")
    assert not out.exists()


def test_bytes_that_are_no_text_are_4(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source.write_bytes(HEADER.encode() + b"\xff,0,1,2\n")
    assert run(source, "--out", source.with_name("out.csv")) == 4
    assert "byte 20 is not UTF-8" in capsys.readouterr().err


def test_huge_tables_are_refused(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = source.with_name("out.csv")
    monkeypatch.setattr(table, "MOST_ITEMS", 4)
    assert run(source, "--out", out) == 4
    assert "has more than 4 items" in capsys.readouterr().err
    monkeypatch.setattr(table, "MOST_BYTES", 30)
    assert run(source, "--out", out) == 4
    assert "has more than 30 B" in capsys.readouterr().err


def test_what_is_no_file_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "/dev/zero", ".", "missing"):
        assert run(tmp_path / name, "--out", tmp_path / "out.csv") == 4
        assert "give a CSV file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["pack"],
        ["unpack"],
        ["pack", "in.csv"],
        ["pack", "in.csv", "--out", "o", "--capacity", "-1"],
        ["pack", "in.csv", "--out", "o", "--capacity", "1e3"],
        ["pack", "in.csv", "--out", "o", "--seconds", "nan"],
        ["pack", "in.csv", "--out", "o", "--seconds", "-1"],
        ["pack", "in.csv", "--out", "o", "--unknown"],
    ],
    ids=lambda words: " ".join(words),
)
def test_wrong_usage_is_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("error: ")
    assert said[1:] == ["see --help for what can be given"]


def test_the_output_takes_the_place_of_a_file_at_once(source: Path) -> None:
    out, link = source.with_name("out.csv"), source.with_name("link.csv")
    out.write_text("old")
    out.chmod(0o640)
    link.symlink_to(out)
    before = out.stat().st_ino
    assert run(source, "--out", link) == 0
    assert len(rows(out)) == 5
    assert out.stat().st_ino != before
    assert out.stat().st_mode & 0o777 == 0o640
    assert link.is_symlink()
    assert sorted(path.name for path in source.parent.iterdir()) == [
        "in.csv",
        "link.csv",
        "out.csv",
    ]


@pytest.mark.parametrize("out", ["/dev/full", "no/such/out.csv", "."])
def test_an_output_that_cannot_be_is_5_before_the_work(
    source: Path, out: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memsched.packing, "pack", None)  # calling it would be a TypeError, code 1
    monkeypatch.chdir(source.parent)
    assert run(source, "--out", out) == 5
    assert capsys.readouterr().err.startswith("error: ")


def test_a_full_disk_leaves_what_was_there(source: Path) -> None:
    out = source.with_name("out.csv")
    out.write_text("old")
    # The child limits itself: a process with JAX's threads must not fork.
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
        "from memsched.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, "pack", str(source), "--out", str(out)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.splitlines()[0] == f"error: {out}: File too large"
    assert out.read_text() == "old"
    assert sorted(path.name for path in source.parent.iterdir()) == ["in.csv", "out.csv"]


def test_an_interrupted_search_is_130_and_writes_nothing(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(memsched.packing, "pack", interrupted)
    assert run(source, "--out", source.with_name("out.csv")) == 130
    assert [path.name for path in source.parent.iterdir()] == ["in.csv"]


def test_help_waits_for_nothing_heavy() -> None:
    code = (
        "import sys; from memsched.__main__ import main; code = main(['pack', '--help']); "
        "print(code, *{'numpy', 'jax', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "0", done.stderr
    assert "--capacity N" in done.stdout
