"""Prompt lookup: what followed the last words before may follow them again.

Such a guess costs no model. Several tokens are verified in one pass through the layers, so weights
that have to be fetched are fetched once for all of them. Nothing depends on a guess being right:
each token is chosen from the scores that follow the tokens before it, as without drafts.

Those scores are the same sums, but a product of several rows may add in another order than that of
one row. In float32 that is a few roundings; in bfloat16 two tokens that are nearly equal may change
places.

Source: A. Saxena, "Prompt Lookup Decoding", 2023; transformers 5.23, `generation/
candidate_generator.py`, `PromptLookupCandidateGenerator`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qwen3vl_jax import text

# With the token before them eight rows: the most for which one product costs about what it costs
# for one row (`linear.formulation`).
DRAFT_TOKENS = 7
LONGEST_MATCH = 3
SHORTEST_MATCH = 2  # one token alone is followed by something else too often


def propose(told: Int[np.ndarray, " tokens"], count: int) -> Int[np.ndarray, " count"] | None:
    """`count` tokens that may follow, or None if the last ones never came before.

    The longest match decides, then the latest. A copy that reaches the end goes on with itself:
        1 2 3 9 1 2  ->  3 9 1 2 3 9 1 ...
    """
    end = _match_end(told)
    if end is None:
        return None
    return told[end + np.arange(count) % (len(told) - end)].astype(np.int32)


def _match_end(told: Int[np.ndarray, " tokens"]) -> int | None:
    """The place after the latest of the longest earlier matches of the last tokens."""
    ends, found = np.arange(1, len(told)), None
    for length in range(1, LONGEST_MATCH + 1):
        ends = ends[ends >= length]
        ends = ends[told[ends - length] == told[-length]] if ends.size else ends
        if not ends.size:
            break
        if length >= SHORTEST_MATCH:
            found = int(ends[-1])
    return found


def propose_rows(
    told: Sequence[Int[np.ndarray, " _"]],
    finished: Bool[np.ndarray, " B"],
    count: int,
    *,
    padding: int,
) -> Int[np.ndarray, "B count"] | None:
    """A draft for every row, padding where a row has finished.

    None unless every other row has one: the rows of a batch go on in step.
    """
    draft = np.full((len(told), count), padding, np.int32)
    for row in np.flatnonzero(~finished).tolist():
        guess = propose(told[row], count)
        if guess is None:
            return None
        draft[row] = guess
    return draft


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """Drafted tokens that the cache holds on trial, and the scores of the token after each.

    `scores[:, i]` follow the draft's first `i` tokens. The first `used` were chosen.
    """

    draft: Int[np.ndarray, "B K"]
    scores: Float[Array, "B T V"]
    used: int = 0

    @property
    def left(self) -> int:
        """Tokens that have not been chosen yet."""
        return self.draft.shape[1] - self.used

    def logits(self) -> Float[Array, "B V"]:
        """Scores of the token after those that were chosen."""
        return text.scores_at(self.scores, np.int32(self.used))

    def foresaw(self, tokens: Int[np.ndarray, " B"]) -> bool:
        """Whether these tokens are the next of the draft, in every row."""
        return self.left > 0 and np.array_equal(self.draft[:, self.used], tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class DraftCounts:
    """How drafting went: passes with a draft, drafted tokens of a row, and those that were right.

    A batch counts as one row: its rows accept as many tokens as the least lucky of them.
    """

    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    def with_pass(self, drafted: int) -> "DraftCounts":
        """One more pass."""
        return DraftCounts(self.passes + 1, self.drafted + drafted, self.accepted)

    def with_accepted(self) -> "DraftCounts":
        """One more right token."""
        return dataclasses.replace(self, accepted=self.accepted + 1)
