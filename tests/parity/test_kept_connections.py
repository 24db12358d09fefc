"""A vendor that closes kept-alive connections when the next request arrives fails no task."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from pomelo.testing import FaultUpstream
from tests.app import RunningApp, run_app
from tests.breaking_proxy import BreakingProxy, breaking_proxy
from tests.driver import PROTOCOL, STREAM
from tests.parity.test_upstream import LIVE

ROUNDS = 2
MODELS = [
    "gpt-4", "claude-3-haiku", "mixtral-8x7b", "flux-1-pro", "flux-1-schnell", "eleven-labs-tts", "eleven-labs-sts",
    "eleven-labs-stt",
]  # fmt: skip
BREAKS = {"reset": (True, False), "closed": (False, False), "processed, then reset": (True, True)}
"""Whether the proxy resets the connection, and whether the vendor gets the second request."""


@pytest.fixture(name="vendor", scope="module")
async def _vendor() -> AsyncIterator[FaultUpstream]:
    async with FaultUpstream() as server:
        yield server


@pytest.fixture(name="proxy", scope="module")
async def _proxy(vendor: FaultUpstream) -> AsyncIterator[BreakingProxy]:
    async with breaking_proxy(vendor.url) as proxy:
        yield proxy


@pytest.fixture(name="app", scope="module")
async def _app(
    vendor: FaultUpstream, proxy: BreakingProxy, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningApp]:
    """An app whose vendors are all behind the proxy."""
    settings = {"anthropic_api_key": "sk-upstream"}
    for name in ("openai", "anthropic", "mistral", "bfl", "together", "elevenlabs"):
        url: str = getattr(vendor, f"{name}_base_url")
        settings[f"{name}_base_url"] = url.replace(vendor.url, proxy.url)
    async with run_app(tmp_path_factory.mktemp("kept"), settings=settings) as opened:
        yield opened


@PROTOCOL
@STREAM
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("resets", "forwards"), BREAKS.values(), ids=BREAKS)
async def test_a_reused_connection_that_the_vendor_breaks_fails_no_task(
    model: str,
    stream: bool,
    resets: bool,
    forwards: bool,
    protocol: str,
    app: RunningApp,
    vendor: FaultUpstream,
    proxy: BreakingProxy,
) -> None:
    proxy.resets, proxy.forwards = resets, forwards
    key = (await app.account()).live
    body = {"model": model, **LIVE.get(model, {"messages": [{"role": "user", "content": "Hi"}]})}
    vendor.requests.clear()
    broken = proxy.broken
    outcomes = [await app.ask(protocol, key, body, stream=stream) for _ in range(ROUNDS)]
    assert [outcome.code for outcome in outcomes] == ["ok"] * ROUNDS
    posts = [request for request in vendor.requests if request.method == "POST"]
    if model.startswith(("flux", "eleven")):
        assert len(posts) == ROUNDS, "each task is billed, and reached the vendor once"
    else:
        assert proxy.broken > broken, "a kept-alive connection was used"
