"""When each action was busy, and which action an exception belongs to."""

import time
from collections.abc import Sequence

from memsched.cost.span import Span
from memsched.plan import Action

_NOTE = "while carrying out "


class Record:
    """Start and end of every action, in seconds of `time.perf_counter`.

    `carried_end_s` is when the last transfer of an earlier plan ended that went on in this one.
    """

    def __init__(self, actions: int) -> None:
        self.start_s = self.carried_end_s = time.perf_counter()
        self._starts_s = [self.start_s] * actions
        self._ends_s = [self.start_s] * actions
        self._unsure_s = [0.0] * actions

    def busy(
        self,
        index: int,
        start_s: float,
        end_s: float,
        *,
        others: Sequence[int] = (),
        unsure_s: float = 0.0,
    ) -> None:
        """An action's time, and how far it is not known.

        `others` went along with it and end with it.
        """
        self._starts_s[index] = start_s
        self._ends_s[index] = end_s
        self._unsure_s[index] = unsure_s
        for other in others:
            self._starts_s[other] = self._ends_s[other] = end_s

    @property
    def carried_s(self) -> float:
        """Seconds from the start of the plan in which transfers of earlier ones went on."""
        return self.carried_end_s - self.start_s

    def spans(self) -> tuple[Span, ...]:
        """All spans, counted from the start of the plan."""
        zero = self.start_s
        times = zip(self._starts_s, self._ends_s, self._unsure_s, strict=True)
        return tuple(
            Span(index, start - zero, end - zero, unsure)
            for index, (start, end, unsure) in enumerate(times)
        )


def blame(error: BaseException, index: int, action: Action) -> None:
    """Note in an exception which action failed, unless one is noted already."""
    notes: list[str] = getattr(error, "__notes__", [])
    if not any(note.startswith(_NOTE) for note in notes):
        error.add_note(f"{_NOTE}action {index} {action}")
