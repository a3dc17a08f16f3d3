"""What is in use in each tier while a plan is carried out, and the most it ever was."""

from collections.abc import Mapping


class Ledger:
    """Bytes in use per tier, counted as they are taken and given back."""

    def __init__(self, tiers: tuple[str, ...]) -> None:
        self.used_bytes = dict.fromkeys(tiers, 0)
        self.peak_bytes = dict.fromkeys(tiers, 0)

    def start(self, used_bytes: Mapping[str, int]) -> None:
        """What is in use before a plan's first action."""
        for tier in self.used_bytes:
            self.used_bytes[tier] = used_bytes.get(tier, 0)
            self.peak_bytes[tier] = max(self.peak_bytes[tier], self.used_bytes[tier])

    def change(self, tier: str, nbytes: int, passing_bytes: int = 0) -> None:
        """`nbytes` more are in use from now on, and `passing_bytes` more for a moment."""
        used = self.used_bytes[tier] + nbytes
        self.used_bytes[tier] = used
        if used + passing_bytes > self.peak_bytes[tier]:
            self.peak_bytes[tier] = used + passing_bytes
