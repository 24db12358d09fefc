"""Reservations in Redis: which of them a process lists as its own, and how calls survive any error."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from pomelo.errors import PomeloError
from pomelo.stores.accounts import Wallet
from pomelo.stores.ledger import IdempotencyKey, LostReservationError, Reserved, UnknownOutcomeError
from pomelo.stores.redis import ledger, ordered_tasks, usage
from pomelo.stores.redis.key_names import WORKERS, names
from pomelo.stores.redis.scripts import RECOVER, RESERVE
from pomelo.stores.redis.workers import Worker
from pomelo.stores.usage import UsageQuery
from tests.contract.ledger_rig import WALLET, abandon, held, record, request, settlement, wallets
from tests.contract.redis_rig import IDLE, ONE_SERVER, FaultyClient, Opener, abandon_dead, until
from tests.redis_server import RedisServer
from tests.unit.refusals import refused

pytestmark = ONE_SERVER


def uses_key(suffix: str) -> Callable[[tuple[Any, ...]], bool]:
    """Whether a command has a key with that suffix."""
    return lambda command: any(isinstance(part, str) and part.endswith(suffix) for part in command)


def hits_nth(commands: Iterator[int], number: int, command: tuple[Any, ...]) -> bool:
    """Whether it is the command of that number."""
    return next(commands) == number


async def own_tasks(store: Any) -> list[str]:
    return [one.record.task_id for one in await store.reservations(own=True)]


async def test_each_process_lists_its_own_reservations(opened: Opener) -> None:
    stores = [await opened() for _ in range(2)]
    for number in range(4):
        await stores[number % 2].reserve(request(f"t{number}", 10 + number))
    assert [await own_tasks(store) for store in stores] == [["t0", "t2"], ["t1", "t3"]]
    found = await stores[0].reservations()
    assert [(one.record.task_id, one.amount, one.own) for one in found] == [
        ("t0", 10, True),
        ("t1", 11, False),
        ("t2", 12, True),
        ("t3", 13, False),
    ]
    await stores[0].recover(WALLET, "t1")  # no effect on another process's task
    await stores[0].recover(WALLET, "t2")
    assert [await own_tasks(store) for store in stores] == [["t0"], ["t1", "t3"]]
    assert (await stores[1].settle(settlement("t1", 5))).record.cost == 5
    with pytest.raises(LostReservationError):
        await stores[0].settle(settlement("t2", 5))


async def test_idle_wallets_are_not_checked_forever(opened: Opener) -> None:
    store, other = await opened(), await opened()
    await other.reserve(request("of another process"))
    await store.reserve(request("a"))
    for _ in range(5):
        assert await own_tasks(store) == ["a"]
    await store.settle(settlement("a"))
    for _ in range(5):
        assert await own_tasks(store) == []
    assert store._checks == {}
    # A check that began before a reserve does not count after it.
    await store.reserve(request("late"))
    await store.void(WALLET, "late")
    store._count_check({WALLET: 2}, set())
    assert store._checks == {WALLET: 3}
    await store.reserve(request("b"))
    assert await own_tasks(store) == ["b"]


async def test_a_late_reservation_is_found_even_if_its_wallet_was_idle(
    monkeypatch: pytest.MonkeyPatch, opened: Opener
) -> None:
    monkeypatch.setattr(ordered_tasks, "_MAX_UNDO_TIME", 0.1)
    monkeypatch.setattr(ledger, "_BACKOFF", 0.0)
    store = await opened()
    await store.reserve(request("before"))
    await store.void(WALLET, "before")
    faults = FaultyClient(store, 0.1)
    faults.hits = uses_key(names(WALLET).wallet)
    with pytest.raises(UnknownOutcomeError):
        await store.reserve(request("late"))
    await until(lambda: not store._operations.is_busy("late"))
    faults.end()
    # A reserve with a known outcome does not shorten the search for the one before.
    assert isinstance(await store.reserve(request("after")), Reserved)
    await store.void(WALLET, "after")
    for _ in range(10):
        assert await own_tasks(store) == []
    # The delayed command reaches the server only now.
    await store._connection.send(*faults.failed[0])
    assert await own_tasks(store) == ["late"]
    await store.recover(WALLET, "late")
    assert (await store.balance(WALLET)).held == 0


async def test_what_the_ends_of_tasks_leave_expires(server: RedisServer, opened: Opener) -> None:
    store = await opened(void_ttl=100.0, tombstone_ttl=200.0, answer_ttl=300.0)
    for task in ("settled", "voided", "recovered", "charged"):
        await store.reserve(request(task, idempotency_key=IdempotencyKey(task, b"f")))
    await store.settle(settlement("settled", answer=b"hello"))
    await store.void(WALLET, "voided")
    await store.note([record("charged", cost=3)])
    for task in ("recovered", "charged"):
        await store.recover(WALLET, task)
    await store._void(WALLET, "not yet reserved", True, "call")
    keys = names(WALLET)
    left = {
        key.decode().removeprefix(keys.prefix): server.do("TTL", key)
        for table in (keys.tombstone("*"), keys.answer("*"))
        for key in server.do("KEYS", table)
    }
    # In hundreds of seconds, rounded up.
    assert {name: -(-seconds // 100) for name, seconds in left.items()} == {
        "mark:settled": 2,
        "mark:voided": 1,
        "mark:recovered": 2,
        "mark:charged": 2,
        "mark:not yet reserved": 1,
        "answer:settled": 3,
    }


async def test_a_wallet_that_can_not_be_noted_does_not_keep_others_from_it(
    server: RedisServer, opened: Opener
) -> None:
    store = await opened()
    await store.reserve(request("damaged"))
    for task in ("a", "lost"):
        await store.reserve(request(task, 0, live=False))
    server.do("HSET", names(WALLET).holds, "damaged", "not a reservation")
    noted = [record("damaged", cost=1), record("a", cost=5, live=False), record("lost", live=False)]
    with refused("store_unavailable"):
        await store.note(noted)
    assert {one.record.task_id: one.record.cost for one in await store.reservations()} == {"a": 5, "lost": 0}
    await store.void(Wallet(WALLET.account, False), "lost")
    assert await store.note(noted) == ["lost"]


async def test_a_task_that_the_store_is_about_to_end_is_not_listed(opened: Opener) -> None:
    store = await opened()
    await store.reserve(request("a"))
    faults = FaultyClient(store, 0.1)
    faults.hits = uses_key(names(WALLET).usage)
    with pytest.raises(UnknownOutcomeError):
        await store.settle(settlement("a"))
    assert await own_tasks(store) == []
    assert [(one.record.task_id, one.own) for one in await store.reservations()] == [("a", False)]
    faults.end()
    await until(lambda: not store._operations.is_busy("a"))
    assert (await store.settle(settlement("a"))).record.cost == 10


# --- unexpected errors

ERRORS: dict[str, Callable[[], Exception]] = {
    "uvloop's closed transport": lambda: RuntimeError("unable to perform operation; the handler is closed"),
    "a reset": lambda: ConnectionResetError(104, "Connection reset by peer"),
    "another": lambda: KeyError("reply"),
}
ANY_ERROR = pytest.mark.parametrize("error", ERRORS)
AFTER = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])


@ANY_ERROR
@AFTER
async def test_any_error_of_the_client_is_store_unavailable_for_every_method(
    error: str, after: bool, opened: Opener
) -> None:
    store = await opened()
    faults = FaultyClient(store, 0.05)
    faults.error, faults.after, faults.hits = ERRORS[error], after, lambda command: True
    calls = [
        store.reserve(request("a")),
        store.settle(settlement("b")),
        store.void(WALLET, "c"),
        store.note([record("a")]),
        store.limit_status(WALLET),
        store.reservations(),
        store.recover(WALLET, "a"),
        store.balance(WALLET),
        store.list_grants(WALLET),
        store.get_account("acme"),
        store.list_accounts(),
        store.set_plan("acme", "pro"),
        store.add_account("other", "pro", 1.0),
        store.get_key("k"),
        store.list_keys(),
        store.revoke_key("k", 1.0),
        store.list_usage(UsageQuery(), limit=1),
        store.sum_usage(UsageQuery(), ("day",)),
        store.drafts(),
        held(store, WALLET),
        wallets(store),
    ]
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert {getattr(one, "code", one) for one in found} == {"store_unavailable"}
    faults.end()
    await until(lambda: not store._operations._all)
    assert (await store.balance(WALLET)).held == 0


@ANY_ERROR
@AFTER
async def test_a_single_error_at_any_command_is_retried(error: str, after: bool, opened: Opener) -> None:
    store = await opened()
    faults = FaultyClient(store)
    faults.error, faults.after = ERRORS[error], after
    for number in range(8):
        commands = iter(range(100))
        faults.hits = partial(hits_nth, commands, number)
        assert isinstance(await store.reserve(request(f"t{number}", 20)), Reserved)
        assert await store.note([record(f"t{number}", cost=3)]) == []
        assert (await store.settle(settlement(f"t{number}", 7))).record.cost == 7
        assert (await store.balance(WALLET)).held == 0
    assert (await store.balance(WALLET)).spent == 8 * 7


async def test_repeated_settlements_do_not_pile_up(opened: Opener) -> None:
    store = await opened()
    await store.reserve(request("a"))
    faults = FaultyClient(store, 0.02)
    faults.hits = lambda command: True
    for _ in range(20):
        with pytest.raises(PomeloError):
            await store.settle(settlement("a"))
    assert len(store._operations._all) <= 2
    faults.end()
    await until(lambda: not store._operations._all)
    assert (await store.settle(settlement("a"))).record.cost == 10


async def test_undoing_a_reserve_with_unknown_outcome_is_not_retried_forever(
    monkeypatch: pytest.MonkeyPatch, opened: Opener
) -> None:
    monkeypatch.setattr(ordered_tasks, "_MAX_UNDO_TIME", 0.2)
    store = await opened()
    faults = FaultyClient(store, 0.02)
    faults.hits = lambda command: True
    for number in range(20):
        with pytest.raises(PomeloError):
            await store.reserve(request(f"t{number}"))
    await until(lambda: not store._operations._all)


async def test_a_reserve_that_is_undone_does_not_count_in_the_windows(opened: Opener) -> None:
    store = await opened()
    faults = FaultyClient(store, 0.2)
    faults.after = True
    faults.hits = lambda command: len(command) > 1 and command[1] in (RESERVE.digest, RESERVE.text)
    with pytest.raises(UnknownOutcomeError):
        await store.reserve(request("a", tokens=5))
    assert len(faults.failed) > 1, "the first one may have been answered with NOSCRIPT"
    faults.end()
    await until(lambda: not store._operations._all)
    counts = (await store.limit_status(WALLET, request("a", tokens=5).counters)).counts
    assert [count.used for count in counts.values()] == [0, 0, 0]
    assert (await store.balance(WALLET)).held == 0


async def test_a_void_is_not_retried_forever_and_its_reservation_is_found_later(
    monkeypatch: pytest.MonkeyPatch, opened: Opener
) -> None:
    monkeypatch.setattr(ordered_tasks, "_MAX_UNDO_TIME", 0.2)
    store = await opened()
    await store.reserve(request("a"))
    faults = FaultyClient(store, 0.02)
    faults.hits = lambda command: True
    with pytest.raises(PomeloError):
        await store.void(WALLET, "a")
    await until(lambda: not store._operations._all)
    faults.end()
    assert await own_tasks(store) == ["a"]


async def test_the_background_loops_survive_any_error(
    server: RedisServer, caplog: pytest.LogCaptureFixture, opened: Opener
) -> None:
    caplog.set_level(logging.ERROR)
    quick = {"heartbeat": 0.02, "dead_after": 2.0, "drain": 0.02}
    store = await opened(**quick)
    other = await opened(**quick)
    faults = FaultyClient(store, 0.05)
    faults.error = lambda: KeyError("reply")
    faults.hits = lambda command: True
    await until(lambda: len(faults.failed) > 40)
    faults.end()
    before = server.do("HGETALL", WORKERS)[store._worker.id.encode()]
    await until(lambda: server.do("HGETALL", WORKERS)[store._worker.id.encode()] != before)
    # It is still a worker, and its records still go to the archive.
    await store.reserve(request("a"))
    await store.settle(settlement("a"))
    await until(lambda: server.do("XLEN", names(WALLET).usage) == 0)
    assert (await other.list_usage(UsageQuery(), limit=9))[0][0].task_id == "a"
    logged = [one.getMessage() for one in caplog.records]
    assert len(logged) == 1, "once, however often it happened"
    assert "builtins.KeyError" in logged[0]


async def test_an_archive_that_fails_with_an_unexpected_error_gets_the_records_later(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, opened: Opener
) -> None:
    monkeypatch.setattr(usage, "_FULL_DRAIN", 10**9)  # the records of this process are moved without that
    store = await opened(drain=0.02)
    archive = store._usage._archive
    calls = asyncio.Semaphore(0)

    async def fail(records: Any) -> None:
        calls.release()
        raise KeyError("row")

    with monkeypatch.context() as patch:
        patch.setattr(archive, "add", fail)
        await store.reserve(request("a"))
        await store.settle(settlement("a"))
        for _ in range(5):
            await calls.acquire()
        with refused("store_unavailable"):
            await store.list_usage(UsageQuery(), limit=9)
    await until(lambda: server.do("XLEN", names(WALLET).usage) == 0)
    assert [one.task_id for one in (await store.list_usage(UsageQuery(), limit=9))[0]] == ["a"]


async def test_a_reservation_that_can_not_be_recovered_does_not_block_others(
    server: RedisServer, opened: Opener
) -> None:
    quick = {"heartbeat": 0.02, "dead_after": 0.2}
    dying = await opened(**quick)
    other = Wallet("acme", False)
    for number in range(3):
        await dying.reserve(request(f"t{number}"))
    await dying.reserve(request("t3", 0, live=False))
    await dying.reserve(request("t4", 0, live=False, account="default"))
    await abandon(dying)
    # Damages two wallets.
    server.do("SET", names(other).usage, "not a stream")
    server.do("HSET", names(Wallet("default", False)).holds, "junk", "not a reservation")
    watching = await opened(**quick)
    await until(lambda: server.do("HLEN", names(WALLET).holds) == 0)
    await until(lambda: server.do("HKEYS", names(Wallet("default", False)).holds) == [b"junk"])
    assert server.do("HKEYS", names(other).holds) == [b"t3"]
    server.do("DEL", names(other).usage)
    await until(lambda: server.do("HLEN", names(other).holds) == 0)
    assert await own_tasks(watching) == []


async def test_the_tasks_of_a_dead_worker_are_recovered_concurrently(
    server: RedisServer, opened: Opener
) -> None:
    dying, store = await opened(**IDLE), await opened(**IDLE)
    for number in range(50):
        await dying.reserve(request(f"t{number}", 1))
    await abandon_dead(dying, server)
    client, together = FaultyClient(store, timeout=20.0), asyncio.Barrier(50)
    execute = client._client.execute_command

    async def recover_together(command: tuple[Any, ...]) -> Any:
        if RECOVER.digest in command:
            await together.wait()
        return await execute(*command)

    client._execute = recover_together  # type: ignore[method-assign]
    worker = Worker(store._connection, store._wallet_index, time.monotonic)
    await worker.open()
    assert await store.reservations() == []
    assert (await store.balance(WALLET)).held == 0
    await worker.stop()
