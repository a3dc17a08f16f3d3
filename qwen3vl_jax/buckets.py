"""Shapes are rounded up to buckets, so that a new size rarely means a new program."""

PREFILL_CHUNK = 512  # tokens: fewer read the weights too often, more need more workspace


def bucket(count: int, smallest: int) -> int:
    """`count` rounded up to 4, 5, 6 or 7 times a power of two, at least `smallest`.

    Four sizes per doubling: at most a fifth of a bucket is padding.
    """
    if count <= smallest:
        return smallest
    unit = 1 << max((count - 1).bit_length() - 3, 0)
    return -(-count // unit) * unit
