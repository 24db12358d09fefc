"""Memory, CPU time and connections of another process."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

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
    return int(psutil.Process(pid).memory_info().rss)


def cpu_seconds(pid: int) -> float:
    used = psutil.Process(pid).cpu_times()
    return float(used.user + used.system)


def queued_seconds(pid: int) -> float:
    """The time for which the main thread of a process has waited for a processor; 0 if the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


def clock() -> float:
    """Monotonic time in seconds that stands still while the main thread of this process waits for a processor."""
    return time.monotonic() - queued_seconds(os.getpid())


def connections(pid: int, port: int) -> int:
    """The number of open connections to a port of a process."""
    open_sockets = psutil.Process(pid).net_connections("tcp")
    return sum(1 for one in open_sockets if one.laddr.port == port and one.raddr)


async def wait_closed(pid: int, port: int, left: int, seconds: float) -> None:
    """Returns when a process has at most `left` connections to a port; fails after `seconds`."""
    async with asyncio.timeout(seconds):
        while await asyncio.to_thread(connections, pid, port) > left:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


@asynccontextmanager
async def silent_connections(port: int, count: int, *sent: bytes) -> AsyncIterator[None]:
    """Opens one connection to a port of loopback for each of `sent`. It sends that and then nothing."""
    with ExitStack() as stack:
        for number in range(count):
            with suppress(ConnectionError):
                silent = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                silent.sendall(sent[number % len(sent)])
            if number % 25 == 0:
                await asyncio.sleep(0)
        yield


def open_files(pid: int) -> int:
    return int(psutil.Process(pid).num_fds())


def processes_on_uvloop(pid: int) -> int:
    """How many workers of a process have loaded uvloop; without workers, whether it has itself."""
    process = psutil.Process(pid)
    workers = process.children() or [process]
    return sum(any("uvloop" in file.path for file in worker.memory_maps()) for worker in workers)


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
