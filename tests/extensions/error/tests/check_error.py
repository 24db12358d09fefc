"""The added error over all protocols: run in the copy by test_error.py."""

from __future__ import annotations

from typing import Any

from pomelo.errors import PomeloError
from pomelo.stores.base import Store
from tests.app import RunningApp, app_fixture
from tests.driver import PROTOCOL, STREAM
from tests.tasks import text_body


class ClosedStore:
    """A store that reserves nothing on a public holiday."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def reserve(self, request: Any) -> Any:
        raise PomeloError("public_holiday")


running = app_fixture(wrap_store=ClosedStore)


@PROTOCOL
@STREAM
async def test_every_protocol_reports_it(running: RunningApp, protocol: str, stream: bool) -> None:
    account = await running.account()
    refused = await running.ask(protocol, account.test, text_body(max_tokens=50), stream=stream)
    assert refused.code == "public_holiday"
    assert refused.message == "Closed on a public holiday. Come back tomorrow"
    assert refused.retry_after == 3_600
    if protocol == "grpc":
        assert refused.grpc_status == "UNAVAILABLE"
    else:
        assert refused.status == 503


async def test_the_openapi_description_lists_it(running: RunningApp) -> None:
    async with running.session.get(f"{running.urls['rest']}/openapi.json") as answer:
        assert "public_holiday" in await answer.text()
