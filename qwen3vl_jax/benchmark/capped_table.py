"""What was measured under limits, as lines of text."""

from collections.abc import Mapping
from typing import Any


def table(result: Mapping[str, Any]) -> str:
    """The limits as lines of text."""
    lines = [
        f"{'cap GB':>7}{'codec':>9}{'tokens/s':>9}{'s':>7}{'GB plan':>8}{'GB read':>8}{'wanted':>7}"
        f"{'disk GB/s':>10}{'compute s':>10}{'bound s':>8}{'reached':>8}{'peak GB':>8}"
        f"{'process':>8}{'lookup':>7}{'prompt':>7}{'transformers':>13}{'times':>6}"
    ]
    for row in result["caps"]:
        lines.append(_row(row))
        lines += [f"{'':8s}{part}: {error}" for part, error in row["errors"].items()]
    if "fits" in result:
        fits = result["fits"]
        lines.append(
            f"everything fits: {fits['seconds']:.4f} s planned, {fits['plain_s']:.4f} s plain, "
            f"ratio {fits['ratio']:.3f}"
        )
    if any(not row.get("limited", True) for row in result["caps"]):
        lines.append("NO LIMIT: control groups cannot be written here; process memory is measured")
    return "\n".join(lines)


def _row(row: Mapping[str, Any]) -> str:
    def cell(value: float | int | None, width: int, digits: int = 2, unit: float = 1.0) -> str:
        return f"{'-':>{width}}" if value is None else f"{value / unit:{width}.{digits}f}"

    lookup, prompt = row.get("lookup", {}), row.get("prompt", {})
    fraction = row.get("fraction")
    theirs = row.get("transformers", {}).get("seconds")
    return (
        cell(row["cap_bytes"], 7, 2, 1e9)
        + f"{row['codec']:>9}"
        + cell(row.get("tokens_per_s"), 9, 3)
        + cell(row.get("seconds"), 7, 3)
        + cell(row.get("plan_bytes"), 8, 3, 1e9)
        + cell(row.get("read_bytes"), 8, 3, 1e9)
        + cell(row.get("wanted_bytes"), 7, 2, 1e9)
        + cell(row.get("disk_bytes_per_s"), 10, 2, 1e9)
        + cell(row.get("compute_s"), 10, 3)
        + cell(row.get("bound_s"), 8, 3)
        + (f"{'-':>8}" if fraction is None else f"{fraction:8.1%}")
        + cell(row.get("peak_bytes"), 8, 3, 1e9)
        + cell(row.get("process_bytes"), 8, 3, 1e9)
        + cell(lookup.get("times"), 7)
        + cell(prompt.get("ratio"), 7)
        + cell(theirs and 1 / theirs, 13, 3)
        + cell(theirs and row.get("seconds") and theirs / row["seconds"], 6, 1)
    )
