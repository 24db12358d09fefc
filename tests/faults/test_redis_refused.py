"""Calls that are refused while Redis is down: what they leave in the memory of the process and on the server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pomelo.engine.ledger import Ledger
from pomelo.errors import PomeloError
from pomelo.stores.ledger import UnknownOutcomeError
from pomelo.stores.redis import ordered_tasks
from pomelo.stores.redis.key_names import names
from tests.faults.redis_rig import WALLET, audit, open_on, run, wait_until_available
from tests.faults.tcp_proxy import TcpProxy
from tests.redis_server import RedisServer
from tests.unit.engine.failing_store import reserve
from tests.waiting import until

CALLS = 100


async def refuse(engine: Ledger, turn: str) -> set[type[Exception]]:
    """Sends calls that are all refused; returns the types of their errors."""
    found = await asyncio.gather(
        *[reserve(engine, f"{turn}-{number}") for number in range(CALLS)], return_exceptions=True
    )
    assert all(isinstance(error, PomeloError) and error.code == "store_unavailable" for error in found)
    return {type(error) for error in found if isinstance(error, Exception)}


async def test_calls_that_were_refused_without_a_connection_leave_nothing_to_repeat(
    server: RedisServer, tmp_path: Path
) -> None:
    async with open_on(server.url, tmp_path) as store:
        engine = Ledger(store)
        await (await reserve(engine, "before")).refuse()
        await until(lambda: not busy(store))
        server.kill()
        for turn in range(3):
            await refuse(engine, f"in-{turn}")
            assert busy(store) == 0
        server.start()
        await wait_until_available(store)
        await run(store, "after")
        await audit(store, {"after"})


async def test_what_was_reserved_for_refused_calls_is_released_although_nothing_repeats_its_void(
    server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordered_tasks, "_MAX_UNDO_TIME", 0.1)
    async with (
        TcpProxy(server.port) as proxy,
        open_on(f"redis://127.0.0.1:{proxy.port}", tmp_path, timeout=3.0) as store,
    ):
        engine = Ledger(store)
        await (await reserve(engine, "before")).refuse()
        proxy.every = 1  # no reply arrives any more
        calls = asyncio.create_task(refuse(engine, "in"))
        holds = names(WALLET).holds
        await until(lambda: server.do("HLEN", holds) == CALLS)
        server.kill()
        assert await calls == {UnknownOutcomeError}
        await until(lambda: not busy(store))
        proxy.every = 0
        server.start()
        await wait_until_available(store)
        assert server.do("HLEN", holds) == CALLS
        for _ in range(2):
            await engine.reconcile()
        await run(store, "after")
        await audit(store, {"after"})


def busy(store: Any) -> int:
    """The number of operations that a store has started and not ended."""
    return len(store._operations._all)
