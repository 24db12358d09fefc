"""The metrics of real servers: their sums equal the ledger's, and they contain nothing of a caller."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from pomelo import money
from pomelo.stores.usage import UsageQuery
from pomelo.telemetry.exposition import Exposition
from pomelo.telemetry.metrics import Metrics
from pomelo.testing import Answer, FaultUpstream, Gate, error_reply
from tests.app import RunningApp, run_app
from tests.integration.commands import live_key, pomelo_json
from tests.integration.test_workers import workers
from tests.ports import free_port
from tests.redis_server import RedisServer
from tests.scrapes import Scrape, scrape
from tests.serving import Served, serve
from tests.tasks import text_body
from tests.waiting import first as first_of
from tests.waiting import until

SECRET = "canary-9f27c1"
"""Text of a caller, which no metric may contain."""


async def ledger_sums(app: RunningApp) -> dict[tuple[str, ...], tuple[int, int, int, float]]:
    """Returns the tasks, tokens and credits of the store, by model and mode."""
    sums = await app.server.store.sum_usage(UsageQuery(), ("model", "mode"))
    return {
        each.groups: (each.tasks, each.input_tokens, each.output_tokens, each.cost / money.MICROS)
        for each in sums
    }


def counted_sums(found: Scrape) -> dict[tuple[str, ...], tuple[int, int, int, float]]:
    """Returns the same of the metrics."""
    tasks = dict.fromkeys(found.by("pomelo_cost_credits_total", "model", "mode"), 0.0)
    for (model, mode, code), count in found.by("pomelo_tasks_total", "model", "mode", "code").items():
        if code == "ok":
            tasks[model, mode] += count
    names = ("pomelo_input_tokens_total", "pomelo_output_tokens_total", "pomelo_cost_credits_total")
    parts = [tasks, *[found.by(name, "model", "mode") for name in names]]
    return {
        group: (int(count), int(parts[1][group]), int(parts[2][group]), round(parts[3][group], 6))
        for group, count in tasks.items()
    }


async def test_the_sums_of_one_process_equal_the_ledgers(tmp_path: Path) -> None:
    metrics = Metrics()
    async with run_app(tmp_path, metrics=metrics) as app:
        account = await app.account()
        app.upstream.default = Answer("Hello")
        for protocol in app.urls:
            for stream in (False, True):
                assert (await app.ask(protocol, account.live, text_body(SECRET), stream=stream)).code == "ok"
        assert (await app.ask("grpc", account.test, text_body(SECRET))).code == "ok"
        app.upstream.default = error_reply(401, code="invalid_api_key")
        assert (await app.ask("rest", account.live, text_body())).code == "provider_failed"
        assert (await app.ask("rest", account.live, text_body(model=SECRET))).code == "unsupported_model"
        assert (
            await app.ask("grpc", account.live, text_body(model=f"{SECRET}2"))
        ).code == "unsupported_model"
        assert (await app.ask("rest", account.live, text_body(model=SECRET))).code == "unsupported_model"
        assert (await app.ask("grpc", SECRET, text_body())).code == "invalid_api_key"
        found = Scrape(await Exposition(metrics).own())

        assert counted_sums(found) == await ledger_sums(app)
        tasks = found.by("pomelo_tasks_total", "protocol", "mode", "type", "model", "provider", "code")
        assert tasks == {
            ("rest", "live", "text", "gpt-4", "openai", "ok"): 4,
            ("grpc", "test", "text", "gpt-4", "sandbox", "ok"): 1,
            ("rest", "live", "text", "gpt-4", "openai", "provider_failed"): 1,
            ("grpc", "live", "", "", "", "unsupported_model"): 1,
        }
        calls = found.by("pomelo_calls_total", "protocol", "code")  # the remote gateway makes some, too
        assert calls["grpc", "invalid_api_key"] == 1
        assert calls["rest", "unsupported_model"] >= 1
        failed = found.by("pomelo_attempts_failed_total", "provider", "code", "upstream_status")
        assert {labels: count for labels, count in failed.items() if count} == {
            ("openai", "provider_failed", "4xx"): 1
        }
        assert found.total("pomelo_task_duration_seconds_count", provider="openai") == 5
        assert found.total("pomelo_task_upstream_seconds_count", provider="openai") == 5
        assert found.total("pomelo_task_first_byte_seconds_count", provider="openai") <= 4
        assert found.total("pomelo_store_operation_seconds_count", operation="settle") == 6, (
            "the failed task, too"
        )
        circuits = found.by("pomelo_circuit_state", "provider", "provider_model")
        assert {provider: state for (provider, _), state in circuits.items()} == {"openai": 0}
        for secret in (SECRET, account.name, account.live, account.live.split("_")[2]):
            assert secret not in found.text


async def test_a_running_task_shows_in_the_gauges(tmp_path: Path) -> None:
    metrics, gate = Metrics(), Gate()
    async with run_app(tmp_path, metrics=metrics) as app:
        account = await app.account()
        app.upstream.default = Answer("Hello", at={1: gate})
        running = asyncio.ensure_future(app.ask("rest", account.live, text_body(), stream=True))
        await gate.reached.wait()
        found = Scrape(await Exposition(metrics).own())
        held = (await app.balance(account, live=True)).held / money.MICROS
        assert held > 0
        assert found.by("pomelo_held_credits", "mode") == {("live",): held, ("test",): 0}
        assert 0 <= found.total("pomelo_oldest_reservation_age_seconds") < 60
        for name in ("pomelo_tasks_in_flight", "pomelo_calls_in_flight", "pomelo_upstream_connections"):
            assert found.total(name) == 1
        assert found.total("pomelo_connections", protocol="rest") >= 1
        gate.open()
        assert (await running).code == "ok"
        found = Scrape(await Exposition(metrics).own())
        assert found.total("pomelo_tasks_in_flight") == found.total("pomelo_upstream_connections") == 0


async def ask(served: Served, http: aiohttp.ClientSession, key: str, count: int) -> None:
    """Runs tasks, each on its own connection, until every worker has had some."""

    async def one() -> None:
        headers = {"Authorization": f"Bearer {key}", "Connection": "close"}
        async with http.post(f"{served.url}/api/v1/task", json=text_body(SECRET), headers=headers) as answer:
            assert answer.status == 200, await answer.text()

    for _ in range(count):
        await asyncio.gather(*[one() for _ in range(8)])


async def ledger_totals(folder: Path, **variables: str) -> dict[str, float]:
    """Returns what `pomelo usage` says of all tasks."""
    rows: list[dict[str, Any]] = await pomelo_json(folder, "usage", "--by", "model", **variables)
    return {
        "tasks": sum(row["tasks"] for row in rows),
        "input_tokens": sum(row["input_tokens"] for row in rows),
        "output_tokens": sum(row["output_tokens"] for row in rows),
        "cost": round(sum(float(row["cost"]) for row in rows), 6),
    }


NAMES = {
    "tasks": 'pomelo_tasks_total{code="ok"}',
    "input_tokens": "pomelo_input_tokens_total",
    "output_tokens": "pomelo_output_tokens_total",
    "cost": "pomelo_cost_credits_total",
}


async def test_the_sums_of_two_workers_equal_the_ledgers_and_a_dead_worker_shows(tmp_path: Path) -> None:
    admin = f"127.0.0.1:{free_port()}"
    with RedisServer() as redis:
        async with FaultUpstream() as upstream:
            upstream.default = Answer("Hello")
            store = {"POMELO_STORE": redis.url}
            vendor = {"OPENAI_API_KEY": "sk-1", "OPENAI_BASE_URL": upstream.openai_base_url}
            settings = {"POMELO_WORKERS": "2", "POMELO_ADMIN": admin, **store, **vendor}
            async with serve(tmp_path, **settings) as served, aiohttp.ClientSession() as http:
                assert f"http://{admin}/metrics" in served.log()
                key = await live_key(tmp_path, **store)
                await ask(served, http, key, 4)
                await ask(served, http, served.key, 2)
                found = await scrape(http, admin)
                totals = {
                    name: round(
                        found.total(metric.partition("{")[0], **({"code": "ok"} if "{" in metric else {})), 6
                    )
                    for name, metric in NAMES.items()
                }
                assert totals == await ledger_totals(tmp_path, **store)
                assert totals["tasks"] == 48
                of_workers = found.by("pomelo_tasks_total", "worker")
                assert of_workers.keys() == {("0",), ("1",)}
                assert found.by("pomelo_worker_up", "worker") == {("0",): 1, ("1",): 1}
                assert found.by("pomelo_held_credits", "worker").keys() == {("0",)}
                for secret in (SECRET, key, served.key, "sk-1", redis.url):
                    assert secret not in found.text

                if program := shutil.which("prometheus"):
                    await check_prometheus(program, tmp_path, http, admin, totals)

                workers(served)[1].send_signal(signal.SIGKILL)
                async with asyncio.timeout(60):
                    await until_up(http, admin, {("0",): 1, ("1",): 0})
                    await until_up(http, admin, {("0",): 1, ("1",): 1})
                again = await scrape(http, admin)
                assert again.by("pomelo_tasks_total", "worker").get(("0",)) == of_workers[("0",)]
                assert ("1",) not in again.by("pomelo_tasks_total", "worker")
        assert not list(served.data.glob("worker-*"))


async def test_while_a_worker_drains_its_metrics_can_be_scraped_though_the_first_one_has_drained(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    admin = f"127.0.0.1:{free_port()}"
    settings = {"POMELO_WORKERS": "2", "POMELO_ADMIN": admin, "POMELO_GRACE": "60"}
    body = text_body("[[words:5]] [[stall]]", stream=True)
    streams: dict[str, list[aiohttp.ClientResponse]] = {"0": [], "1": []}
    with RedisServer() as redis:
        async with serve(tmp_path, POMELO_STORE=redis.url, **settings) as served:
            running: dict[tuple[str, ...], float] = {("0",): 0.0, ("1",): 0.0}
            while not all(running.values()):
                headers = served.headers | {"Connection": "close"}
                stream = await http.post(f"{served.url}/api/v1/task", json=body, headers=headers)
                await stream.content.readline()
                total, before = sum(running.values()) + 1, running
                while sum((running := await tasks_in_flight(http, admin)).values()) != total:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
                (worker,) = [name for (name,) in running if running[name,] > before[name,]]
                streams[worker].append(stream)
            first, _ = workers(served)
            os.kill(served.pid, signal.SIGTERM)
            close(streams["0"])
            await until(lambda: not is_connected(first, redis.port))  # its application is closed
            left = {("0",): 0, ("1",): len(streams["1"])}
            found = await first_of(
                partial(scrape, http, admin),  # a report is sent again for half a second
                lambda found: found.by("pomelo_tasks_in_flight", "worker") == left,
            )
            assert found.by("pomelo_worker_up", "worker") == {("0",): 1, ("1",): 1}
            assert found.total("pomelo_draining") == 2
            async with http.get(f"http://{admin}/accounts") as answer:
                assert answer.status == 404
            close(streams["1"])
            await until(lambda: not psutil.pid_exists(served.pid))
        assert "Traceback" not in served.log()


async def tasks_in_flight(http: aiohttp.ClientSession, admin: str) -> dict[tuple[str, ...], float]:
    return (await scrape(http, admin)).by("pomelo_tasks_in_flight", "worker")


def close(streams: list[aiohttp.ClientResponse]) -> None:
    for stream in streams:
        stream.close()


def is_connected(process: psutil.Process, port: int) -> bool:
    """Whether the process has a connection to a port."""
    with suppress(psutil.NoSuchProcess):
        return any(each.raddr and each.raddr.port == port for each in process.net_connections())
    return False


async def until_up(http: aiohttp.ClientSession, admin: str, expected: dict[tuple[str, ...], float]) -> None:
    """Returns when the workers are up or down as expected."""
    while (await scrape(http, admin)).by("pomelo_worker_up", "worker") != expected:  # noqa: ASYNC110
        await asyncio.sleep(0.05)


async def check_prometheus(
    program: str, folder: Path, http: aiohttp.ClientSession, admin: str, totals: dict[str, float]
) -> None:
    """Asserts that a real Prometheus scrapes the same sums."""
    job = {"job_name": "pomelo", "static_configs": [{"targets": [admin]}]}
    config = {"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}
    file, address = folder / "prometheus.yml", f"127.0.0.1:{free_port()}"
    file.write_text(json.dumps(config))  # YAML includes JSON
    arguments = (f"--config.file={file}", f"--storage.tsdb.path={folder / 'tsdb'}")
    process = await asyncio.create_subprocess_exec(
        program, *arguments, f"--web.listen-address={address}", stderr=asyncio.subprocess.DEVNULL
    )
    try:
        found: dict[str, float] = {}

        async def query() -> bool:
            for name, metric in NAMES.items():
                url, query = f"http://{address}/api/v1/query", {"query": f"sum({metric})"}
                try:
                    async with http.get(url, params=query) as answer:
                        result = (await answer.json())["data"]["result"]
                except aiohttp.ClientError:
                    return False
                if not result:
                    return False
                found[name] = round(float(result[0]["value"][1]), 6)
            return True

        async with asyncio.timeout(30):
            while not await query():  # noqa: ASYNC110 (the program has no event)
                await asyncio.sleep(0.1)
        assert found == totals
    finally:
        process.terminate()
        await process.wait()
