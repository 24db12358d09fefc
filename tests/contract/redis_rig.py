"""Fixtures for tests of the store on Redis: real servers, emptied before each test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from pomelo.stores import open_store
from pomelo.stores.accounts import Grant
from pomelo.stores.base import StoreError
from pomelo.stores.redis import Timing, open_redis
from tests.contract.ledger_rig import WALLET
from tests.redis_server import RedisServer, binary, shipped_binary


@pytest.fixture(scope="module", params=["machine", "shipped"])
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """The server of this machine and the one that a package ships: Redis and Valkey, if both exist."""
    program = binary() if request.param == "machine" else shipped_binary()
    if request.param == "shipped" and binary() == program:
        pytest.skip("the machine has only this server")
    with RedisServer(program=program) as started:
        yield started


@pytest.fixture(autouse=True)
def emptied(server: RedisServer) -> None:
    server.do("FLUSHALL")


def open_on(url: str, folder: Path, **timing: float) -> Any:
    # On a busy machine, a thousand concurrent calls may take longer than the usual timeout.
    timing = {"timeout": 20.0, "attempt_timeout": 5.0} | timing
    return open_redis(url, f"sqlite:{folder / 'usage.db'}", timing=Timing(**timing))


async def open_with_credits(stack: AsyncExitStack, server: RedisServer, folder: Path, **timing: float) -> Any:
    store = await stack.enter_async_context(open_on(server.url, folder, **timing))
    await store.add_account(WALLET.account, "pro", 1.0)
    await store.grant(Grant("g", WALLET, 1_000, 1.0))
    return store


async def refusal_message(url: str, folder: Path) -> str:
    with pytest.raises(StoreError) as caught:
        async with open_store(url, archive=f"sqlite:{folder / 'usage.db'}"):
            pass
    message = str(caught.value)
    assert "\n" not in message
    assert "secret" not in message
    return message
