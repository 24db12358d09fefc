"""The house under test: one app on free ports of loopback, a server that plays the vendors, keys of every kind.

Everything is real: the SQLite store, the channels, the sockets. Fixtures are per session; tests leave no
state behind but keys and media.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import aiohttp
import grpc
import pytest

from pomelo.accounts.failed_keys import FailedKeys
from pomelo.app import App, open_app, open_gateway
from pomelo.engine.circuit_breaker import CircuitBreaker
from pomelo.engine.routing import Router
from pomelo.settings import Settings
from pomelo.stores.accounts import Grant, Wallet
from pomelo.stores.base import Store
from pomelo.testing import FaultUpstream


@dataclass(frozen=True)
class Keys:
    """One key of each kind, whole."""

    test: str
    live: str
    only_haiku: str
    revoked: str
    expired: str


@pytest.fixture(scope="session", autouse=True)
def _a_clean_environment() -> None:
    for name in [n for n in os.environ if n.startswith("POMELO_") or n.endswith(("_API_KEY", "_BASE_URL"))]:
        del os.environ[name]


@pytest.fixture(scope="session")
async def upstream() -> AsyncIterator[FaultUpstream]:
    """A server that speaks the vendors' wires, and misbehaves on request."""
    async with FaultUpstream() as server:
        yield server


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory, upstream: FaultUpstream) -> Settings:
    """Settings of the app: free ports, an empty data folder, the playing vendors; all but Anthropic."""
    return Settings(
        rest="127.0.0.1:0",
        grpc="127.0.0.1:0",
        data=tmp_path_factory.mktemp("data"),
        openai_api_key="sk-test-upstream",
        openai_base_url=upstream.openai_base_url,
        mistral_api_key="mistral-upstream",
        mistral_base_url=upstream.mistral_base_url,
        bfl_api_key="bfl-upstream",
        bfl_base_url=upstream.bfl_base_url,
        together_api_key="together-upstream",
        together_base_url=upstream.together_base_url,
        elevenlabs_api_key="elevenlabs-upstream",
        elevenlabs_base_url=upstream.elevenlabs_base_url,
        upstream_connections=1024,  # an account may use most of them, and tests use one for hundreds of streams
        grace=2.0,
    )


@pytest.fixture(scope="session")
async def app(settings: Settings) -> AsyncIterator[App]:
    """A running Pomelo with the gRPC server and the REST gateway. Its circuit breakers never open,
    and the failed keys of an address are not limited."""
    patient = partial(Router, breaker=partial(CircuitBreaker, minimum_calls=10**9))
    failed_keys = FailedKeys(limit=10**9)
    async with open_app(settings, make_router=patient, failed_keys=failed_keys) as running:
        await endow(running.store)
        yield running


async def endow(store: Store, account: str = "default") -> None:
    """Frees an account of limits, and gives it more credits than any test can spend."""
    await store.set_plan(account, "unlimited")
    for live in (True, False):
        await store.grant(Grant(f"{account} {live}", Wallet(account, live), 10**13, time.time()))


@pytest.fixture(scope="session")
async def keys(app: App) -> Keys:
    """One key of each kind."""
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
    """Where REST answers in the app's own process, without a slash at its end."""
    assert app.rest is not None
    return "http://{}:{}".format(*app.rest)


@pytest.fixture(scope="session")
async def gateway_url(app: App, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """Where a gateway answers that reaches the app over gRPC."""
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
    """A client of REST."""
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture(scope="session")
async def channel(app: App) -> AsyncIterator[grpc.aio.Channel]:
    """A client's channel to the app, with the sizes that clients have by default."""
    assert app.grpc is not None
    async with grpc.aio.insecure_channel(app.grpc) as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder."""
    return tmp_path
