"""Streaming against decoding at once, on texts whose characters are torn apart at every byte."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qwen3vl_jax.streaming import TextStream, decoder

TORN = "h\u00e9llo \U0001f642\U0001f469\u200d\U0001f467 \u65e5\u672c\u8a9e \u0928\u094d \ufdfd ok"
FACE_STARTS, FACE_ENDS, SPECIAL, ADDED = 256, 257, 258, 259


def byte_tokenizer() -> Any:
    """Token i is byte i; then two that share the bytes F0 9F 99 82, a special and an added one."""
    letters = bytes_to_unicode()
    vocabulary = {letters[byte]: byte for byte in range(256)}
    vocabulary["x" + letters[0xF0] + letters[0x9F]] = FACE_STARTS
    vocabulary[letters[0x99] + letters[0x82] + "y"] = FACE_ENDS
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.add_tokens(["<tool>"])
    assert tokenizer.convert_tokens_to_ids(["<end>", "<tool>"]) == [SPECIAL, ADDED]
    return tokenizer


TOKENIZER = byte_tokenizer()
DECODE = decoder(TOKENIZER)


def streamed(tokens: list[int], stop_strings: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(DECODE, stop_strings)
    return [*(stream.put(token) for token in tokens), stream.end()]


def test_every_character_comes_whole_and_with_its_last_byte() -> None:
    pieces = streamed(list(TORN.encode()))
    assert "".join(pieces) == TORN
    assert all(len(piece) <= 1 for piece in pieces)
    ends = [len(TORN[: i + 1].encode()) - 1 for i in range(len(TORN))]
    assert [where for where, piece in enumerate(pieces) if piece] == ends


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        ([FACE_STARTS, FACE_ENDS], ["", "x🙂y", ""]),
        ([0xE2, SPECIAL, 0x82, 0xAC], ["", "", "", "€", ""]),
        ([0xE2, 0x82, 0x41], ["", "", "\ufffdA", ""]),
        ([0xE2, 0xE2, 0x82, 0xAC], ["", "\ufffd", "", "€", ""]),
        ([0x41, 0xE2], ["A", "", "\ufffd"]),
        ([*"\ufffd".encode(), 0x41], ["", "", "", "\ufffdA", ""]),
        ([ADDED, SPECIAL], ["<tool>", "", ""]),
        ([5000, 0x41], ["", "A", ""]),
    ],
    ids=[
        "a character across two tokens",
        "a special token inside a character",
        "a character that is broken off",
        "a broken start before a whole character",
        "an end inside a character",
        "a replacement character that was meant",
        "an added token",
        "an id beyond the vocabulary",
    ],
)
def test_pieces_appear_when_they_are_certain(tokens: list[int], pieces: list[str]) -> None:
    assert streamed(tokens) == pieces


@hypothesis.given(st.lists(st.integers(0, ADDED), max_size=40))
def test_any_tokens_stream_to_what_they_decode_to_at_once(tokens: list[int]) -> None:
    assert "".join(streamed(tokens)) == TOKENIZER.decode(tokens, skip_special_tokens=True)


@hypothesis.given(st.text(max_size=20))
def test_valid_text_never_streams_a_broken_character(text: str) -> None:
    kept = text.replace("\ufffd", "")
    pieces = streamed(list(kept.encode()))
    assert "".join(pieces) == kept
    assert not any("\ufffd" in piece for piece in pieces)


def test_few_tokens_are_held_whatever_comes() -> None:
    """So a token costs the same at the start of an answer and at its end."""
    lengths: list[int] = []

    def counting(ids: list[int]) -> str:
        lengths.append(len(ids))
        return DECODE(ids)

    stream = TextStream(counting)
    for token in [0xF0, 0x9F, 0x80, 0xE2, FACE_STARTS, 0x80, 0xC3] * 100:
        stream.put(token)
    assert max(lengths) <= 5
    assert len(lengths) <= 700 * 12


@pytest.mark.parametrize(
    ("text", "stops", "pieces"),
    [
        ("one STOP two", ("STOP",), "one "),
        ("a STO b", ("STOP",), "a STO b"),
        ("aaab!", ("aab",), "a"),
        ("x\n\nUser: y", ("User:", "\n\n"), "x"),
        ("ends with ST", ("STOP",), "ends with ST"),
        ("STOP", ("STOP",), ""),
        ("日本語です", ("語",), "日本"),
    ],
)
def test_text_ends_before_a_stop_string(text: str, stops: tuple[str, ...], pieces: str) -> None:
    assert "".join(streamed(list(text.encode()), stops)) == pieces


def test_nothing_of_a_stop_string_is_ever_shown_too_early() -> None:
    pieces = streamed(list(b"say STOP"), ("STOP",))
    assert pieces == ["s", "a", "y", " ", "", "", "", "", ""]
    pieces = streamed(list(b"say STOUT"), ("STOP",))
    assert pieces == ["s", "a", "y", " ", "", "", "", "STOU", "T", ""]


@hypothesis.given(st.text("abS", max_size=12), st.lists(st.text("abS", min_size=1, max_size=3)))
def test_the_earliest_stop_string_that_is_complete_first_wins(text: str, stops: list[str]) -> None:
    """The oracle looks at the whole text again after every letter."""
    expected = text
    for length in range(1, len(text) + 1):
        places = [text[:length].find(stop) for stop in stops if stop in text[:length]]
        if places:
            expected = text[: min(places)]
            break
    assert "".join(streamed(list(text.encode()), tuple(stops))) == expected
