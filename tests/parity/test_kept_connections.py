"""A vendor that closes kept-alive connections when the next request arrives fails no task."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import grpc
import pytest

from pomelo.app import open_app, open_gateway
from pomelo.settings import Settings
from pomelo.testing import FaultUpstream
from tests.app import endow
from tests.breaking_proxy import BreakingProxy, breaking_proxy
from tests.driver import GrpcDriver, RestDriver, TaskRequest
from tests.parity.test_upstream import LIVE

ROUNDS = 2
MODELS = [
    "gpt-4", "claude-3-haiku", "mixtral-8x7b", "flux-1-pro", "flux-1-schnell", "eleven-labs-tts", "eleven-labs-sts",
    "eleven-labs-stt",
]  # fmt: skip
BREAKS: dict[str, dict[str, bool]] = {
    "reset": {},
    "closed": {"resets": False},
    "processed, then reset": {"forwards": True},
}


@pytest.fixture(name="vendor", scope="module")
async def _vendor() -> AsyncIterator[FaultUpstream]:
    async with FaultUpstream() as server:
        yield server


@pytest.fixture(name="proxy", scope="module")
async def _proxy(vendor: FaultUpstream) -> AsyncIterator[BreakingProxy]:
    async with breaking_proxy(vendor.url) as proxy:
        yield proxy


@pytest.fixture(name="client_and_key", scope="module", params=["grpc", "rest", "remote"])
async def _client_and_key(
    request: pytest.FixtureRequest,
    vendor: FaultUpstream,
    proxy: BreakingProxy,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[tuple[Any, str]]:
    """A client of an app whose vendors are all behind the proxy, and a live key."""
    settings = Settings(
        rest="127.0.0.1:0",
        grpc="127.0.0.1:0",
        data=tmp_path_factory.mktemp("data"),
        **{
            f"{name}_{field}": value
            for name in ("openai", "anthropic", "mistral", "bfl", "together", "elevenlabs")
            for field, value in (
                ("api_key", "sk-upstream"),
                ("base_url", getattr(vendor, f"{name}_base_url").replace(vendor.url, proxy.url)),
            )
        },
    )
    async with open_app(settings) as app, aiohttp.ClientSession() as session:
        await endow(app.store)
        assert app.grpc is not None
        assert app.rest is not None
        gateway = Settings(
            rest="127.0.0.1:0",
            data=tmp_path_factory.mktemp("gateway"),
            secret=settings.root_secret().decode(),
        )
        async with (
            grpc.aio.insecure_channel(app.grpc) as channel,
            open_gateway(gateway, app.grpc) as remote,
        ):
            clients: Mapping[str, Any] = {
                "grpc": GrpcDriver(channel),
                "rest": RestDriver(session, "http://{}:{}".format(*app.rest)),
                "remote": RestDriver(session, "http://{}:{}".format(*remote)),
            }
            yield clients[request.param], (await app.keyring.create(live=True))[1]


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("model", MODELS)
async def test_a_reused_connection_that_the_vendor_breaks_fails_no_task(
    model: str,
    stream: bool,
    how: str,
    client_and_key: tuple[Any, str],
    vendor: FaultUpstream,
    proxy: BreakingProxy,
) -> None:
    client, key = client_and_key
    proxy.resets, proxy.forwards = True, False
    for name, value in BREAKS[how].items():
        setattr(proxy, name, value)
    body = {"model": model, **LIVE.get(model, {"messages": [{"role": "user", "content": "Hi"}]})}
    vendor.requests.clear()
    broken = proxy.broken
    outcomes = [await client(TaskRequest(body, key, stream)) for _ in range(ROUNDS)]
    assert [outcome.code for outcome in outcomes] == ["ok"] * ROUNDS
    posts = [request for request in vendor.requests if request.method == "POST"]
    if model.startswith(("flux", "eleven")):
        assert len(posts) == ROUNDS, "each task is billed, and reached the vendor once"
    else:
        assert proxy.broken > broken, "a kept-alive connection was used"
