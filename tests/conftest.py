"""One app on free ports of loopback for the whole test session, in front of a fault upstream, and keys for it.

Everything is real: the SQLite store, the channels, the sockets. The tests leave no state behind but keys and
media.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import AsyncIterator, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import grpc
import hypothesis
import pytest

from pomelo.accounts.failed_keys import FailedKeys
from pomelo.app import App, open_app, open_gateway
from pomelo.configuration.front_ends import gateway_proof
from pomelo.providers import images
from pomelo.server.remote import open_remote
from pomelo.service import Services
from pomelo.settings import Settings
from pomelo.testing import FaultUpstream
from tests.app import app_settings, endow, patient_router
from tests.certificates import make_certificate
from tests.lost_errors import lost_errors, quiet_streams
from tests.serving import Served, serve

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile(
    "pomelo", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("pomelo")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Disables the garbage collector while tests are collected: it takes a fifth of the time, and finds nothing.

    Later collections skip the tests and modules, which would take them 0.4 s each.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mixes the files for several processes: one of the first half of the folders, whose tests mostly wait for
    servers, then one of the second half, whose tests mostly compute."""
    if not hasattr(config, "workerinput"):
        return
    files = dict.fromkeys(item.nodeid.partition("::")[0] for item in items)
    half = (len(files) + 1) // 2
    place = {file: 2 * (number % half) + number // half for number, file in enumerate(files)}
    items.sort(key=lambda item: place[item.nodeid.partition("::")[0]])


@pytest.fixture(scope="session", autouse=True)
def _quiet_streams() -> Iterator[None]:
    with quiet_streams():
        yield


@pytest.fixture(scope="module", autouse=True)
def _no_lost_errors() -> Iterator[None]:
    """Fails if a task or a future of Pomelo has an error that nothing in the module has waited for.

    asyncio reports it when the garbage is collected, which would be in a later test.
    """
    with lost_errors() as lost:
        yield
        gc.collect()
        gc.freeze()  # what is left lives on, and would take each later collection a fifth of a second
    assert not lost, "\n".join(lost)


@dataclass(frozen=True)
class Keys:
    """API keys of the default account, of every sort. All but `live` are in test mode."""

    test: str
    live: str
    only_haiku: str
    revoked: str
    expired: str


@pytest.fixture(scope="session", autouse=True)
def _clean_environment() -> None:
    for name in [n for n in os.environ if n.startswith("POMELO_") or n.endswith(("_API_KEY", "_BASE_URL"))]:
        del os.environ[name]


@pytest.fixture(scope="session", autouse=True)
def _quiet_exporters() -> None:
    # An exporter goes on after its test, in a thread of its own, and what it logs would be another test's.
    # `propagate` would not help: pytest adds its handlers to loggers that do not propagate, too.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)


@pytest.fixture(scope="session", autouse=True)
def _quick_polls() -> None:
    # The vendors of tests draw immediately.
    images.POLL_INTERVAL = 0.02


@pytest.fixture(scope="session", autouse=True)
def _patient_failures() -> Iterator[None]:
    # A failed task ends without its record if the store takes longer, and the disk may be busy.
    with pytest.MonkeyPatch.context() as patch:
        for module in ("reservation", "engine"):
            patch.setattr(f"pomelo.engine.{module}.STATUS_TIMEOUT", 10.0)
        yield


@pytest.fixture(scope="session")
async def upstream() -> AsyncIterator[FaultUpstream]:
    """A server with the vendors' protocols that misbehaves on request."""
    async with FaultUpstream() as server:
        yield server


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory, upstream: FaultUpstream) -> Settings:
    """The app's settings: free ports, an empty data folder, and the upstream's vendors but Anthropic."""
    # One account may use most of the upstream connections, and tests open hundreds of streams with one.
    return app_settings(tmp_path_factory.mktemp("data"), upstream, upstream_connections=1024, grace=2.0)


@pytest.fixture(scope="session")
async def app(settings: Settings) -> AsyncIterator[App]:
    """A running app with both front ends. Its circuit breakers never open, and it doesn't limit the failed
    keys of an address."""
    failed_keys = FailedKeys(limit=10**9)
    async with open_app(settings, make_router=patient_router, failed_keys=failed_keys) as running:
        await endow(running.store)
        yield running


@pytest.fixture(scope="session")
async def keys(app: App) -> Keys:
    """One key of every sort."""
    revoked_record, revoked = await app.keyring.create("default")
    await app.keyring.revoke(revoked_record.key_id)
    return Keys(
        test=(await app.keyring.create("default"))[1],
        live=(await app.keyring.create("default", live=True))[1],
        only_haiku=(await app.keyring.create("default", models=("claude-3-haiku",)))[1],
        revoked=revoked,
        expired=(await app.keyring.create("default", expires=time.time() - 1))[1],
    )


@pytest.fixture(scope="session")
def rest_url(app: App) -> str:
    """The base URL of REST in the app's own process, without a slash at its end."""
    assert app.rest is not None
    return "http://{}:{}".format(*app.rest)


@pytest.fixture(scope="session")
async def gateway_url(app: App, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """The base URL of a gateway that reaches the app over gRPC."""
    assert app.grpc is not None
    settings = Settings(
        rest="127.0.0.1:0",
        data=tmp_path_factory.mktemp("gateway"),
        secret=app.settings.root_secret().decode(),
    )
    async with open_gateway(settings, app.grpc) as (host, port):
        yield f"http://{host}:{port}"


@pytest.fixture(scope="session")
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture(scope="session")
async def channel(app: App) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to the app with gRPC's default options."""
    assert app.grpc is not None
    async with grpc.aio.insecure_channel(app.grpc) as opened:
        yield opened


@pytest.fixture(scope="session")
async def remote(app: App) -> AsyncIterator[Services]:
    """The app's services over a channel."""
    assert app.grpc is not None
    async with open_remote(app.grpc, proof=gateway_proof(app.settings.root_secret())) as services:
        yield services


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """A running server, a separate process."""
    async with serve(tmp_path_factory.mktemp("served")) as process:
        yield process


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority `ca`, and certificates that it has issued, for `server` at localhost and for `client`."""
    folder = tmp_path_factory.mktemp("tls")
    make_certificate(folder, "ca", "Test authority")
    issued = ("-addext", "subjectAltName=DNS:localhost", "-CA", "ca.pem", "-CAkey", "ca.key")
    for name in ("server", "client"):
        make_certificate(folder, name, name, *issued)
    return folder


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """Disables the garbage collector, which hides leaked calls."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path
