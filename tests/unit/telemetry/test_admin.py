"""The operator's HTTP server: its pages, and what a hostile or slow client gets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import cast

import aiohttp
import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families as parse

from pomelo.telemetry import admin
from pomelo.telemetry.admin import MAX_CONNECTIONS, open_admin
from pomelo.telemetry.exposition import CONTENT_TYPE, Exposition
from pomelo.telemetry.metrics import Metrics
from pomelo.telemetry.readiness import Readiness
from tests.waiting import until


class CountedExposition(Exposition):
    """Counts its reports."""

    reports = 0

    async def all(self) -> str:
        self.reports += 1
        return await super().all()


@asynccontextmanager
async def served(
    readiness: Readiness | None = None,
    exposition: Exposition | None = None,
    lifetime: float = 10.0,
    address: str = "127.0.0.1:0",
) -> AsyncIterator[str]:
    """Serves; yields the address."""
    exposition, readiness = exposition or Exposition(Metrics()), readiness or Readiness()
    async with open_admin(address, exposition, readiness, lifetime=lifetime) as bound:
        yield bound


async def exchange(address: str, request: bytes) -> bytes:
    """Sends bytes, and returns all that is received until the connection is closed."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    try:
        async with asyncio.timeout(20):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_metrics_are_in_the_format_of_prometheus() -> None:
    async with (
        served() as address,
        aiohttp.ClientSession() as http,
        http.get(f"http://{address}/metrics") as answer,
    ):
        assert (answer.status, answer.headers["Content-Type"]) == (200, CONTENT_TYPE)
        assert "pomelo_build" in {family.name.removesuffix("_info") for family in parse(await answer.text())}


@pytest.mark.parametrize("listening", ["[::]:0", "localhost:0"])
async def test_all_addresses_of_a_host_are_served(listening: str) -> None:
    async with served(address=listening) as address:
        port = address.rpartition(":")[2]
        for host in {found[4][0] for found in socket.getaddrinfo("localhost", None)} | {"127.0.0.1"}:
            answer = await exchange(f"{host}:{port}", b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200 "), host


async def test_readiness_says_what_is_wrong_and_liveness_does_not_depend_on_it() -> None:
    readiness = Readiness("store_unavailable")
    async with served(readiness) as address, aiohttp.ClientSession() as http:
        async with http.get(f"http://{address}/readyz") as answer:
            assert answer.status == 503
            assert await answer.json() == {
                "status": "unavailable",
                "code": "store_unavailable",
                "reason": "the store can't be reached or written",
            }
        readiness.drain()
        async with http.get(f"http://{address}/readyz") as answer:
            assert (answer.status, (await answer.json())["reason"]) == (503, "the server is draining")
        async with http.get(f"http://{address}/livez") as answer:
            assert (answer.status, await answer.json()) == (200, {"status": "ok"})
    async with (
        served() as address,
        aiohttp.ClientSession() as http,
        http.get(f"http://{address}/readyz") as answer,
    ):
        assert (answer.status, await answer.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"HEAD /readyz HTTP/1.1", 200),
        (b"GET /metrics?x=1 HTTP/1.1", 200),
        (b"POST /metrics HTTP/1.1", 405),
        (b"OPTIONS * HTTP/1.1", 404),
        (b"GET //metrics HTTP/1.1", 404),
        (b"GET /../metrics HTTP/1.1", 404),
        (b"GET http://other.example/metrics HTTP/1.1", 200),
        (b"GET / HTTP/1.1", 404),
        (b"\x16\x03\x01\x02\x00", 400),
        (b"GET /" + b"x" * 20_000 + b" HTTP/1.1", 400),
    ],
)
async def test_every_connection_gets_one_answer_and_is_closed(request_line: bytes, status: int) -> None:
    async with served() as address:
        answer = await exchange(address, (request_line + b"\r\nHost: localhost\r\n\r\n") * 2)
    assert answer.split()[1] == str(status).encode()
    assert answer.count(b"HTTP/1.") == 1


