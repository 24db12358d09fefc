"""Loads Pomelo for a long time, with 30 % of the calls cancelled, and shows whether anything grows.

    python -m bench.soak [--minutes 30] [--redis] [--callers 16]

Memory, open files and threads are read from outside. The slope is that of the second half of the run: in the
first one, caches and pools fill. An asyncio task that never ends keeps its memory and its connections.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import uvloop

from bench.processes import System, cores, pinned
from bench.report import machine
from bench.results import table
from bench.scenarios import Work
from bench.systems import REDIS, SQLITE, Systems
from pomelo.runtime.process import raise_descriptor_limit

CANCELLED = 0.3
"""The share of the calls that their callers cancel."""

WORKS = (
    Work(),
    Work(size=16_000),
    Work(chunks=20),
    Work(chunks=10, rate=200),
    Work(kind="speech"),
    Work("gRPC"),
    Work("gRPC", chunks=20),
    Work("gRPC", chunks=10, rate=200),
)
_CALLS = 20
"""Calls of one connection or channel."""

_CANCEL_WITHIN = 0.02
"""Seconds after which a call is cancelled, at most."""

_SETTLE = 2.0
"""Seconds between the end of the load and the last reading."""

_READINGS = 200


@dataclass(slots=True)
class Calls:
    """What became of the calls."""

    done: int = 0
    cancelled: int = 0
    failed: int = 0
    failure: str = ""

    @property
    def share(self) -> float:
        """The cancelled share."""
        return self.cancelled / max(1, self.done + self.cancelled + self.failed)


@dataclass(frozen=True, slots=True)
class Reading:
    """The size of a system. `at` is in seconds, `memory` in megabytes."""

    at: float
    memory: float
    files: int
    threads: int


def read(system: System) -> Reading:
    """Reads the size of all processes of a system."""
    family = [each for process in system.processes for each in process.family()]
    return Reading(
        time.monotonic(),
        sum(each.memory_info().rss for each in family) / 1e6,
        sum(each.num_fds() for each in family),
        sum(each.num_threads() for each in family),
    )


async def _call(system: System, work: Work, calls: Calls, until: float) -> None:
    """Makes some calls on one connection; a cancelled one ends a connection of HTTP."""
    async with work.callers(system, 1) as callers:
        for _ in range(_CALLS):
            if time.monotonic() >= until:
                return
            cancelled = calls.share < CANCELLED
            try:
                async with asyncio.timeout(random.uniform(0, _CANCEL_WITHIN) if cancelled else None):  # noqa: S311
                    load = await callers.run(0)
            except TimeoutError:
                calls.cancelled += 1
                if work.front_end == "REST":
                    return
            else:
                calls.done += len(load.latencies)
                calls.failed += load.failed
                calls.failure = calls.failure or load.failure
                if load.failed:
                    return


async def soak(system: System, seconds: float, callers: int) -> tuple[Calls, list[Reading]]:
    """Loads a system for so long. The last reading is from after the load."""
    calls, until = Calls(), time.monotonic() + seconds

    async def call() -> None:
        while time.monotonic() < until:
            await _call(system, random.choice(WORKS), calls, until)  # noqa: S311

    readings = [read(system)]
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(call())
        while time.monotonic() < until:
            await asyncio.sleep(seconds / _READINGS)
            readings.append(read(system))
    await asyncio.sleep(_SETTLE)
    return calls, [*readings, read(system)]


def slope(readings: Sequence[Reading], name: str) -> float:
    """The growth of an attribute an hour, in the second half of the load."""
    half = readings[len(readings) // 2 : -1]
    line = statistics.linear_regression([each.at for each in half], [getattr(each, name) for each in half])
    return line.slope * 3600


def report(calls: Calls, readings: Sequence[Reading]) -> str:
    """Says what was called and what has grown, in Markdown."""
    first, middle, end, after = (readings[n] for n in (0, len(readings) // 2, -2, -1))
    rows = [
        (
            title,
            *(f"{getattr(reading, name):,.0f}" for reading in (first, middle, end, after)),
            f"{slope(readings, name):+,.1f}",
        )
        for title, name in (("memory, MB", "memory"), ("open files", "files"), ("threads", "threads"))
    ]
    spent = end.at - first.at
    failed = f", {calls.failed} failed: {calls.failure}" if calls.failed else ""
    return (
        f"{calls.done:,} calls in {spent / 60:.1f} minutes, {calls.cancelled:,} more cancelled"
        f" ({calls.share:.0%}){failed}\n\n"
        + table(("", "before", "half way", "at the end", "after the load", "slope an hour"), rows)
    )


async def run(name: str, minutes: float, callers: int) -> str:
    """Starts a system and soaks it; returns the report."""
    raise_descriptor_limit()
    load, under_test = cores()
    with tempfile.TemporaryDirectory() as folder, pinned(load):
        async with AsyncExitStack() as stack:
            system = await Systems(stack, Path(folder), (load, under_test)).get(name)
            return report(*await soak(system, minutes * 60, callers))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description="Whether anything grows.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--redis", action="store_true", help="with Redis in place of SQLite")
    given = parser.parse_args()
    text = uvloop.run(run(REDIS if given.redis else SQLITE, given.minutes, given.callers))
    sys.stdout.write(f"{machine('bench.soak')}\n{text}")


if __name__ == "__main__":
    main()
