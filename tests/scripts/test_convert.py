"""scripts/convert.py: round trips bit for bit, exit codes, what the user sees."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoint_factory as factory
import numpy as np
import pytest
import tiny
from converting import SCRIPT, convert, environment, files, nothing_left

from qwen3vl_jax.checkpoints.opening import open_checkpoint
from qwen3vl_jax.config import load_config
from qwen3vl_jax.weights import block_rows, table


def same_weights(first: Path, second: Path) -> bool:
    config = load_config(first)
    with (
        open_checkpoint(first, config) as a,
        open_checkpoint(second, load_config(second)) as b,
    ):
        rows = block_rows(config.text.vocab_size, 2)
        pairs = ((a.read(entry), b.read(entry)) for entry in table(config, vocab_rows=rows))
        return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in pairs)


@pytest.mark.parametrize("layout", ["saved", "released"])
@pytest.mark.parametrize("kind", ["dense", "moe", "mixed"])
@pytest.mark.parametrize(("shards", "dialect", "tied"), [(None, "4", True), (3, "5", False)])
def test_the_way_back_is_exact_to_the_byte(
    tmp_path: Path, kind: str, layout: str, shards: int | None, dialect: str, tied: bool
) -> None:
    settings: dict[str, Any] = {"tied": tied, "dialect": dialect, "dtype": "bfloat16"}
    factory.checkpoint(tmp_path / "hf", kind, layout=layout, shards=shards, **settings)
    assert convert(tmp_path / "hf", tmp_path / "store", "--verify") == 0
    assert convert(tmp_path / "store", tmp_path / "back", "--to-hf", "--verify") == 0
    assert files(tmp_path / "back") == files(tmp_path / "hf")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("name", tiny.STORED)
def test_what_transformers_saved_comes_back_to_the_byte(tmp_path: Path, name: str) -> None:
    assert convert(tiny.DATA / name, tmp_path / "store") == 0
    assert convert(tmp_path / "store", tmp_path / "back", "--to-hf") == 0
    found = files(tmp_path / "back")
    assert found == {file: (tiny.DATA / name / file).read_bytes() for file in found}
    kept = {p.name for p in (tiny.DATA / name).iterdir()} - {"reference.npz"}
    assert found.keys() == kept
    assert convert(tmp_path / "store", "--verify") == 0


@pytest.mark.parametrize("codec", ["int8", "int4", "svd:rank=4"])
def test_an_encoded_store_is_made_and_compared_in_one_call(
    made: Path, codec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(made / "store", made / "small", "--codec", codec, "--verify") == 0
    found = f"{made / 'small'} holds what its codecs make of {made / 'store'}"
    assert capsys.readouterr().out.splitlines()[-1] == found
    sizes = [sum(map(len, files(made / name).values())) for name in ("store", "small")]
    assert sizes[1] < sizes[0]
    assert convert(made / "small", "--verify") == 0
    assert convert(made / "hf", made / "small", "--verify") == 0
    assert convert(made / "small", made / "again", "--codec", codec) == 2
    assert "nothing is encoded twice" in capsys.readouterr().err
    assert convert(made / "hf", made / "same", "--codec", "raw") == 0
    assert files(made / "same") == files(made / "store")


@pytest.mark.parametrize("level", ["balanced", "aggressive"])
def test_codecs_are_chosen_of_any_source_and_compared_in_one_call(
    made: Path, level: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    for source in ("hf", "store"):
        arguments = ("--codec", "auto", "--level", level, "--verify")
        assert convert(made / source, made / f"of_{source}", *arguments) == 0
        out, err = capsys.readouterr()
        holds = f"{made / f'of_{source}'} holds what its codecs make of {made / source}"
        assert out.splitlines() == [holds]
        assert re.fullmatch(
            r"predicted error of the logits: 0\.\d{4} of 0\.\d+", err.splitlines()[-1]
        )
    assert files(made / "of_hf") == files(made / "of_store")
    assert convert(made / "of_hf", made / "again", "--codec", "auto") == 2
    assert "nothing is encoded twice" in capsys.readouterr().err


@pytest.mark.parametrize("dialect", ["4", "5"])
def test_the_way_through_orbax_keeps_every_bit(tmp_path: Path, dialect: str) -> None:
    # Square experts: only the config can tell how they lie, so export and import must agree.
    text = {"moe_intermediate_size": 8, "num_hidden_layers": 1}
    layout = "released" if dialect == "4" else "saved"
    factory.checkpoint(
        tmp_path / "hf", "moe", dtype="bfloat16", layout=layout, dialect=dialect, text=text
    )
    assert convert(tmp_path / "hf", tmp_path / "orbax", "--to-orbax", "--verify") == 0
    assert convert(tmp_path / "orbax", tmp_path / "store", "--verify") == 0
    assert convert(tmp_path / "orbax", tmp_path / "back", "--to-hf", "--verify") == 0
    for name in ("orbax", "store", "back"):
        assert same_weights(tmp_path / "hf", tmp_path / name)
        assert (tmp_path / name / "tokenizer.json").read_bytes()
    assert convert(tmp_path / "store", tmp_path / "again", "--to-orbax", "--verify") == 0
    assert nothing_left(tmp_path)


def test_an_orbax_checkpoint_of_another_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factory.checkpoint(tmp_path / "hf", text={"num_hidden_layers": 1})
    assert convert(tmp_path / "hf", tmp_path / "orbax", "--to-orbax") == 0
    for text, says in (({"num_hidden_layers": 2}, "misses array"), ({"vocab_size": 48}, "wanted")):
        values = factory.config_values(text={"num_hidden_layers": 1} | text)
        (tmp_path / "orbax" / "config.json").write_text(json.dumps(values))
        assert convert(tmp_path / "orbax", tmp_path / "store") == 4
        assert says in capsys.readouterr().err


def test_another_dtype_goes_to_the_store_and_from_there_to_safetensors(tmp_path: Path) -> None:
    tensors = factory.checkpoint(tmp_path / "hf", "moe", shards=2, layout="released")
    wanted = {n: t.astype(factory.DTYPES["bfloat16"]) for n, t in tensors.items()}
    factory.save(tmp_path / "wanted", factory.config_values("moe"), wanted)
    assert convert(tmp_path / "hf", tmp_path / "store", "--dtype", "bfloat16", "--verify") == 0
    assert convert(tmp_path / "store", tmp_path / "back", "--to-hf", "--verify") == 0
    assert same_weights(tmp_path / "wanted", tmp_path / "store")
    assert same_weights(tmp_path / "wanted", tmp_path / "back")
    assert {p.name for p in (tmp_path / "back").iterdir()} == {
        p.name for p in (tmp_path / "hf").iterdir()
    }


def test_help_is_answered_without_heavy_imports() -> None:
    code = (
        "import runpy, sys; sys.argv = ['convert.py', '--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(sorted({'jax', 'numpy', 'rich', 'tensorstore'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--to-orbax" in done.stdout


def test_a_terminal_sees_bytes_rate_and_time_left(tmp_path: Path) -> None:
    factory.checkpoint(tmp_path / "hf")
    ours, theirs = pty.openpty()
    command = [sys.executable, str(SCRIPT), str(tmp_path / "hf"), str(tmp_path / "store")]
    settings = environment(COLUMNS="120", TERM="xterm")
    done = subprocess.run(command, env=settings, stdout=subprocess.PIPE, stderr=theirs, check=True)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:
        pass  # Linux: the other end is closed
    os.close(ours)
    assert all(text in shown for text in (b"converting", b"iB", b"/s", b"0:00:00")), shown
    assert done.stdout.decode() == f"wrote {tmp_path / 'store'}\n"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with a small `hf` and its `store`."""
    factory.checkpoint(tmp_path / "hf", text={"num_hidden_layers": 1}, shards=2)
    assert convert(tmp_path / "hf", tmp_path / "store") == 0
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["SRC"],
        ["SRC", "DST", "--dtype", "int8"],
        ["SRC", "--dtype", "float32", "--verify"],
        ["SRC", "DST", "--to-hf", "--to-orbax"],
        ["SRC", "DST", "--to-hf", "--dtype", "float32"],
        ["SRC", "DST", "--to-hf", "--codec", "int8"],
        ["SRC", "DST", "--to-orbax", "--codec", "int8"],
        ["SRC", "--codec", "int8", "--verify"],
        ["SRC", "DST", "--codec", "auto", "--to-hf"],
        ["SRC", "DST", "--level", "balanced"],
        ["SRC", "DST", "--codec", "int8", "--error-budget", "0.1"],
        ["SRC", "DST", "--calibrate", "prompts.txt"],
        ["SRC", "DST", "--to-hf", "--calibrate", "prompts.txt"],
        ["SRC", "DST", "--codec", "auto", "--level", "reckless"],
        ["SRC", "DST", "--codec", "auto", "--error-budget", "little"],
        ["SRC", "DST", "--nonsense"],
    ],
)
def test_a_wrong_command_line_is_exit_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(*arguments) == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["hf", "store"], "exists"),
        (["store", "new"], "is a store already"),
        (["hf", "new", "--to-hf"], "already"),
        (["hf", "--verify"], "is no store"),
        (["hf", "new", "--codec=int5"], "codec 'int5' is unknown"),
        (["hf", "new", "--codec=bf16", "--dtype=bfloat16"], "make no array smaller"),
        (["store", "new", "--codec=raw"], "is a store already"),
        (["hf", "new", "--codec=auto", "--error-budget=-1"], "error budget must be a number"),
        (["hf", "new", "--codec=svd:rank=4", "--calibrate=FILE"], "codec svd:rank=4 has no scales"),
        (["hf", "new", "--codec=raw", "--calibrate=FILE"], "codec raw has no scales"),
        (["hf", "new", "--codec=int4", "--calibrate=EMPTY"], "empty.txt has no prompt"),
        (["hf", "new", "--codec=auto", "--calibrate=EMPTY"], "empty.txt has no prompt"),
    ],
)
def test_a_conversion_that_makes_no_sense_is_exit_2(
    made: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (made / "prompts.txt").write_text("What is it?\n")
    (made / "empty.txt").write_text("\n  \n")
    for word, name in (("FILE", "prompts.txt"), ("EMPTY", "empty.txt")):
        arguments = [a.replace(word, str(made / name)) for a in arguments]
    before = sorted(made.rglob("*"))
    names = [a if a.startswith("-") else str(made / a) for a in arguments]
    capsys.readouterr()
    assert convert(*names) == 2
    cause, advice = capsys.readouterr().err.splitlines()
    assert says in cause
    assert advice
    assert sorted(made.rglob("*")) == before


def _cut_shard(made: Path) -> list[str]:
    os.truncate(made / "hf" / "model-00001-of-00002.safetensors", 1000)
    return ["hf", "new"]


def _flip_chunk(made: Path) -> list[str]:
    path = made / "store" / "arrays" / "visual.pos_embed.weight" / "c.0.0"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    return ["store", "new", "--to-hf"]


def _flip_chunk_and_verify(made: Path) -> list[str]:
    _flip_chunk(made)
    return ["store", "--verify"]


def _flip_weight_and_verify(made: Path) -> list[str]:
    path = made / "hf" / "model-00001-of-00002.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    return ["hf", "store", "--verify"]


def _no_config(made: Path) -> list[str]:
    (made / "hf" / "config.json").unlink()
    return ["hf", "new"]


def _no_prompts(_: Path) -> list[str]:
    return ["hf", "new", "--codec=int4", "--calibrate=nowhere.txt"]


def _no_directory(_: Path) -> list[str]:
    return ["nowhere", "new"]


@pytest.mark.parametrize(
    "damage",
    [
        _cut_shard,
        _flip_chunk,
        _flip_chunk_and_verify,
        _flip_weight_and_verify,
        _no_config,
        _no_prompts,
        _no_directory,
    ],
)
def test_damaged_input_is_one_line_and_exit_4(
    made: Path, damage: Callable[[Path], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    names = [a if a.startswith("-") else str(made / a) for a in damage(made)]
    capsys.readouterr()
    assert convert(*names) == 4
    cause, advice = capsys.readouterr().err.splitlines()
    assert cause.startswith("error: ")
    assert advice
    assert not (made / "new").exists()
    assert convert(*names, "--debug") == 4
    assert "Traceback" in capsys.readouterr().err


def test_too_little_space_is_noticed_before_anything_is_written(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=7, f_frsize=4096))
    for arguments in (["hf", "new"], ["store", "new", "--to-hf"], ["store", "new", "--to-orbax"]):
        names = [a if a.startswith("-") else made / a for a in arguments]
        assert convert(*names) == 5
        assert "28,672 B free" in capsys.readouterr().err
    assert not (made / "new").exists()


def test_the_values_of_a_store_are_those_of_safetensors(made: Path) -> None:
    """An oracle that shares nothing with our reader: the package of Hugging Face."""
    from safetensors import safe_open

    config = load_config(made / "store")
    with open_checkpoint(made / "store", config) as store:
        for path in sorted((made / "hf").glob("*.safetensors")):
            with safe_open(path, framework="np") as file:
                names = set(file.keys())
                for entry in table(config):
                    if entry.hf_name in names:
                        np.testing.assert_array_equal(
                            store.read(entry), file.get_tensor(entry.hf_name)
                        )
