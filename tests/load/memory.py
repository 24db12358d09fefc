"""The memory of another process while something goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

_EVERY = 0.02
MIB = 1024 * 1024


@dataclass(slots=True)
class Peak:
    """The most that was seen, in bytes of resident memory, and how often it was looked at."""

    most: int = 0
    looks: int = 0


def resident(pid: int) -> int:
    """The resident memory of a process, in bytes."""
    return int(psutil.Process(pid).memory_info().rss)


@contextmanager
def watched(pid: int) -> Iterator[Peak]:
    """Looks at a process from a thread, fifty times a second, until it is left."""
    peak = Peak()
    over = threading.Event()

    def look() -> None:
        while not over.wait(_EVERY):
            peak.most = max(peak.most, resident(pid))
            peak.looks += 1

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()
        peak.most = max(peak.most, resident(pid))
