"""Text while it is being generated: tokens in, text out, never half a character.

The tokenizers of Qwen models are byte-level: a token is a run of bytes, and a character may be
spread over up to four of them. Tokens are held back until their characters are whole, and then
forgotten, so the cost of an answer is linear in its length.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

Decode = Callable[[list[int]], str]

# What a byte-level tokenizer gives for bytes that are no character, or not yet one.
BROKEN = "\ufffd"


def decoder(tokenizer: Any) -> Decode:
    """Ids to text without special tokens. For our tokenizer and those of transformers."""
    return functools.partial(tokenizer.decode, skip_special_tokens=True)


class TextStream:
    """The text of one answer, token by token. Owns the tokens that are not yet characters.

    `put` returns what has become certain: whole characters that cannot belong to a stop string any
    more. Bytes that never become a character are U+FFFD, as in the tokenizer's own decoding.
    """

    def __init__(self, decode: Decode, stop_strings: Iterable[str] = ()) -> None:
        self._decode = decode
        self._stop_strings = tuple(stop_strings)
        self._tokens: list[int] = []
        self._held = ""
        self.stopped = False

    def put(self, token: int) -> str:
        """Takes one more token. Text before a stop string is returned, the stop string never is."""
        if not self._decode([token]):
            return ""
        self._tokens.append(token)
        return self._release(self._whole_characters())

    def end(self) -> str:
        """What was held back. No more tokens may follow."""
        text = self._release(self._decode(self._tokens))
        text, self._tokens, self._held = text + self._held, [], ""
        return text

    def _whole_characters(self) -> str:
        text = self._decode(self._tokens)
        if not text.endswith(BROKEN):
            self._tokens = []
            return text
        # The last bytes may be the start of a character. Where cutting the tokens in two changes
        # no text, no character lies across the cut, and what is before it is final.
        for cut in range(len(self._tokens) - 1, 0, -1):
            before, after = self._decode(self._tokens[:cut]), self._decode(self._tokens[cut:])
            if before + after == text:
                self._tokens = self._tokens[cut:]
                return before
        return ""

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [where for where in (text.find(stop) for stop in self._stop_strings) if where >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        split = len(text) - max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[split:]
        return text[:split]


def _overlap(text: str, stop: str) -> int:
    """Letters at the end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
