"""A short soak, with a real server, and the arithmetic of its slope."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from bench.soak import CANCELLED, Calls, Reading, report, slope, soak
from bench.systems import SQLITE, Systems


def test_the_slope_is_that_of_the_second_half_of_the_load() -> None:
    warm_up = [Reading(float(at), 10.0 * at, 50, 8) for at in range(10)]
    steady = [Reading(float(at), 100.0 + at / 100, 50, 8) for at in range(10, 20)]
    readings = [*warm_up, *steady, Reading(20.0, 40.0, 20, 8)]
    assert slope(readings, "memory") == pytest.approx(36.0)
    assert slope(readings, "files") == 0


def test_the_report_has_the_calls_and_the_sizes() -> None:
    readings = [Reading(60.0 * at, 100.0, 50 + at, 8) for at in range(4)] + [Reading(190.0, 90.0, 20, 8)]
    text = report(Calls(done=70, cancelled=30, failed=1, failure="503"), readings)
    assert text.startswith("70 calls in 3.0 minutes, 30 more cancelled (30%), 1 failed: 503\n")
    assert "| open files | 50 | 52 | 53 | 20 | +60.0 |\n" in text


async def test_a_soak_cancels_calls_and_leaves_no_files_open(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        system = await Systems(stack, tmp_path, (None, None)).get(SQLITE)
        calls, readings = await soak(system, 3.0, callers=4)
    assert calls.failed == 0, calls.failure
    assert calls.done > 20
    assert calls.share == pytest.approx(CANCELLED, abs=0.1)
    before, after = readings[0], readings[-1]
    assert before.memory > 20
    assert max(reading.files for reading in readings) > before.files
    # The connections to the vendor stay open for a while.
    assert after.files <= before.files + 40
