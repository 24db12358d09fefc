"""How the application connects its parts: what its front ends, its metrics and its services are given."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import time
from base64 import b64encode
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from pydantic import ByteSize

from pomelo.app import open_app, open_gateway
from pomelo.configuration.reload import GatewayReloader
from pomelo.gen.admin.v1 import admin_service_pb2 as pb
from pomelo.gen.v1.account_service_pb2 import ModelSet
from pomelo.gen.v1.model_service_pb2 import ListModelsRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.gen.v1.usage_pb2 import Mode
from pomelo.network.addresses import split_address
from pomelo.server.server import ServerOptions, open_server
from pomelo.settings import Settings
from pomelo.stores.fleet import Fleet, Process
from pomelo.stores.redis import open_redis
from pomelo.telemetry.metrics import Metrics
from pomelo.telemetry.readiness import Readiness
from pomelo.telemetry.store import OPERATIONS
from tests.calls import bearer, call_of
from tests.certificates import make_certificate
from tests.integration.scripted_services import KEY, ScriptedServices
from tests.redis_server import RedisServer
from tests.tasks import to_task
from tests.unit.catalog.entries import entry
from tests.waiting import until

HELLO = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}


@pytest.fixture(scope="module", name="certificate")
def _certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tls")
    make_certificate(folder, "c", "localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    return {"tls_cert": folder / "c.pem", "tls_key": folder / "c.key"}


def settings(folder: Path, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "rest": "127.0.0.1:0",
        "grpc": "127.0.0.1:0",
        "data": folder / "data",
        "grace": 0.1,
    }
    return Settings(**(values | changes))


def readings(metrics: Metrics) -> dict[str, dict[tuple[str, ...], float]]:
    """What the gauges read now, by name."""
    gauges = (
        "connections_limit",
        "media_limit",
        "media_bytes",
        "tasks_in_flight",
        "calls_in_flight",
        "ready",
    )
    return {name: dict(getattr(metrics, name).readings()) for name in gauges}


async def test_both_front_ends_have_tls_and_one_engine(tmp_path: Path, certificate: dict[str, Path]) -> None:
    metrics = Metrics()
    own = settings(tmp_path, **certificate, max_connections=77, media_limit=ByteSize(10**9))
    context = ssl.create_default_context(cafile=certificate["tls_cert"])
    async with (
        open_app(own, metrics=metrics) as app,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as http,
    ):
        assert app.rest is not None
        assert app.grpc is not None
        url = "https://{}:{}".format(*app.rest)
        key = (await app.keyring.create("default", live=False))[1]
        headers = {"Authorization": f"Bearer {key}"}
        async with http.post(f"{url}/api/v1/task", json=HELLO, headers=headers) as answer:
            assert (answer.status, answer.headers["X-Pomelo-Mode"]) == (200, "test")
        async with http.get(f"{url}/api/v1/models", headers=headers) as answer:
            listed = {model["id"] for model in (await answer.json())["data"]}
        credentials = grpc.ssl_channel_credentials(certificate["tls_cert"].read_bytes())
        async with grpc.aio.secure_channel(app.grpc, credentials) as channel:
            request = ListModelsRequest(page_size=1_000)
            models = await ModelServiceStub(channel).ListModels(request, metadata=bearer(key))
        assert {model.id for model in models.models} == listed

        async def chunks() -> Any:
            yield b"ID3" + bytes(5_000)

        media = await app.services.media.upload_media("audio/mpeg", chunks(), call_of(key))
        assert media.url.startswith(f"{url}/media/")
        await until(lambda: dict(metrics.calls_in_flight.readings()) == {(): 0})
        found = readings(metrics)
        assert found.pop("connections_limit")["rest",] == 77
        assert 0 < dict(metrics.certificate_end.readings())[()] - time.time() <= 2 * 86_400
        assert found == {
            "media_limit": {(): 10**9},
            "media_bytes": {(): 8_192},
            "tasks_in_flight": {(): 0},
            "calls_in_flight": {(): 0},
            "ready": {(): 1},
        }
        assert own.admin_socket.exists()
        assert sum(metrics.tasks.values.values()) == 1
        assert metrics.tasks.values["rest", "test", "text", "gpt-4", "sandbox", "ok"] == 1
    assert not own.admin_socket.exists()


async def test_failures_that_are_alerted_are_0_before_the_first(tmp_path: Path) -> None:
    metrics = Metrics()
    async with open_app(settings(tmp_path, openai_api_key="sk-x", mistral_api_key="y"), metrics=metrics):
        assert metrics.failed_attempts.values == {
            ("openai", "provider_failed", "4xx"): 0,
            ("mistral", "provider_failed", "4xx"): 0,
        }
        assert metrics.store_errors.values == {(name,): 0 for name in (*OPERATIONS, "archive", "check")}


async def test_a_call_whose_body_is_not_there_yet_is_in_flight_in_the_server_and_in_its_gateway(
    tmp_path: Path,
) -> None:
    server, gateway = Metrics(), Metrics()
    own = settings(tmp_path, rest="", max_calls=40)
    through = settings(tmp_path, data=tmp_path / "gateway", max_calls=30)
    async with open_app(own, metrics=server) as app:
        assert app.grpc is not None
        key = (await app.keyring.create("default", live=False))[1]
        async with open_gateway(through, app.grpc, metrics=gateway) as address:
            await slow_body(address, key, gateway)
        assert dict(server.calls_limit.readings()) == {(): 40}
        assert dict(gateway.calls_limit.readings()) == {(): 30}
    metrics = Metrics()
    async with open_app(settings(tmp_path), metrics=metrics) as app:
        assert app.rest is not None
        await slow_body(app.rest, (await app.keyring.create("default", live=False))[1], metrics)


async def slow_body(address: tuple[str, int], key: str, metrics: Metrics) -> None:
    """Sends a request without its body, and waits until it is counted, and until it no longer is."""
    _, writer = await asyncio.open_connection(*address)
    head = f"POST /api/v1/task HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{".encode())
    await until(lambda: dict(metrics.calls_in_flight.readings()) == {(): 1})
    writer.close()
    await until(lambda: dict(metrics.calls_in_flight.readings()) == {(): 0})


async def test_a_reload_replaces_the_certificate_of_both_front_ends_and_keeps_it_without_another(
    tmp_path: Path, certificate: dict[str, Path]
) -> None:
    files = {name: tmp_path / path.name for name, path in certificate.items()}
    for name, path in certificate.items():
        shutil.copy(path, files[name])
    own = settings(tmp_path, **files)
    async with open_app(own) as app:
        assert app.rest is not None
        assert app.grpc is not None
        addresses = app.rest, split_address(app.grpc)

        async def presented() -> set[str]:
            return {await asyncio.to_thread(ssl.get_server_certificate, each) for each in addresses}

        assert await presented() == {files["tls_cert"].read_text()}
        make_certificate(tmp_path, "c", "another")
        await app.reload(lambda: own)
        assert await presented() == {files["tls_cert"].read_text()} != {certificate["tls_cert"].read_text()}
        await app.reload(lambda: settings(tmp_path))
        assert await presented() == {files["tls_cert"].read_text()}


async def test_a_reload_reaches_all_that_know_plans_models_and_providers(tmp_path: Path) -> None:
    metrics, catalog = Metrics(), tmp_path / "catalog.toml"
    catalog.write_text(entry("mine", "text").replace('"p"', '"openai"'))
    own = settings(tmp_path, rest="", grpc="")
    changes = {"catalog": catalog, "plans": {"seven": {"requests_per_minute": 7}}, "openai_api_key": "x"}
    new = settings(tmp_path, rest="", grpc="", **changes)
    async with open_app(own, metrics=metrics) as app:
        await app.reload(lambda: new)
        operator, services = app.operator, app.services
        await operator.set_account_plan(pb.SetAccountPlanRequest(account_id="default", plan="seven"))
        assert (await operator.get_server(pb.GetServerRequest())).providers == ["openai"]
        keys = {}
        for mode in (Mode.MODE_TEST, Mode.MODE_LIVE):
            request = pb.CreateKeyRequest(mode=mode, models=ModelSet(models=["mine"]))
            keys[mode] = (await operator.create_key(request)).secret
            listed = await services.models.list_models(ListModelsRequest(), call_of(keys[mode]))
            assert [(model.id, model.available) for model in listed.models] == [("mine", True)]
        call = call_of(keys[Mode.MODE_TEST])
        await services.tasks.run_task(to_task(HELLO | {"model": "mine"}), TaskOptions(), call)
        assert call.response_headers["X-RateLimit-Limit"] == "7"
        call = call_of(keys[Mode.MODE_TEST])
        assert (await services.accounts.get_account(call)).limits.requests_per_minute == 7
        assert call.response_headers["X-RateLimit-Limit"] == "7"
        assert dict(metrics.tasks.values) == {("rest", "test", "text", "mine", "sandbox", "ok"): 1}


async def test_a_reload_is_shown_to_the_other_processes_of_the_store(tmp_path: Path) -> None:
    with RedisServer() as redis:
        own = settings(tmp_path, rest="", grpc="", store=redis.url)
        new = own.model_copy(update={"plans": settings(tmp_path, plans={"new": {}}).plans})
        other = Process("another machine", 0.0, 0.0, {})
        async with (
            open_app(own) as app,
            open_redis(redis.url, f"sqlite:{tmp_path / 'other.db'}") as store,
        ):
            assert isinstance(store, Fleet)
            (before,) = await store.register(other)
            await app.reload(lambda: new)
            (after,) = await store.register(other)
            assert {name for name in after.facts if after.facts[name] != before.facts[name]} == {"plans"}


async def test_only_the_first_worker_says_that_another_machine_differs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer() as redis:
        own = settings(tmp_path, rest="", grpc="", store=redis.url)
        async with open_redis(redis.url, f"sqlite:{tmp_path / 'other.db'}") as store:
            assert isinstance(store, Fleet)
            await store.register(Process("another machine", 0.0, 0.0, {"plans": "others"}))
            for worker, lines in ((None, 1), (0, 1), (1, 0)):
                caplog.clear()
                async with open_app(own, worker=worker):
                    pass
                assert caplog.text.count("another machine differ in: plans") == lines


async def test_a_front_end_without_an_address_is_not_served(tmp_path: Path) -> None:
    readiness, now = Readiness("store_unavailable"), time.time()
    own = settings(tmp_path, rest="", grpc="")
    async with open_app(own, readiness=readiness, worker=1, now=lambda: now) as app:
        assert (app.rest, app.grpc, readiness.code) == (None, None, "")
        assert not own.admin_socket.exists()  # the first worker serves the operator
    assert readiness.draining


@pytest.mark.parametrize("secure", [False, True])
async def test_a_gateway_serves_what_a_server_elsewhere_answers(
    tmp_path: Path, certificate: dict[str, Path], secure: bool, caplog: pytest.LogCaptureFixture
) -> None:
    secret = {"secret": "s" * 40} if secure else {}
    tls = certificate if secure else {}
    metrics = Metrics()
    context = ssl.create_default_context(cafile=certificate["tls_cert"]) if secure else True
    gateway = settings(tmp_path / "gateway", max_connections=55, **secret, **tls)
    async with (
        open_app(settings(tmp_path, rest="", inline_limit=ByteSize(1_000), **secret)) as app,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as http,
    ):
        assert app.grpc is not None
        key = (await app.keyring.create("default", live=False))[1]
        reloader = GatewayReloader(gateway)
        async with open_gateway(gateway, app.grpc, reloader=reloader, metrics=metrics) as (host, port):
            url = f"{'https' if secure else 'http'}://{host}:{port}"
            headers = {"Authorization": f"Bearer {key}"}
            async with http.post(f"{url}/api/v1/task", json=HELLO, headers=headers) as answer:
                assert answer.status == 200
            async with http.get(f"{url}/api/v1/models", headers=headers) as answer:
                assert answer.status == 200
            # To a server without its secret, the gateway passes no audio inline: its limit may be any.
            speech = {"model": "eleven-labs-stt", "audio": b64encode(b"ID3" + bytes(5_000)).decode()}
            async with http.post(f"{url}/api/v1/task", json=speech, headers=headers) as answer:
                assert answer.status == 200
            assert readings(metrics)["connections_limit"] == {("rest",): 55}
            assert bool(dict(metrics.certificate_end.readings())) is secure
            await until(lambda: readings(metrics)["calls_in_flight"] == {(): 0})
        records = (await app.store.list_usage(_all(), limit=9))[0]
        # A server recognises a gateway that has its secret.
        assert [record.wire for record in records] == ["rest" if secure else "grpc"] * 2
    assert ("can't recognise this gateway" in caplog.text) != secure
    assert metrics.calls.values["rest", "ok"] == 3


async def test_a_gateway_reaches_a_server_at_a_unix_socket_without_tls(tmp_path: Path) -> None:
    server = ServerOptions(f"unix:{tmp_path / 'grpc.sock'}", grace=0)
    async with (
        open_server(ScriptedServices().services(), server),
        open_gateway(settings(tmp_path), server.address) as (host, port),
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as http,
        http.get(f"http://{host}:{port}/api/v1/models") as answer,
    ):
        assert answer.status == 200


def _all() -> Any:
    from pomelo.stores.usage import UsageQuery

    return UsageQuery()