@pytest.mark.parametrize(
    "request_bytes",
    [b"", b"GET /met", b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n"],
    ids=["silent", "half a request line", "half a head"],
)
async def test_a_connection_that_sends_no_whole_request_is_closed(request_bytes: bytes) -> None:
    async with served(lifetime=0.2) as address:
        assert await exchange(address, request_bytes) == b""


async def test_a_client_that_reads_nothing_is_disconnected() -> None:
    metrics = Metrics()
    for number in range(30_000):
        metrics.input_tokens.values[f"model-{number:0200}", "test"] += 1
    async with served(exposition=Exposition(metrics), lifetime=1.0) as address:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await asyncio.sleep(3)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(7_000_000)
        writer.close()


async def test_connections_beyond_the_limit_are_closed_and_the_others_served() -> None:
    async with served() as address:
        host, _, port = address.rpartition(":")
        held = [await asyncio.open_connection(host, int(port)) for _ in range(MAX_CONNECTIONS)]
        assert await exchange(address, b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n") == b""
        reader, writer = held[0]
        writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        assert (await exchange(address, b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")).startswith(
            b"HTTP/1.1 200 "
        )
        for _, writer in held:
            writer.close()


async def test_many_requests_for_metrics_cost_one_report() -> None:
    exposition = CountedExposition(Metrics())
    async with served(exposition=exposition) as address:
        request = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
        answers = await asyncio.gather(*[exchange(address, request) for _ in range(10)])
        assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in answers)
        assert exposition.reports == 1
        # Frequent requests do not keep an old report.
        async with asyncio.timeout(20):
            while exposition.reports == 1:
                await exchange(address, request)


async def test_a_report_is_sent_again_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    exposition = CountedExposition(Metrics())
    request = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with served(exposition=exposition) as address:
        for seconds, reports in ((3600.0, 1), (3600.0, 1), (0.0, 2), (3600.0, 2)):
            monkeypatch.setattr("pomelo.telemetry.admin.SHARED_FOR", seconds)
            assert b"pomelo_build_info" in await exchange(address, request)
            assert exposition.reports == reports


async def test_the_pages_of_others_are_served_too(caplog: pytest.LogCaptureFixture) -> None:
    async def page(request: web.BaseRequest) -> web.Response:
        return web.Response(text="theirs", headers={"Cache-Control": "max-age=60"})

    async def broken(request: web.BaseRequest) -> web.Response:
        raise ValueError("secret")

    pages = {"/own": page, "/broken": broken}
    async with (
        open_admin("127.0.0.1:0", Exposition(Metrics()), Readiness(), find_page=pages.get) as address,
        aiohttp.ClientSession() as http,
    ):
        found = {}
        for path in ("/own", "/broken", "/other", "/livez"):
            async with http.get(f"http://{address}{path}") as answer:
                found[path] = answer.status, await answer.text(), answer.headers["Cache-Control"]
        async with http.post(f"http://{address}/own") as answer:
            assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "pomelo.telemetry"]
    assert line.startswith("/broken can't be reported\n")
    assert "ValueError" in line
    assert found == {
        "/own": (200, "theirs", "max-age=60"),
        "/broken": (500, "Internal error. The log has its trace\n", "no-store"),
        "/other": (404, "Use /metrics, /livez, /readyz\n", "no-store"),
        "/livez": (200, '{"status":"ok"}\n', "no-store"),
    }


@pytest.mark.parametrize(
    ("host", "served_there", "served_everywhere"),
    [
        ("127.0.0.1:9090", 200, 200),
        ("LOCALHOST:9090", 200, 200),
        ("[::1]:9090", 200, 200),
        ("10.0.0.5:9090", 200, 200),
        ("pomelo.monitoring.svc:9090", 403, 200),
        ("127.0.0.1.evil.example:9090", 403, 200),
        ("localhost.evil.example", 403, 200),
        ("", 403, 200),
        ("[", 403, 200),
    ],
)
async def test_a_server_on_loopback_is_read_under_no_name_that_dns_can_change(
    host: str, served_there: int, served_everywhere: int
) -> None:
    async def page(request: web.BaseRequest) -> web.Response:
        return web.Response(text="theirs")

    for listening, status in (("127.0.0.1:0", served_there), ("0.0.0.0:0", served_everywhere)):
        async with open_admin(
            listening, Exposition(Metrics()), Readiness(), find_page={"/own": page}.get
        ) as address:
            at = address.replace("0.0.0.0", "127.0.0.1")
            for path, expected in (("/metrics", status), ("/own", status), ("/livez", 200), ("/readyz", 200)):
                answer = await exchange(at, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                assert answer.split()[1] == str(expected).encode(), (listening, path)


async def test_a_probe_without_a_host_is_served() -> None:
    async with served() as address:
        assert b" 200 OK" in await exchange(address, b"GET /metrics HTTP/1.0\r\n\r\n")


async def test_nothing_runs_on_when_it_has_ended() -> None:
    before = asyncio.all_tasks()
    async with served():
        pass
    await until(lambda: asyncio.all_tasks() <= before)


async def test_an_empty_address_serves_nothing() -> None:
    async with open_admin("", Exposition(Metrics()), Readiness()) as address:
        assert address == ""


async def test_a_report_that_takes_long_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "SHARED_FOR", 0.0)
    free = asyncio.Event()

    class Slow(CountedExposition):
        async def all(self) -> str:
            text = await super().all()
            await free.wait()
            return text

    slow = Slow(Metrics())
    async with served(exposition=slow) as address:
        request = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
        first = asyncio.create_task(exchange(address, request))
        await until(lambda: slow.reports == 1)
        second = asyncio.create_task(exchange(address, request))
        await asyncio.sleep(0.1)
        free.set()
        assert (await first).endswith((await second)[-100:])
    assert slow.reports == 1


async def test_a_connection_is_closed_when_it_is_there_at_two_checks() -> None:
    aborted: list[str] = []

    class Open:
        def __init__(self, name: str) -> None:
            self.transport = SimpleNamespace(abort=lambda: aborted.append(name))

    old, young = Open("old"), Open("young")
    found = iter([[old], [old, young]])

    class Server:
        @property
        def connections(self) -> list[Open]:
            return next(found)

    with pytest.raises(RuntimeError):  # no third check
        await admin._close_old_connections(cast(web.Server, Server()), 0)
    assert aborted == ["old"]
