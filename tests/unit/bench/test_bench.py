"""Small rounds of the benchmark, with real processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from bench.__main__ import run_scenario
from bench.http_load import open_http
from bench.measure import measure
from bench.processes import Running, cpu_seconds, module, start
from bench.scenarios import (
    AIOHTTP,
    GRPC,
    GRPC_STREAM,
    HOPS,
    HTTPTOOLS,
    SCENARIOS,
    STREAM,
    WHOLE,
    Scenario,
    Work,
)
from bench.systems import APART, FILLED, SQLITE, Systems

SECONDS = 0.2


@pytest.fixture(scope="module")
async def systems(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Systems]:
    """The systems, on all cores."""
    async with AsyncExitStack() as stack:
        yield Systems(stack, tmp_path_factory.mktemp("bench"), (None, None), accounts=20)


@pytest.mark.parametrize(
    "scenario",
    [
        Scenario("whole", WHOLE, (AIOHTTP, HTTPTOOLS, SQLITE), 2),
        Scenario("stream", STREAM, (AIOHTTP, HTTPTOOLS, SQLITE), 2),
        Scenario("gRPC", Work("gRPC"), (GRPC, SQLITE), 2),
        Scenario("gRPC stream", GRPC_STREAM, (GRPC, SQLITE), 2),
        Scenario("speech", Work(kind="speech"), (AIOHTTP, HTTPTOOLS, SQLITE), 2),
        Scenario("upload", Work(kind="upload"), (AIOHTTP, SQLITE), 1),
        Scenario("hops", WHOLE, (HOPS,), 2),
        Scenario("apart", WHOLE, (APART,), 2),
        Scenario("filled", WHOLE, (FILLED,), 2),
        Scenario("beside", WHOLE, (SQLITE,), 1, beside=STREAM),
    ],
    ids=lambda scenario: scenario.name,
)
async def test_every_system_answers_and_is_measured(scenario: Scenario, systems: Systems) -> None:
    found = await run_scenario(scenario, systems, 1, SECONDS)
    assert list(found) == list(scenario.systems)
    for (sample,) in found.values():
        assert sample.failed == 0
        assert sample.count > 0
        assert 0 < sample.cpu < 4 * sample.seconds
        assert 0 < sample.p50 <= sample.p99 < 10
        assert sample.resident > 10_000_000


async def test_paced_streams_are_counted_by_their_tokens(systems: Systems) -> None:
    scenario = Scenario("paced", Work(rate=20), (AIOHTTP, SQLITE), 10)
    for (sample,) in (await run_scenario(scenario, systems, 1, 1.0)).values():
        assert sample.failed == 0
        assert sample.count == pytest.approx(10 * 20 * sample.seconds, rel=0.3)
        assert 0 <= sample.p50 <= sample.p99 < 5


async def test_requests_that_are_refused_are_no_requests_that_were_served(systems: Systems) -> None:
    system = replace(await systems.get(SQLITE), key="pml_live_wrong")
    with pytest.raises(RuntimeError, match=r"refused: \d+ requests failed: 401"):
        await measure(Scenario("refused", WHOLE, (SQLITE,), 2), system, SECONDS)


async def test_an_answer_without_the_end_of_a_stream_has_failed(systems: Systems) -> None:
    system = await systems.get(SQLITE)
    async with open_http(system.url, WHOLE.request(system), 1, ending=b"data: [DONE]\n\n") as callers:
        load = await callers.run(0)
    assert (load.failed, load.latencies) == (1, [])
    assert load.failure.startswith("200 ")


async def test_processor_time_is_that_of_all_threads_of_a_process(tmp_path: Path) -> None:
    (tmp_path / "burn.py").write_text(
        "import threading, time\n"
        "def burn():\n"
        "    while time.thread_time() < 0.2: pass\n"
        "thread = threading.Thread(target=burn); thread.start(); burn(); thread.join()\n"
        "print('burnt', time.process_time(), flush=True)\n"
        "time.sleep(60)\n"
    )
    burning = start(module("burn"), tmp_path / "output", ready="burnt", PYTHONPATH=str(tmp_path))
    async with burning as process:
        reported = float(process.printed().split()[1])
        assert reported > 0.4
        assert cpu_seconds([process]) == pytest.approx(reported, abs=0.05)


async def test_a_process_that_ends_at_once_is_reported_with_its_output(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="No module named no_such_module"):
        async with start(module("no_such_module"), tmp_path / "output", ready="never"):
            pass


async def test_a_process_ends_with_its_context(tmp_path: Path) -> None:
    async with start(module("bench.vendor"), tmp_path / "output", ready="http://") as vendor:
        assert isinstance(vendor, Running)
        began = time.monotonic()
    assert time.monotonic() - began < 10
    host, _, port = vendor.url.removeprefix("http://").partition(":")
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, int(port))


def test_every_scenario_has_a_name_of_its_own() -> None:
    assert len({scenario.name for scenario in SCENARIOS}) == len(SCENARIOS)
