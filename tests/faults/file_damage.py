"""Damage to a SQLite file: the damaged contents, with a name, that each function makes of the intact ones."""

from __future__ import annotations

import random
from collections.abc import Iterator

PAGE = 4096
SEED = 20


def bad_pages(intact: bytes) -> Iterator[tuple[str, bytes]]:
    """Each page in turn, replaced by zeros, random bytes or the contents of another page."""
    generator = random.Random(SEED)
    count = len(intact) // PAGE
    for number in range(count):
        other = (number + generator.randrange(1, count)) % count
        for name, page in (
            ("zeros", bytes(PAGE)),
            ("garbage", generator.randbytes(PAGE)),
            ("another page", intact[other * PAGE :][:PAGE]),
        ):
            yield f"page {number + 1}: {name}", intact[: number * PAGE] + page + intact[(number + 1) * PAGE :]


def bad_heads(intact: bytes) -> Iterator[tuple[str, bytes]]:
    """The header of each page, and that of the file, overwritten with random bytes."""
    generator = random.Random(SEED)
    for number in range(len(intact) // PAGE):
        at = number * PAGE + (0 if number else 100)
        yield f"page {number + 1}: head", intact[:at] + generator.randbytes(12) + intact[at + 12 :]
    yield "the file's head", generator.randbytes(100) + intact[100:]
    yield "the file's mark", b"SQLite format 2\0" + intact[16:]


def cut(intact: bytes) -> Iterator[tuple[str, bytes]]:
    """Only the first part of the file."""
    generator = random.Random(SEED)
    sizes = [1, 15, 99, 100, 511, PAGE, 2 * PAGE, len(intact) - PAGE, len(intact) - 1]
    for size in sizes + [generator.randrange(1, len(intact)) for _ in range(11)]:
        yield f"cut to {size}", intact[:size]


def flipped(intact: bytes) -> Iterator[tuple[str, bytes]]:
    """Random bit flips, in 20 files."""
    generator = random.Random(SEED)
    for number in range(20):
        damaged = bytearray(intact)
        for _ in range(20):
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        yield f"flips {number}", bytes(damaged)
