"""How the application connects its parts: what its front ends, its metrics and its services are given."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import time
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from pydantic import ByteSize

from pomelo.addresses import split_address
from pomelo.app import open_app, open_gateway
from pomelo.gen.v1.model_service_pb2 import ListModelsRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.reload import GatewayReloader
from pomelo.settings import Settings
from pomelo.telemetry.metrics import Metrics
from pomelo.telemetry.readiness import Readiness
from tests.calls import bearer, call_of
from tests.certificates import make_certificate

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
        found = readings(metrics)
        assert found.pop("connections_limit")["rest",] == 77
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
        open_app(settings(tmp_path, rest="", **secret)) as app,
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
            assert readings(metrics)["connections_limit"] == {("rest",): 55}
            assert readings(metrics)["calls_in_flight"] == {(): 0}
        (record,) = (await app.store.list_usage(_all(), limit=9))[0]
        # A server recognises a gateway that has its secret.
        assert record.wire == ("rest" if secure else "grpc")
    assert ("can't recognise this gateway" in caplog.text) != secure
    assert metrics.calls.values["rest", "ok"] == 2


def _all() -> Any:
    from pomelo.stores.usage import UsageQuery

    return UsageQuery()
