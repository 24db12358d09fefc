"""Small rounds of the benchmark, with real processes."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from bench.__main__ import run_scenario
from bench.http_load import open_http
from bench.measure import measure
from bench.processes import ROOT, Running, cpu_seconds, module, start
from bench.scenarios import GRPC_STREAM, PEER_SCENARIOS, SCENARIOS, STREAM, WHOLE, Scenario, Work
from bench.systems import AIOHTTP, APART, FILLED, GRPC, HOPS, HTTPTOOLS, LINES, SQLITE, Systems

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
        Scenario("stream", STREAM, (LINES, AIOHTTP, HTTPTOOLS, SQLITE), 2),
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
    found, failures = await run_scenario(scenario, systems, 1, SECONDS)
    assert failures == []
    assert list(found) == list(scenario.systems)
    for (sample,) in found.values():
        assert sample.failed == 0
        assert sample.count > 0
        assert 0 < sample.cpu < 4 * sample.seconds
        assert 0 < sample.p50 <= sample.p99 < 10
        assert sample.resident > 10_000_000


async def test_paced_streams_are_counted_by_their_tokens(systems: Systems) -> None:
    scenario = Scenario("paced", Work(rate=20), (AIOHTTP, SQLITE), 10)
    found, _ = await run_scenario(scenario, systems, 1, 1.0)
    assert list(found) == [AIOHTTP, SQLITE]
    for (sample,) in found.values():
        assert sample.failed == 0
        assert sample.count == pytest.approx(10 * 20 * sample.seconds, rel=0.3)
        assert 0 <= sample.p50 <= sample.p99 < 5


async def test_requests_that_are_refused_are_no_requests_that_were_served(systems: Systems) -> None:
    system = replace(await systems.get(SQLITE), key="pml_live_wrong")
    with pytest.raises(RuntimeError, match=r"\d+ requests failed: 401"):
        await measure(Scenario("refused", WHOLE, (SQLITE,), 2), system, SECONDS)


async def test_a_system_that_fails_is_left_out_and_reported(systems: Systems) -> None:
    # An HTTP server that knows no HTTP/2 fails every call of gRPC.
    found, failures = await run_scenario(
        Scenario("gRPC", Work("gRPC"), (GRPC, AIOHTTP), 1), systems, 2, SECONDS
    )
    assert {name: len(samples) for name, samples in found.items()} == {GRPC: 2}
    assert len(failures) == 1
    assert re.match(rf"{AIOHTTP}: \d+ requests failed: .*UNAVAILABLE", failures[0], re.DOTALL)


async def test_without_a_floor_there_is_nothing_to_compare_with(systems: Systems) -> None:
    with pytest.raises(RuntimeError, match="UNAVAILABLE"):
        await run_scenario(Scenario("gRPC", Work("gRPC"), (AIOHTTP, GRPC), 1), systems, 1, SECONDS)


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
        "print(f'burnt {time.process_time()}', flush=True)\n"
        "time.sleep(60)\n"
    )
    burning = start(module("burn"), tmp_path / "output", ready="burnt", PYTHONPATH=str(tmp_path))
    async with burning as process:
        reported = float(process.printed().split()[1])
        assert reported > 0.4
        assert cpu_seconds([process]) == pytest.approx(reported, abs=0.05)


async def test_a_process_that_ends_immediately_is_reported_with_its_output(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="No module named no_such_module"):
        async with start(module("no_such_module"), tmp_path / "output", ready="never"):
            pass


async def test_a_process_ends_with_its_context(tmp_path: Path) -> None:
    async with start(module("bench.vendor"), tmp_path / "output", ready="http://") as vendor:
        assert isinstance(vendor, Running)
        began = time.monotonic()
    assert time.monotonic() - began < 20
    host, _, port = vendor.url.removeprefix("http://").partition(":")
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, int(port))


def test_the_page_has_the_results_of_every_scenario_and_system() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    names = [scenario.name for scenario in (*SCENARIOS, *PEER_SCENARIOS)]
    assert [name for name in names if f"\n| {name} |" not in page] == []
    systems = {system for scenario in (*SCENARIOS, *PEER_SCENARIOS) for system in scenario.systems}
    assert [system for system in systems if f"\n| {system} " not in page] == []
