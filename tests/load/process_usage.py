"""Memory, CPU time and connections of another process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

MIB = 1024 * 1024
_INTERVAL = 0.02
"""Seconds between two samples."""


@dataclass(slots=True)
class Peak:
    """The highest resident memory in bytes, and the number of samples."""

    bytes: int = 0
    samples: int = 0


def resident(pid: int) -> int:
    """The resident memory of a process, in bytes."""
    return int(psutil.Process(pid).memory_info().rss)


def cpu_seconds(pid: int) -> float:
    """The CPU time that a process has used, in seconds."""
    used = psutil.Process(pid).cpu_times()
    return float(used.user + used.system)


def connections(pid: int, port: int) -> int:
    """The number of open connections to a port of a process."""
    open_sockets = psutil.Process(pid).net_connections("tcp")
    return sum(1 for one in open_sockets if one.laddr.port == port and one.raddr)


@contextmanager
def peak_memory(pid: int) -> Iterator[Peak]:
    """Samples the memory of a process from a thread, fifty times a second, while the body runs."""
    peak = Peak()
    done = threading.Event()

    def sample() -> None:
        while not done.wait(_INTERVAL):
            peak.bytes = max(peak.bytes, resident(pid))
            peak.samples += 1

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak.bytes = max(peak.bytes, resident(pid))
