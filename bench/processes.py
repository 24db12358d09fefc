"""Processes of the benchmark: started on a core of their own, and measured from outside."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
START_TIMEOUT = 180.0
"""Seconds that a process has to be ready."""

_URL = re.compile(r"http://\S+:\d+")


def cores() -> tuple[int | None, int | None]:
    """The core of the load and the vendor, and that of the system under test. None without a second core."""
    usable = sorted(os.sched_getaffinity(0))
    return (usable[0], usable[1]) if len(usable) > 1 else (None, None)


@contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """Runs this process on a core in the body. What it starts there stays there."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass(frozen=True, slots=True)
class Running:
    """A started process with its workers. `ready_seconds` are from its start until it was ready."""

    pid: int
    output: Path
    ready_seconds: float = 0.0

    def printed(self) -> str:
        """Its output so far."""
        return self.output.read_text()

    @property
    def url(self) -> str:
        """The first URL that it has printed."""
        found = _URL.search(self.printed())
        assert found is not None, self.printed()
        return found[0]

    def family(self) -> list[psutil.Process]:
        """The process and its children."""
        process = psutil.Process(self.pid)
        return [process, *process.children(recursive=True)]


@dataclass(frozen=True, slots=True)
class System:
    """A running system. `url` is that of REST, `grpc` the address of gRPC. `headers` are sent with
    every request; the path is the vendor's own if `has_vendor_paths` is set.
    `ready_seconds` are from its start, and `idle_bytes` its memory then."""

    processes: Sequence[Running]
    url: str
    grpc: str = ""
    key: str = "none"
    has_vendor_paths: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    ready_seconds: float = 0.0
    idle_bytes: int = 0


def cpu_seconds(processes: Sequence[Running]) -> float:
    """The processor time that processes have used, user and system, in all threads."""
    return sum(_cpu_seconds(each.pid) for process in processes for each in process.family())


def _cpu_seconds(pid: int) -> float:
    # The clock that clock_getcpuclockid() gives: exact, while /proc counts in hundredths of a second.
    return time.clock_gettime((~pid << 3) | 2)


def resident(processes: Sequence[Running]) -> int:
    """The resident memory of processes in bytes."""
    return sum(int(each.memory_info().rss) for process in processes for each in process.family())


@asynccontextmanager
async def start(
    command: Sequence[str], output: Path, *, ready: str, core: int | None = None, **variables: str
) -> AsyncIterator[Running]:
    """Starts a command on a core and waits until its output contains `ready`. On leaving, terminates it.

    Raises:
        RuntimeError: it ended before it was ready. The error has its output.
        TimeoutError: it is not ready after START_TIMEOUT.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("POMELO_") and not name.endswith(("_API_KEY", "_BASE_URL"))
    }
    with output.open("wb") as sink, pinned(core):
        began = time.perf_counter()
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            cwd=ROOT,
            env=inherited | variables,
        )
    running = Running(process.pid, output)
    try:
        async with asyncio.timeout(START_TIMEOUT):
            while ready not in running.printed():
                if process.returncode is not None:
                    raise RuntimeError(f"{' '.join(command)} ended: {running.printed()}")
                await asyncio.sleep(0.005)
        yield replace(running, ready_seconds=time.perf_counter() - began)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module."""
    return [sys.executable, "-m", name, *arguments]
