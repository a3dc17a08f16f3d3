"""Sizes: what people write, and what messages show."""

import pytest
from hypothesis import given, strategies

from memsched.errors import ProgramError
from memsched.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("123", 123),
        ("1B", 1),
        ("512MB", 512_000_000),
        ("512 mb", 512_000_000),
        (" 1.5GiB ", 1_610_612_736),
        ("1.5GB", 1_500_000_000),
        ("2kB", 2000),
        ("2KiB", 2048),
        ("1TB", 10**12),
        ("0.1KiB", 102),
        # 0.29 is no binary fraction: a float product gives 289,999,999.
        ("0.29GB", 290_000_000),
        ("1024PiB", 1 << 60),
    ],
)
def test_sizes_are_read_exactly(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "-1",
        "+1",
        "1e9",
        "1.GB",
        ".5GB",
        "1,000",
        "4G",
        "1 2",
        "inf",
        "nan",
        "٣GB",
        "1GBB",
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ProgramError, match="write 512MB"):
        parse_size(text)


def test_more_than_an_exbibyte_is_refused() -> None:
    with pytest.raises(ProgramError, match="1,152,921,504,606,846,976"):
        parse_size("1025PiB")


@given(strategies.integers(0, 1 << 60))
def test_plain_bytes_read_back(nbytes: int) -> None:
    assert parse_size(str(nbytes)) == parse_size(f"{nbytes}B") == nbytes


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1_048_575, "1,048,575 B"),
        (1_048_576, "1,048,576 B (1.00 MiB)"),
        (1_500_000_000, "1,500,000,000 B (1.40 GiB)"),
        (5 << 40, "5,497,558,138,880 B (5.00 TiB)"),
    ],
)
def test_sizes_are_shown_exactly_with_a_round_figure(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text
