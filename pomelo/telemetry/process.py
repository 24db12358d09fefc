"""Measures the process itself: whether it is ready or drains, and how late its event loop is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pomelo.runtime.process import in_background
from pomelo.telemetry.instruments import Histogram
from pomelo.telemetry.metrics import Metrics
from pomelo.telemetry.readiness import Readiness

INTERVAL = 0.25
"""Seconds between two measurements of the event loop."""


@asynccontextmanager
async def measure_process(metrics: Metrics, readiness: Readiness) -> AsyncIterator[None]:
    """Measures this process while the body runs."""
    metrics.ready.read_one(lambda: not readiness.code)
    metrics.draining.read_one(lambda: readiness.draining)
    async with in_background(_measure_lag(metrics.loop_lag)):
        yield


async def _measure_lag(histogram: Histogram) -> None:
    """Observes the delay of a timer, until it is cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + INTERVAL
        await asyncio.sleep(INTERVAL)
        histogram.observe(max(0.0, loop.time() - due))
