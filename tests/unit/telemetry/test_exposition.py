"""Metrics as text: what the official parser reads of it, and how the texts of workers are joined."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import stat
from pathlib import Path

import pytest

from pomelo.telemetry.exposition import Exposition, join_families, open_worker_socket, worker_socket
from pomelo.telemetry.metrics import Metrics
from pomelo.telemetry.store import OpenReservations
from tests.scrapes import Scrape
from tests.waiting import until


async def test_counters_histograms_and_gauges_are_reported_with_the_worker() -> None:
    metrics = Metrics()
    metrics.cost.values["gpt-4", "live"] += 1_234_567
    metrics.connections.read_one(lambda: 3, "rest")
    for seconds in (0.001, 0.002, 30.0):
        metrics.store_operations.observe(seconds, "reserve")
    found = Scrape(await Exposition(metrics, 2).own())
    assert found.total("pomelo_cost_credits_total", model="gpt-4", mode="live", worker="2") == 1.234567
    assert found.total("pomelo_connections", protocol="rest", worker="2") == 3
    name = "pomelo_store_operation_seconds"
    buckets = found.by(f"{name}_bucket", "operation", "worker", "le")
    assert [buckets["reserve", "2", le] for le in ("0.001", "0.0025", "1.0", "+Inf")] == [1, 2, 2, 3]
    assert found.total(f"{name}_count") == 3
    assert found.total(f"{name}_sum") == pytest.approx(30.003)
    assert found.by("pomelo_uncollected_credits_total", "worker") == {("2",): 0}
    metrics.uncollected.values[()] += 1_500_000
    found = Scrape(await Exposition(metrics, 2).own())
    assert found.by("pomelo_uncollected_credits_total", "worker") == {("2",): 1.5}
    assert found.total("process_resident_memory_bytes", worker="2") > 1_000_000


async def test_the_texts_of_workers_are_joined_by_family() -> None:
    texts = []
    for worker in range(3):
        metrics = Metrics()
        metrics.input_tokens.values['a"b\\c\n# HELP x', "test"] += 10 + worker
        texts.append(await Exposition(metrics, worker).own())
    first, second, third = [Scrape(text).values for text in texts]
    assert Scrape(join_families(texts)).values == first | second | third


async def test_a_worker_that_does_not_answer_is_left_out_and_reported_as_down(tmp_path: Path) -> None:
    others = {number: worker_socket(tmp_path, number) for number in (1, 2, 3)}
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind(str(others[2]))
        hanging.listen()
        async with open_worker_socket(Exposition(Metrics(), 1), others[1]):
            found = Scrape(await Exposition(Metrics(), 0, others).all())
    up = {("0",): 1.0, ("1",): 1.0, ("2",): 0.0, ("3",): 0.0}
    assert found.by("pomelo_worker_up", "worker") == up
    assert found.by("pomelo_build_info", "worker").keys() == {("0",), ("1",)}


async def test_a_reader_that_does_not_read_is_disconnected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.telemetry.exposition.WORKER_TIMEOUT", 0.5)
    metrics, path = Metrics(), worker_socket(tmp_path, 1)
    metrics.calls.values["grpc", "x" * 2**21] += 1  # more than the kernel buffers
    async with open_worker_socket(Exposition(metrics, 1), path):
        with socket.socket(socket.AF_UNIX) as stalled:
            stalled.connect(str(path))
            polled = select.poll()
            polled.register(stalled, select.POLLHUP)
            await until(lambda: bool(polled.poll(0)))


async def test_the_socket_of_a_worker_is_its_owners_and_is_removed_at_the_end(tmp_path: Path) -> None:
    path = worker_socket(tmp_path, 1)
    before = os.umask(0o022)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with open_worker_socket(Exposition(Metrics(), 1), path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert os.umask(before) == 0o022  # it was another for the socket alone
        reader, writer = await asyncio.open_unix_connection(path)
        assert Scrape((await reader.read()).decode()).values
        writer.close()
    assert not path.exists()


async def test_the_socket_of_a_worker_of_another_server_is_not_replaced(tmp_path: Path) -> None:
    path = worker_socket(tmp_path, 1)
    async with open_worker_socket(Exposition(Metrics(), 1), path):
        with pytest.raises(OSError, match=r"listens on .*worker-1\.sock\. Is Pomelo running already"):
            async with open_worker_socket(Exposition(Metrics(), 1), path):
                pass
        reader, writer = await asyncio.open_unix_connection(path)
        assert Scrape((await reader.read()).decode()).values
        writer.close()


async def test_a_path_that_is_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Use a data folder with a shorter path"):
        async with open_worker_socket(Exposition(Metrics()), worker_socket(tmp_path / ("x" * 100), 1)):
            pass


class SlowStore:
    """A store whose reservations take as long as a test wants."""

    def __init__(self) -> None:
        self.reads = 0
        self.free = asyncio.Event()

    async def reservations(self, *, own: bool = False) -> list[object]:
        self.reads += 1
        await self.free.wait()
        return []


async def test_a_slow_read_of_the_store_delays_no_report_for_long_and_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pomelo.telemetry.store.READ_TIMEOUT", 0.01)
    store, metrics = SlowStore(), Metrics()
    OpenReservations(store, lambda: 0.0).register(metrics)  # type: ignore[arg-type]
    exposition = Exposition(metrics)
    for _ in range(3):
        assert "pomelo_held_credits" in await exposition.own()
    assert store.reads == 1
    store.free.set()
    await exposition.own()
    await exposition.own()
    assert store.reads == 1


async def test_a_failed_check_of_the_store_is_counted_and_passed_on() -> None:
    async def fail() -> None:
        raise OSError("gone")

    metrics = Metrics()
    with pytest.raises(OSError, match="gone"):
        await metrics.check_store(fail)
    assert metrics.store_errors.values["check",] == 1
