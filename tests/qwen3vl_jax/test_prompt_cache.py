"""A prompt cache changes no bit of an answer, and brings what is predicted to be faster."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import planned_models as helper
import pytest
import tiny
from prompt_caches import bits, keeping, kept, parts

from memsched.errors import DoesNotFitError, StoreError
from memsched.profiles import load_machine
from qwen3vl_jax import Qwen3VL
from qwen3vl_jax.chat import Chat
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.planned import recalling
from qwen3vl_jax.planned.recalling import Forecaster
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.prompt_keys import weights_digest

CHILD = Path(__file__).with_name("prompt_cache_child.py")
ROOT = Path(__file__).parents[2]
CHUNK = 16
CASES = {
    "dense": ("text", "image", "two_images", "video", "batch_left", "image_video"),
    "moe": ("text", "two_images"),
}


def disk(bytes_per_s: float, patch: pytest.MonkeyPatch, folder: Path) -> None:
    """What is measured from now on: 10^11 operations a second, and such a disk."""
    machine = load_machine(helper.machine_file(folder, 2))
    links = [dataclasses.replace(link, bytes_per_s=bytes_per_s) for link in machine.links]
    links = [dataclasses.replace(link, latency_s=1e-7) for link in links]
    found = dataclasses.replace(machine, links=tuple(links))
    patch.setattr(recalling, "detect", lambda *_, **__: found)


@pytest.fixture(autouse=True)
def a_fast_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk(1e11, monkeypatch, tmp_path)


@pytest.fixture
def get(
    tiny_model: Callable[..., Qwen3VL], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Qwen3VL]]:
    """`get(name)`: a tiny model, without a prompt cache before and after the test."""
    given: list[Qwen3VL] = []

    def found(name: str) -> Qwen3VL:
        given.append(tiny_model(name))
        monkeypatch.setattr(given[-1].runner, "chunk_tokens", CHUNK)
        return given[-1]

    yield found
    for model in given:
        model.prompt_cache = None


# ---- the same bits ----


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases]
)
def test_computed_kept_and_restored_are_the_same_bits(
    name: str, case: str, get: Callable[[str], Qwen3VL], tmp_path: Path
) -> None:
    model, inputs = get(name), tiny.inputs(case)
    wanted = bits(model, inputs)
    told = keeping(model, tmp_path / "cache")
    assert bits(model, inputs) == wanted
    chunks, pieces = parts(model)
    assert all(item.stored_bytes > item.nbytes for item in (*chunks, *pieces))
    assert not any(item.restored for item in (*chunks, *pieces))

    assert bits(model, inputs) == wanted
    chunks, pieces = parts(model)
    assert all(item.restored for item in chunks)
    assert not any(item.needed or item.restored for item in pieces)
    assert told == []


def test_a_cache_in_blocks_is_restored_block_by_block(
    get: Callable[[str], Qwen3VL], tmp_path: Path
) -> None:
    model, inputs = get("dense"), tiny.inputs("two_images")
    wanted = bits(model, inputs, block_slots=CHUNK)
    keeping(model, tmp_path / "cache")
    for _ in range(2):
        assert bits(model, inputs, block_slots=CHUNK) == wanted
    chunks, _ = parts(model)
    assert [item.restored for item in chunks] == [True, True, True]
    # Another form of cache sums in another order, so it has entries of its own.
    bits(model, inputs)
    assert not any(item.restored for item in parts(model)[0])


def test_generate_gives_the_same_tokens(get: Callable[[str], Qwen3VL], tmp_path: Path) -> None:
    model, inputs = get("dense"), tiny.inputs("image")
    wanted = helper.told(model, inputs)
    keeping(model, tmp_path / "cache")
    for _ in range(2):
        np.testing.assert_array_equal(helper.told(model, inputs), wanted)
    assert all(item.restored for item in parts(model)[0])


# ---- what is found ----


def test_a_longer_prompt_finds_the_chunks_that_are_the_same(
    get: Callable[[str], Qwen3VL], tmp_path: Path
) -> None:
    model = get("dense")
    long = np.random.default_rng(0).integers(3, 90, (1, 3 * CHUNK + 5)).astype(np.int32)
    changed = long.copy()
    changed[0, CHUNK + 3] += 1
    shorter, changed = {"input_ids": long[:, : 2 * CHUNK + 9]}, {"input_ids": changed}
    wanted = bits(model, {"input_ids": long})
    keeping(model, tmp_path / "cache")
    bits(model, shorter)
    assert bits(model, {"input_ids": long}) == wanted
    assert [item.restored for item in parts(model)[0]] == [True, True, False, False]
    # All after a changed token is another chunk.
    model.prompt_cache, before = None, model.prompt_cache
    wanted = bits(model, changed)
    model.prompt_cache = before
    assert bits(model, changed) == wanted
    assert [item.restored for item in parts(model)[0]] == [True, False, False, False]


def test_pictures_that_no_computed_chunk_reads_are_left_alone(
    get: Callable[[str], Qwen3VL], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = get("dense"), tiny.inputs("two_images")
    wanted = bits(model, inputs)
    keeping(model, tmp_path / "cache")
    bits(model, inputs)
    chunks, pieces = parts(model)
    assert (len(chunks), len(pieces)) == (3, 2)
    # Only the last chunk is lost; the first picture is before it.
    kept(model).entries.forget(chunks[-1].key)
    ran: list[str] = []
    run = model.run_phase
    monkeypatch.setattr(
        model,
        "run_phase",
        lambda name, *more, **how: (ran.append(name), run(name, *more, **how))[1],
    )
    assert bits(model, inputs) == wanted
    chunks, pieces = parts(model)
    assert [item.restored for item in chunks] == [True, True, False]
    assert [item.restored for item in pieces] == [item.needed for item in pieces]
    assert [item.needed for item in pieces].count(False) >= 1
    assert ran == ["prefill", "scores", "decode", "decode"]


def test_a_known_picture_in_another_question_is_not_encoded_again(
    get: Callable[[str], Qwen3VL], tmp_path: Path
) -> None:
    model, inputs = get("dense"), tiny.inputs("image")
    other = {**inputs, "input_ids": inputs["input_ids"].copy()}
    other["input_ids"][0, 0] += 1
    wanted = bits(model, other)
    keeping(model, tmp_path / "cache")
    bits(model, inputs)
    assert bits(model, other) == wanted
    chunks, pieces = parts(model)
    assert not any(item.restored for item in chunks)
    assert [(item.needed, item.restored) for item in pieces] == [(True, True)]


def test_a_changed_pixel_is_another_picture(get: Callable[[str], Qwen3VL], tmp_path: Path) -> None:
    model, inputs = get("dense"), tiny.inputs("image")
    other = {**inputs, "pixel_values": inputs["pixel_values"].copy()}
    other["pixel_values"][-1, -1] += np.float32(1 / 127.5)
    wanted = bits(model, other)
    keeping(model, tmp_path / "cache")
    bits(model, inputs)
    assert bits(model, other) == wanted
    chunks, pieces = parts(model)
    shown = int(np.flatnonzero(np.diff(inputs["input_ids"][0]) == 0)[0]) // CHUNK
    assert not any(item.restored for item in (*chunks[shown:], *pieces))


def test_another_cache_size_is_another_sum(get: Callable[[str], Qwen3VL], tmp_path: Path) -> None:
    model, inputs = get("dense"), tiny.inputs("text")
    keeping(model, tmp_path / "cache")
    model.generate(**inputs, max_new_tokens=4)
    model.generate(**inputs, max_new_tokens=200)
    assert not any(item.restored for item in parts(model)[0])


def _edited(path: Path) -> None:
    """Another value in every tensor; size and times stay."""
    for file in path.glob("*.safetensors"):
        before = file.stat()
        content = bytearray(file.read_bytes())
        content[len(content) // 2 :] = bytes(byte ^ 1 for byte in content[len(content) // 2 :])
        file.write_bytes(content)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def _touched(path: Path) -> None:
    for file in path.glob("*.safetensors"):
        os.utime(file, (1, 1))


@pytest.mark.parametrize("change", [_edited, _touched])
def test_entries_of_other_weights_are_not_found(
    change: Callable[[Path], None], get: Callable[[str], Qwen3VL], tmp_path: Path
) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny.DATA / "dense", path)
    model, inputs = get("dense"), tiny.inputs("text")
    keeping(model, tmp_path / "cache", path)
    bits(model, inputs)
    keeping(model, tmp_path / "cache", path)
    bits(model, inputs)
    assert all(item.restored for item in parts(model)[0])
    change(path)
    keeping(model, tmp_path / "cache", path)
    bits(model, inputs)
    assert not any(item.restored for item in parts(model)[0])


def test_a_later_turn_in_another_process_finds_the_first_one(tmp_path: Path) -> None:
    system = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 560)))
    picture = np.random.default_rng(1).integers(0, 255, (64, 96, 3)).astype(np.uint8)
    PIL.Image.fromarray(picture).save(tmp_path / "picture.png")
    first = [{"type": "image", "image": str(tmp_path / "picture.png")}]
    first.append({"type": "text", "text": "what is it?"})
    asked = [{"role": "system", "content": system}, {"role": "user", "content": first}]

    def run(messages: list[dict[str, Any]], folder: Path | None) -> dict[str, Any]:
        task = {"messages": messages, "prompt_cache": folder and str(folder)}
        done = subprocess.run(
            [sys.executable, str(CHILD), json.dumps(task)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    folder = tmp_path / "cache"
    said = run(asked, folder)["text"]
    asked += [{"role": "assistant", "content": said}, {"role": "user", "content": "and now?"}]
    with_it, without = run(asked, folder), run(asked, None)
    assert with_it["tokens"] == without["tokens"]
    assert with_it["restored"] == {"tokens 0 to 511": True, "1 x 24 patches": True} | {
        name: False for name in with_it["restored"] if name.startswith("tokens 512")
    }


def test_a_turn_that_continues_in_memory_asks_nothing(
    get: Callable[[str], Qwen3VL], tmp_path: Path
) -> None:
    processor = Processor.from_pretrained(tiny.DATA / "dense")
    model = get("dense")
    settings = dataclasses.replace(model.settings, do_sample=False, max_new_tokens=4)
    keeping(model, tmp_path / "cache")
    chat = Chat(processor, settings)
    for _ in range(2):
        list(chat.ask(model, chat.prepare([{"type": "text", "text": "hello"}])))
    assert kept(model).latest is None
    assert "not asked" in kept(model).text()


# ---- whichever is predicted faster ----


class Fixed(Forecaster):
    """Predicts what it is told."""

    def __init__(self, restoring_s: float, chunk_s: float, piece_s: float) -> None:
        self._given = restoring_s, chunk_s, piece_s

    def restoring_s(self, nbytes: int) -> float:
        return self._given[0]

    def chunk_s(self, tokens: int, cache: Any) -> float:
        return self._given[1]

    def piece_s(self, piece: Any, rows: int) -> float:
        return self._given[2]

    def make_room(self, nbytes: int, beside: Any) -> bool:
        return True


@pytest.mark.parametrize(
    ("predicted", "chunks", "pictures"),
    [
        ((2.0, 1.0, 0.5), [False, False], [False]),
        ((2.0, 3.0, 1.0), [True, True], [False]),
        # The chunk with the picture is worth it, as computing it takes the picture, too.
        ((2.0, 1.0, 1.5), [True, False], [False]),
        ((1.0, 1.0, 1.0), [True, True], [False]),
        ((2.0, 0.1, 1.8), [False, False], [False]),
        ((2.0, -1.0, 2.5), [False, False], [True]),
    ],
)
def test_each_part_is_restored_if_that_is_predicted_to_be_faster(
    predicted: tuple[float, float, float],
    chunks: list[bool],
    pictures: list[bool],
    get: Callable[[str], Qwen3VL],
    tmp_path: Path,
) -> None:
    model, inputs = get("dense"), tiny.inputs("image")
    ids = inputs["input_ids"][0].tolist()
    image = model.config.image_token_id
    first = ids.index(image) - 1  # the mark before the picture
    # The picture in the first chunk, nothing but text in the second.
    inputs["input_ids"] = np.array([[*ids[first : ids.index(image) + ids.count(image) + 1]]])
    text = np.full((1, 2 * CHUNK - 3 - inputs["input_ids"].shape[1]), 5)
    inputs["input_ids"] = np.concatenate([inputs["input_ids"], text], 1).astype(np.int32)
    inputs.pop("mm_token_type_ids", None)
    inputs.pop("attention_mask", None)
    wanted = bits(model, inputs)
    keeping(model, tmp_path / "cache")
    bits(model, inputs)
    kept(model).estimates = Fixed(*predicted)
    assert bits(model, inputs) == wanted
    found_chunks, found_pieces = parts(model)
    assert [item.restored for item in found_chunks] == chunks
    assert [item.restored for item in found_pieces] == pictures
    data = kept(model).to_dict()["parts"]
    assert [part["restoring_s"] for part in data] == [predicted[0]] * 3
    restoring_s, chunk_s, piece_s = predicted
    wanted_s = [chunk_s + min(restoring_s, piece_s), chunk_s, piece_s]
    assert [part["computing_s"] for part in data] == wanted_s


@pytest.mark.parametrize(("bytes_per_s", "restored"), [(1e11, True), (1e6, False)])
def test_a_slow_disk_is_not_asked(
    bytes_per_s: float,
    restored: bool,
    get: Callable[[str], Qwen3VL],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs = get("dense"), tiny.inputs("text")
    wanted = bits(model, inputs)
    disk(bytes_per_s, monkeypatch, tmp_path)
    keeping(model, tmp_path / "cache")
    for _ in range(2):
        assert bits(model, inputs) == wanted
    (item,) = parts(model)[0]
    assert item.restored is restored
    assert item.restoring_s == pytest.approx(1e-7 + item.nbytes / bytes_per_s)
    # Every step takes its latency of 5 us: each layer is one, and there are some around them.
    assert item.computing_s is not None
    assert 4 * 5e-6 < item.computing_s < 1e-3
    said = kept(model).text()
    assert f"{int(restored)} of 1 parts restored" in said
    assert ("1 computed all the same" in said) is not restored


def test_rates_are_measured_once_for_a_directory(
    get: Callable[[str], Qwen3VL], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, known = [], recalling.detect()

    def detect(directory: Path, *, measure_s: float) -> Any:
        if measure_s:
            measured.append(directory)
        return known

    monkeypatch.setattr(recalling, "detect", detect)
    folder = tmp_path / "cache"
    for _ in range(2):
        keeping(get("dense"), folder)
    assert measured == [folder]
    (profile,) = folder.glob("*.toml")
    profile.write_text("damaged")
    keeping(get("dense"), folder)
    assert measured == [folder, folder]
    assert load_machine(profile) == known


def test_rates_of_a_full_disk_are_assumed(
    get: Callable[[str], Qwen3VL], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = recalling.detect()

    def detect(directory: Path, *, measure_s: float) -> Any:
        if measure_s:
            raise StoreError(f"directory {directory}: less than 33,554,432 B free")
        return known

    monkeypatch.setattr(recalling, "detect", detect)
    assert keeping(get("dense"), tmp_path / "cache") == []
    assert kept(get("dense")).estimates.restoring_s(10**11) == pytest.approx(1.0)


def test_a_machine_without_memory_to_spare_keeps_nothing(
    get: Callable[[str], Qwen3VL], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def detect(directory: Path, *, measure_s: float) -> Any:
        raise DoesNotFitError("main memory leaves 9 B", {})

    monkeypatch.setattr(recalling, "detect", detect)
    model = get("dense")
    told = keeping(model, tmp_path / "cache")
    assert told == ["prompt cache: main memory leaves 9 B; it is not used"]
    assert model.prompt_cache is None


def test_a_copy_of_a_store_is_the_same_checkpoint(tmp_path: Path) -> None:
    store = helper.store_of(tiny.DATA / "dense", tmp_path / "store")
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    assert weights_digest(copy) == weights_digest(store)
    manifest = copy / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"0", b"1", 1))
    assert weights_digest(copy) != weights_digest(store)


# ---- what goes wrong ----


def test_a_damaged_entry_is_said_in_a_line_and_computed_again(
    get: Callable[[str], Qwen3VL], tmp_path: Path
) -> None:
    model, inputs = get("dense"), tiny.inputs("image")
    wanted = bits(model, inputs)
    told = keeping(model, tmp_path / "cache")
    bits(model, inputs)
    for item in parts(model)[0]:
        path = tmp_path / "cache" / f"{item.key}.kv"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1  # the last array: all others are in the cache by then
        path.write_bytes(content)
    assert bits(model, inputs) == wanted
    chunks, _ = parts(model)
    assert len(told) == len(chunks)
    assert all("\n" not in line and "are computed again" in line for line in told)
    assert all(item.stored_bytes for item in chunks)
    assert bits(model, inputs) == wanted
    assert all(item.restored for item in parts(model)[0])


def test_a_full_disk_is_said_once_and_the_answer_stays(
    get: Callable[[str], Qwen3VL], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = get("dense"), tiny.inputs("two_images")
    wanted = bits(model, inputs)
    told = keeping(model, tmp_path / "cache")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    assert bits(model, inputs) == wanted
    assert len(told) == 1
    assert "No space left on device" in told[0]
    assert list((tmp_path / "cache").glob("*.kv")) == []


def test_no_space_at_all_is_refused(get: Callable[[str], Qwen3VL], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="prompt cache of 0 B holds nothing"):
        keeping(get("dense"), tmp_path / "cache", space=0)


def test_the_space_is_kept(get: Callable[[str], Qwen3VL], tmp_path: Path) -> None:
    model, inputs = get("dense"), tiny.inputs("two_images")
    wanted = bits(model, inputs)
    keeping(model, tmp_path / "cache", space="100kB")
    for _ in range(2):
        assert bits(model, inputs) == wanted
        assert 0 < kept(model).entries.used_bytes <= 100_000
