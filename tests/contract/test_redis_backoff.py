"""Reserves of a store on Redis whose server does not answer, and what they leave in the memory of the process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from pomelo.errors import PomeloError
from pomelo.stores.ledger import IdempotencyKey, Reserved, UnknownOutcomeError
from pomelo.stores.redis import ledger
from pomelo.stores.redis.key_names import names
from tests.contract.ledger_rig import WALLET, record, request, settlement
from tests.contract.redis_rig import ONE_SERVER, FaultyClient, Opener, until
from tests.redis_server import RedisServer

pytestmark = ONE_SERVER


async def test_after_an_unknown_outcome_reserves_of_the_wallet_fail_without_being_sent(
    monkeypatch: pytest.MonkeyPatch, opened: Opener
) -> None:
    monkeypatch.setattr(ledger, "_BACKOFF", 3600.0)
    store = await opened()
    await store.add_account("bee", "pro", 1.0)
    faults = FaultyClient(store, 0.02)
    faults.hits = lambda command: True
    with pytest.raises(UnknownOutcomeError):
        await store.reserve(request("a"))
    reserves = [command for command in faults.failed if "a" in command]
    with pytest.raises(PomeloError) as caught:
        await store.reserve(request("b"))
    assert not isinstance(caught.value, UnknownOutcomeError)
    assert not [command for command in faults.failed if "b" in command]
    assert reserves
    with pytest.raises(UnknownOutcomeError):
        await store.reserve(request("c", 0, account="bee"))
    # Once its reserve is undone, the server is known to answer.
    faults.end()
    await until(lambda: not store._operations._all)
    for account in ("acme", "bee"):
        assert isinstance(await store.reserve(request(account, 0, account=account)), Reserved)
    assert store._backoff == {}


async def test_one_reserve_at_a_time_tries_whether_the_server_answers_again(
    monkeypatch: pytest.MonkeyPatch, opened: Opener
) -> None:
    monkeypatch.setattr(ledger, "_BACKOFF", 0.0)
    store = await opened()
    faults = FaultyClient(store, 0.02)
    faults.hits = lambda command: True
    with pytest.raises(UnknownOutcomeError):
        await store.reserve(request("a"))
    faults.set_timeout(30.0)
    first, *others = [store.reserve(request(f"t{n}")) for n in range(5)]
    found = await asyncio.gather(*others, return_exceptions=True)
    assert {type(one) for one in found} == {PomeloError}
    assert not first.done()
    faults.end()
    assert isinstance(await first, Reserved)
    assert isinstance(await store.reserve(request("t5")), Reserved)


async def test_no_end_of_a_task_leaves_its_idempotency_key_in_memory(
    server: RedisServer, opened: Opener
) -> None:
    store = await opened()
    ends: tuple[Callable[[], Any], ...] = (
        lambda: store.settle(settlement("a", answer=b"hello")),
        lambda: store.void(WALLET, "a"),
        lambda: store.recover(WALLET, "a"),
        lambda: store.note([record("a")]),
    )
    for number, end in enumerate(ends):
        server.do("DEL", names(WALLET).tombstone("a"))
        await store.reserve(request("a", idempotency_key=IdempotencyKey(f"order-{number}", b"f")))
        assert store._keys == {"a": f"=order-{number}"}
        if number == 3:
            server.do("HDEL", names(WALLET).holds, "a")  # as by another process
        await end()
        assert store._keys == {}
