"""The error of a task whose routes all fail: callers are asked to retry if a retry may succeed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pomelo.engine.circuit_breaker import MINIMUM_CALLS
from pomelo.testing import Received, Reply
from pomelo.testing.openai_protocol import error_reply
from tests.app import run_app
from tests.driver import PROTOCOL, STREAM
from tests.tasks import text_body

CATALOG = """
[models.two-routes]
type = "text"
limits = { max_input_tokens = 100_000, max_output_tokens = 4_000 }
price = { million_input_tokens = "1", million_output_tokens = "2" }
price_version = "2026-11-24"
[[models.two-routes.routes]]
provider = "openai"
model = "first"
[[models.two-routes.routes]]
provider = "second"
model = "second"

[hosts.second]
credentials = "openai"
"""

BUSY = error_reply(429, code="slow_down", headers={"Retry-After": "7"})
REFUSED = error_reply(401, code="invalid_api_key")


@STREAM
@PROTOCOL
@pytest.mark.parametrize("replies", [(BUSY, REFUSED), (REFUSED, BUSY)], ids=["first", "second"])
async def test_a_busy_route_asks_for_a_retry_although_the_other_refuses_the_operators_key(
    tmp_path: Path, protocol: str, stream: bool, replies: tuple[Reply, Reply]
) -> None:
    def script(received: Received) -> Reply:
        return replies[received.body["model"] == "second"]

    (tmp_path / "catalog.toml").write_text(CATALOG)
    async with run_app(tmp_path, settings={"catalog": tmp_path / "catalog.toml"}) as app:
        app.upstream.default = script
        caller = await app.account()
        body = text_body(model="two-routes")
        for _ in range(2 * MINIMUM_CALLS):
            outcome = await app.ask(protocol, caller.live, body, stream=stream)
            assert outcome.code == "provider_unavailable"
            # Once the circuit of the busy route is open, the wait is until its next probe.
            assert outcome.retry_after in (1, 2, 7)
            if protocol == "grpc":
                assert outcome.trailers["grpc-retry-pushback-ms"] == f"{outcome.retry_after}000"
        assert {received.body["model"] for received in app.upstream.requests} == {"first", "second"}
        app.upstream.default = lambda received: REFUSED
        other = await app.account()
        outcome = await app.ask(protocol, other.live, body, stream=stream)
        assert (outcome.code, outcome.retry_after) == ("provider_failed", None)
