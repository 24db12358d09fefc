"""Measures one scenario on one system: a round."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import replace

from bench.http_load import HttpCallers, Load
from bench.processes import System, cpu_seconds, resident
from bench.results import Sample, percentile
from bench.scenarios import Scenario

BESIDE_CONNECTIONS = 100
WARM_UP = 0.25
"""The share of the time of a round that is not measured, before it."""

OPENED = 250
"""Paced streams that begin in a second."""

SETTLE = 0.5
"""Seconds between the beginning of the last paced stream and the measurement."""


async def measure(scenario: Scenario, system: System, seconds: float) -> Sample:
    """Loads a system for so many seconds, after a warm-up.

    Raises:
        OSError: the system refuses connections.
        RuntimeError: no request succeeded.
    """
    if scenario.work.rate:
        return await _measure_paced(scenario, system, seconds)
    async with AsyncExitStack() as stack:
        callers = await stack.enter_async_context(scenario.work.callers(system, scenario.connections))
        load = await callers.run(seconds * WARM_UP)
        _check(load, load.latencies)
        beside = None
        if scenario.beside is not None:
            others = await stack.enter_async_context(scenario.beside.callers(system, BESIDE_CONNECTIONS))
            beside = asyncio.create_task(others.run(seconds))
        began, before = time.monotonic(), cpu_seconds(system.processes)
        load = await callers.run(seconds)
        spent, cpu = time.monotonic() - began, cpu_seconds(system.processes) - before
        memory = resident(system.processes)
        if beside is not None:
            await beside
    return _sample(load, load.latencies, spent, cpu, memory)


def _check(load: Load, times: list[float]) -> None:
    if not times:
        raise RuntimeError(f"{load.failed} requests failed: {load.failure}")


async def _measure_paced(scenario: Scenario, system: System, seconds: float) -> Sample:
    """Counts tokens while all streams are open."""
    rate, count = scenario.work.rate, scenario.connections
    spread = count / OPENED
    work = replace(scenario.work, chunks=round(rate * (spread + 2 * SETTLE + seconds)))
    async with work.callers(system, count) as callers:
        assert isinstance(callers, HttpCallers)
        load, empty = Load(), resident(system.processes)
        ends = await callers.open_streams(load, spread)
        await asyncio.sleep(SETTLE)
        began, before, first = time.monotonic(), cpu_seconds(system.processes), len(load.lateness)
        await asyncio.sleep(seconds)
        spent, cpu = time.monotonic() - began, cpu_seconds(system.processes) - before
        lateness = load.lateness[first:]
        memory = resident(system.processes)
        await asyncio.gather(*ends)
    return replace(_sample(load, lateness, spent, cpu, memory), growth=(memory - empty) / count)


def _sample(load: Load, times: list[float], seconds: float, cpu: float, memory: int) -> Sample:
    _check(load, times)
    return Sample(
        count=len(times),
        seconds=seconds,
        p50=percentile(times, 0.5),
        p99=percentile(times, 0.99),
        cpu=cpu,
        resident=memory,
        failed=load.failed,
    )
