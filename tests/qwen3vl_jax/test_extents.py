"""Where arrays lie in files: whoever reads those bytes has the array."""

from pathlib import Path

import checkpoint_factory as factory
import google_crc32c
import pytest
from converting import convert

from qwen3vl_jax.checkpoints.extents import Extent
from qwen3vl_jax.checkpoints.opening import open_checkpoint
from qwen3vl_jax.config import load_config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.weights import block_rows, table


def read(extents: tuple[Extent, ...]) -> bytes:
    parts = []
    for extent in extents:
        raw = extent.path.read_bytes()
        parts.append(raw[extent.offset : extent.offset + extent.used_bytes])
    return b"".join(parts)


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("stored", [False, True], ids=["huggingface", "store"])
def test_the_bytes_at_the_extents_are_the_array(tmp_path: Path, kind: str, stored: bool) -> None:
    folder = tmp_path / "hf"
    factory.checkpoint(folder, kind, dtype="bfloat16", layout="saved", shards=2)
    if stored:
        assert convert(folder, tmp_path / "store") == 0
        folder = tmp_path / "store"
    config = load_config(folder)
    with open_checkpoint(folder, config) as checkpoint:
        for entry in table(config):
            assert read(checkpoint.extents(entry)) == checkpoint.read(entry).tobytes(), entry.path


def test_blocks_of_a_vocabulary_matrix_have_their_own_rows(tmp_path: Path) -> None:
    factory.checkpoint(tmp_path, "dense")
    config = load_config(tmp_path)
    with open_checkpoint(tmp_path, config) as checkpoint:
        for entry in table(config, vocab_rows=block_rows(config.text.vocab_size, 3)):
            assert read(checkpoint.extents(entry)) == checkpoint.read(entry).tobytes(), entry.path


def test_what_lies_transposed_is_refused_with_the_way_out(tmp_path: Path) -> None:
    factory.checkpoint(tmp_path, "moe", layout="released")
    config = load_config(tmp_path)
    with open_checkpoint(tmp_path, config) as checkpoint:
        entry = next(entry for entry in table(config) if entry.expert is not None)
        with pytest.raises(UsageError, match=r"transposed .* convert"):
            checkpoint.extents(entry)


def test_a_chunk_holds_its_checksum_behind_its_values(tmp_path: Path) -> None:
    factory.checkpoint(tmp_path / "hf", "dense")
    assert convert(tmp_path / "hf", tmp_path / "store") == 0
    config = load_config(tmp_path / "store")
    with open_checkpoint(tmp_path / "store", config) as checkpoint:
        extents = [e for entry in table(config) for e in checkpoint.extents(entry)]
    assert all(extent.path.stat().st_size == extent.nbytes + 4 for extent in extents)
    assert all(extent.checksum for extent in extents)
    assert len({extent.path for extent in extents}) == len(extents)
    for extent in extents:
        raw = extent.path.read_bytes()
        assert google_crc32c.value(raw[:-4]) == int.from_bytes(raw[-4:], "little")
