"""The fields of counters in Redis, and reservations that an earlier version of Pomelo stored."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from pomelo.stores import records
from pomelo.stores.accounts import Grant
from pomelo.stores.ledger import Counter, ReplayedAnswer, Reserved, ReserveRequest, Settlement
from pomelo.stores.redis import Timing, open_redis
from pomelo.stores.redis.key_names import WORKERS, names
from tests.contract.ledger_rig import KEY, WALLET, error_code, record, request, settlement
from tests.limits import Used, limits
from tests.redis_server import RedisServer

NOW = 1_800_000_000
KEYS = names(WALLET)
IMAGE_MODEL = "flüx 1"


@pytest.fixture
async def store(server: RedisServer, tmp_path: Path) -> AsyncIterator[Any]:
    """A store at the time NOW, in which WALLET has 1,000 microcredits."""
    opened = open_redis(
        server.url,
        f"sqlite:{tmp_path / 'usage.db'}",
        timing=Timing(timeout=20.0, attempt_timeout=5.0, heartbeat=0.02, dead_after=0.1),
        server_time=lambda: NOW,
    )
    async with opened as store:
        await store.add_account(WALLET.account, "pro", 1.0)
        await store.grant(Grant("g", WALLET, 1_000, 1.0))
        yield store


def fields(server: RedisServer) -> dict[str, int]:
    """The fields of the wallet."""
    found = server.do("HGETALL", KEYS.wallet)
    return {name.decode(): int(value) for name, value in found.items()}


async def test_the_fields_of_a_counter_follow_from_its_name(store: Any, server: RedisServer) -> None:
    images = Counter("images:ann:7", 2, None, 86_400.0)
    await store.reserve(ReserveRequest(record("a"), 10, 10, (*request("a", tokens=5).counters, images)))
    at = NOW * 1_000_000
    assert fields(server) == {
        "granted": 1_000,
        "held": 10,
        **{"requests": 1, "requests_at": at, "requests_window": 1},
        "concurrency": 1,
        **{"tokens:gpt-4": 5, "tokens_at:gpt-4": at, "tokens_window:gpt-4": 1},
        **{"images:ann:7": 2, "images_at:ann:7": at, "images_window:ann:7": 1},
    }


async def test_a_count_of_running_tasks_is_deleted_with_the_last_of_them(
    store: Any, server: RedisServer
) -> None:
    for task in ("a", "b"):
        await store.reserve(request(task))
    await store.void(WALLET, "a")
    assert fields(server)["concurrency"] == 1
    await store.settle(settlement("b"))
    assert "concurrency" not in fields(server)


async def test_a_task_that_takes_0_of_a_count_leaves_no_field(store: Any, server: RedisServer) -> None:
    streams = Counter("streams:key_1", 0, 1)
    ends: dict[str, Callable[[], Awaitable[object]]] = {
        "a": lambda: store.settle(Settlement(record("a"), (streams,))),
        "b": lambda: store.void(WALLET, "b"),
        "c": lambda: store.recover(WALLET, "c"),
    }
    for task, end in ends.items():
        await store.reserve(ReserveRequest(record(task), 10, 10, (streams,)))
        await end()
        assert "streams:key_1" not in fields(server)


async def test_a_count_that_outlived_its_tasks_is_0(store: Any, server: RedisServer) -> None:
    server.do("HSET", KEYS.wallet, "concurrency", 5)
    assert (await limits(store, WALLET)).concurrency == 0
    await store.reserve(request("a", concurrency_limit=1))
    assert fields(server)["concurrency"] == 1


async def test_a_count_below_what_a_task_returns_is_0(store: Any, server: RedisServer) -> None:
    for task in ("a", "b"):
        await store.reserve(request(task, tokens=5))
    server.do("HSET", KEYS.wallet, "concurrency", 0, "requests", 0, "tokens:gpt-4", 3)
    await store.void(WALLET, "a", refund=True)
    assert (await limits(store, WALLET)).without_resets() == Used(990)


@pytest.mark.parametrize("name", ["granted", "spent:x", "held", "tokens_at", "Requests", "", ":x"])
async def test_a_counter_can_not_be_named_like_another_field(
    store: Any, server: RedisServer, name: str
) -> None:
    before = fields(server)
    unnamed = ReserveRequest(record("a"), 1, 1, (Counter(name, 1, None, 60.0),))
    assert await error_code(store.reserve(unnamed)) == "store_unavailable"
    assert fields(server) == before


# --- reservations of a version without counters


async def old_tasks(store: Any, server: RedisServer, worker: str = "") -> None:
    """Stores three tasks as that version did: b of an earlier minute, c without tokens."""
    worker = worker or store._worker.id
    at = (NOW - 10) * 1_000_000
    windows: dict[str, int] = {"requests": 2, "requests_at": at, "requests_window": 7}
    windows |= {"tokens:gpt-4": 90, "tokens_at:gpt-4": at, "tokens_window:gpt-4": 4, "held": 600}
    server.do("HSET", KEYS.wallet, *[part for pair in windows.items() for part in pair])
    for task, text in (
        ("a", f"{worker} call-a 100 0 7 40 4 5 gpt-4=order-7"),
        ("b", f"{worker} call-b 200 0 6 50 3 5 gpt-4"),
        ("c", f"{worker} call-c 300 0 7 0 0 7 {IMAGE_MODEL}"),
    ):
        server.do("HSET", KEYS.holds, task, text)
        server.do("HSET", KEYS.drafts, task, records.encode_record(record(task)))
    server.do("HSET", KEYS.answer("order-7"), "fingerprint", KEY.fingerprint, "task", "a")


SETTLED = Used(0, 2, 50.0, 0, 90, 50.0)
ENDS: list[tuple[str, str, Used]] = [
    ("a", "settle", SETTLED._replace(available=400 + 100 - 60, tokens=90 - 40 + 10)),
    ("b", "settle", SETTLED._replace(available=400 + 200 - 60)),
    ("c", "settle", SETTLED._replace(available=400 + 300 - 60)),
    ("a", "void", SETTLED._replace(available=400 + 100)),
    ("b", "void", SETTLED._replace(available=400 + 200)),
    ("a", "refund", SETTLED._replace(available=400 + 100, requests=1, tokens=50)),
    ("b", "refund", SETTLED._replace(available=400 + 200)),
    ("c", "refund", SETTLED._replace(available=400 + 300, requests=1)),
    ("a", "recover", SETTLED._replace(available=400 + 100 - 25)),
    ("c", "recover", SETTLED._replace(available=400 + 300 - 25)),
]


@pytest.mark.parametrize(("task", "end", "expected"), ENDS)
async def test_an_old_reservation_ends_like_a_new_one(
    store: Any, server: RedisServer, task: str, end: str, expected: Used
) -> None:
    await old_tasks(store, server)
    await store.reserve(request("new", 0, concurrency_limit=1))
    server.do("HINCRBY", KEYS.wallet, "requests", -1)
    assert await store.note([record(task, cost=25)]) == []
    own = await store.reservations()
    assert [(one.record.task_id, one.amount, one.own) for one in own] == [
        ("a", 100, True),
        ("b", 200, True),
        ("c", 300, True),
        ("new", 0, True),
    ]
    ends: dict[str, Callable[[], Awaitable[object]]] = {
        "settle": lambda: store.settle(settlement(task, 60, tokens=10)),
        "void": lambda: store.void(WALLET, task),
        "refund": lambda: store.void(WALLET, task, refund=True),
        "recover": lambda: store.recover(WALLET, task),
    }
    for _ in range(2):
        await ends[end]()
        assert await limits(store, WALLET) == expected._replace(concurrency=1)
    assert server.do("EXISTS", KEYS.answer("order-7")) == (task != "a")
    assert task not in [one.record.task_id for one in await store.reservations()]


async def test_the_key_of_an_old_reservation_follows_its_model_whatever_letters_that_has(
    store: Any, server: RedisServer
) -> None:
    model = "mödel"
    text = f"{store._worker.id} call-u 0 0 7 0 0 {len(model.encode())} {model}=order-8"
    server.do("HSET", KEYS.holds, "u", text)
    server.do("HSET", KEYS.drafts, "u", records.encode_record(record("u")))
    server.do("HSET", KEYS.answer("order-8"), "fingerprint", "f", "task", "u")
    await store.recover(WALLET, "u")
    assert server.do("EXISTS", KEYS.holds, KEYS.answer("order-8")) == 0


async def test_an_old_reservation_is_repeated_and_stores_its_answer(store: Any, server: RedisServer) -> None:
    await old_tasks(store, server)
    again = await store.reserve(request("a", 100, tokens=40, idempotency_key=KEY))
    assert isinstance(again, Reserved)
    assert again.amount == 100
    await store.settle(settlement("a", 60, tokens=10, answer=b"hello"))
    replayed = await store.reserve(request("b2", idempotency_key=KEY))
    assert isinstance(replayed, ReplayedAnswer)
    assert replayed.answer == b"hello"


async def test_old_reservations_of_a_dead_process_are_recovered(store: Any, server: RedisServer) -> None:
    await old_tasks(store, server, "own_dead")
    server.do("HSET", WORKERS, "own_dead", "dead")
    while await store.drafts():
        pass  # each call lets the watching worker run
    assert await limits(store, WALLET) == SETTLED._replace(available=1_000)
    assert server.do("EXISTS", KEYS.answer("order-7")) == 0


async def test_a_settlement_can_name_other_counters_than_the_reservation(
    store: Any, server: RedisServer
) -> None:
    await old_tasks(store, server)
    images = Counter("images", 3, None, 86_400.0)
    settled = await store.settle(Settlement(record("a", cost=60), (images,)))
    assert settled.limit_status.counts["images"].used == 0
    assert (await limits(store, WALLET)).tokens == 90
