"""Tasks that run concurrently, on a file whose statements fail and whose process dies at random moments.

What was acknowledged is in the file, no more is charged than was settled or noted, and memory equals the file.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
import tempfile
from collections import Counter as Counter_
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from pomelo.accounts.audit import audit
from pomelo.errors import PomeloError
from pomelo.stores.accounts import Grant, Wallet
from pomelo.stores.base import Store
from pomelo.stores.ledger import (
    Counter,
    IdempotencyKey,
    Refused,
    ReplayedAnswer,
    ReserveRequest,
    Settlement,
)
from pomelo.stores.sqlite import open_sqlite
from pomelo.stores.usage import UsageQuery, UsageRecord
from tests.memory import MEMORY

SEEDS = int(os.environ.get("POMELO_LEDGER_SEEDS", "12"))
TASKS = 60

WALLETS = (Wallet("acme", True), Wallet("acme", False), Wallet("bee", True))
CALLS, IMAGES = Counter("calls", 1, None, 86_400.0), Counter("images", 3, None, 86_400.0)
COUNTERS = (CALLS, IMAGES, Counter("running", 1, 12))
GRANTED = 5_000
PRICES = "image=1"
"""An image costs a microcredit: what the audit recomputes."""

T = TypeVar("T")


class Unreliable(sqlite3.Connection):
    """A connection whose statements fail at random, before or after they were executed."""

    generator = random.Random()
    rate = 0.0

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        return self.run(partial(super().execute, sql, parameters))

    def executemany(self, sql: str, parameters: Any, /) -> sqlite3.Cursor:
        return self.run(partial(super().executemany, sql, parameters))

    def run(self, call: Callable[[], sqlite3.Cursor]) -> sqlite3.Cursor:
        chance, generator = Unreliable.rate, Unreliable.generator
        error = generator.choice([RuntimeError, sqlite3.OperationalError])("failed")
        if generator.random() < chance:
            raise error
        cursor = call()
        if generator.random() < chance / 4:
            raise error
        return cursor


@dataclass
class Books:
    """What callers got as acknowledged."""

    settled: dict[str, UsageRecord] = field(default_factory=dict)
    begun: dict[str, int] = field(default_factory=dict)
    """The most that a task that may have been settled can cost."""
    noted: dict[str, int] = field(default_factory=dict)
    answers: dict[str, bytes] = field(default_factory=dict)
    """By task id, of its own Idempotency-Key."""
    voiding: set[str] = field(default_factory=set)
    """Tasks that may have been voided."""
    voided: set[str] = field(default_factory=set)
    images: Counter_[Wallet] = field(default_factory=Counter_)
    """What tasks that are not begun, or ended in any way, leave counted."""


def record(task_id: str, wallet: Wallet, cost: int = 0) -> UsageRecord:
    return UsageRecord(
        task_id, "r", wallet.account, wallet.live, "k", "rest", "m", "image", images=cost, cost=cost,
        prices=PRICES,
    )  # fmt: skip


async def until_known(call: Callable[[], Awaitable[T]]) -> T:
    """Repeats a call while the store fails, as the engine does."""
    while True:
        try:
            return await call()
        except PomeloError:
            await asyncio.sleep(0.001)


async def task(store: Store, books: Books, number: int, generator: random.Random) -> None:
    """Runs one task. Its caller waits for each step, or not."""
    task_id, wallet = f"t{number:03}", generator.choice(WALLETS)
    key = IdempotencyKey(task_id, b"one") if generator.random() < 0.3 else None
    request = ReserveRequest(record(task_id, wallet), 0, generator.randrange(40), COUNTERS, key)
    await asyncio.sleep(generator.random() * 0.01)
    try:
        reserved = await store.reserve(request)
    except PomeloError:
        await until_known(lambda: store.void(wallet, task_id, refund=True))
        return
    if isinstance(reserved, Refused):
        return
    books.images[wallet] += IMAGES.amount
    if key is not None:
        with suppress(PomeloError):
            again = ReserveRequest(record(f"{task_id}-again", wallet), 0, 1, COUNTERS, key)
            repeated = await store.reserve(again)
            assert isinstance(repeated, Refused)
            assert repeated.code in ("idempotency_conflict", "limit_exceeded")
    for cost in sorted(generator.randrange(30) for _ in range(generator.randrange(3))):  # it never falls
        with suppress(PomeloError):
            assert await store.note([record(task_id, wallet, cost)]) == []
            books.noted[task_id] = cost
        await asyncio.sleep(generator.random() * 0.005)
    end = generator.choice(["settle", "settle", "settle", "void", "recover", "run"])
    if end == "settle":
        cost = generator.randrange(60)
        books.begun[task_id] = cost
        answer = b"answer" if key is not None else None
        settlement = Settlement(record(task_id, wallet, cost), (CALLS, Counter("images", 1)), answer)
        calls = [until_known(lambda: store.settle(settlement)) for _ in range(generator.randint(1, 2))]
        for settled in await asyncio.gather(*calls):
            assert settled.record.cost + settled.record.uncollected == cost
            books.settled[task_id] = settled.record
        books.images[wallet] += 1 - IMAGES.amount
        if answer is not None:
            books.answers[task_id] = answer
    elif end == "void":
        refund = generator.random() < 0.5
        books.voiding.add(task_id)
        await until_known(lambda: store.void(wallet, task_id, refund=refund))
        books.images[wallet] -= IMAGES.amount * refund
        books.voided.add(task_id)
    elif end == "recover":
        await until_known(lambda: store.recover(wallet, task_id))
        books.begun[task_id] = books.noted.get(task_id, 0)


async def records_of(store: Store) -> dict[str, UsageRecord]:
    found, _ = await store.list_usage(UsageQuery(), limit=10_000)
    return {each.task_id: each for each in found}


async def check_crashed(path: Path, books: Books, before: Books) -> None:
    """Checks a copy of the file, made at some moment after `before` and before `books`."""
    async with open_sqlite(path) as store:
        found = await records_of(store)
        assert before.settled.items() <= found.items()
        for task_id, each in found.items():
            if each.source == "recovered":
                assert task_id not in before.settled
                continue
            assert each.cost + each.uncollected == books.begun[task_id]
        for task_id, cost in before.noted.items():
            if cost and task_id not in books.begun and task_id not in books.voiding:
                assert found[task_id].source == "recovered"
        assert before.voided.isdisjoint(found)
        assert await store.reservations() == []
        for wallet in WALLETS:
            balance = await store.balance(wallet)
            assert balance.held == 0
            assert balance.spent == sum(each.cost for each in found.values() if each.wallet == wallet)
            assert (await store.limit_status(wallet, COUNTERS)).counts["running"].used == 0
        for task_id, answer in before.answers.items():
            wallet = found[task_id].wallet
            key = IdempotencyKey(task_id, b"one")
            repeated = await store.reserve(ReserveRequest(record("new", wallet), 0, 0, COUNTERS, key))
            assert isinstance(repeated, ReplayedAnswer)
            assert (repeated.record, repeated.answer) == (found[task_id], answer)
        assert not (await audit(store)).findings


def copy_of(books: Books) -> Books:
    return Books(
        settled=dict(books.settled),
        begun=dict(books.begun),
        noted=dict(books.noted),
        answers=dict(books.answers),
        voided=set(books.voided),
    )


@pytest.mark.timeout(120 + 10 * SEEDS)
@pytest.mark.parametrize("seed", range(SEEDS))
async def test_memory_equals_the_file_and_a_crash_loses_nothing(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(seed)
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Unreliable))
    monkeypatch.setattr(Unreliable, "generator", random.Random(seed))
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder, books = Path(name), Books()
        crashes: list[tuple[Path, Books]] = []
        path = folder / "0" / "pomelo.db"
        async with open_sqlite(path) as store:
            for account in ("acme", "bee"):
                await store.add_account(account, "pro", 1.0)
            for number, wallet in enumerate(WALLETS):
                await store.grant(Grant(f"g{number}", wallet, GRANTED // (1 + 9 * (number == 2)), 1.0))
            Unreliable.rate = generator.choice([0.0, 0.02, 0.1])
            try:
                running = [asyncio.create_task(task(store, books, n, generator)) for n in range(TASKS)]
                while not all(each.done() for each in running):
                    await asyncio.sleep(0.01)
                    if len(crashes) < 4:
                        before = copy_of(books)
                        copy = folder / f"crash{len(crashes)}" / path.name
                        copy.parent.mkdir()
                        await asyncio.to_thread(copy_files, path, copy)
                        crashes.append((copy, before))
                await asyncio.gather(*running)
            finally:
                Unreliable.rate = 0.0
            for reservation in await store.reservations():
                await store.void(reservation.record.wallet, reservation.record.task_id)
            memory = [
                (await store.balance(wallet), await store.limit_status(wallet, COUNTERS[:2]))
                for wallet in WALLETS
            ]
            found = await records_of(store)
            assert not (await audit(store)).findings
            for wallet, (_, status) in zip(WALLETS, memory, strict=True):
                assert status.counts["images"].used == books.images[wallet]
        assert books.settled.items() <= found.items()
        async with open_sqlite(path) as store:
            for wallet, (balance, status) in zip(WALLETS, memory, strict=True):
                assert await store.balance(wallet) == balance
                stored = await store.limit_status(wallet, COUNTERS[:2])
                assert stored.available == status.available
                assert {name: count.used for name, count in stored.counts.items()} == {
                    name: count.used for name, count in status.counts.items()
                }
            assert await records_of(store) == found
        for copy, before in crashes:
            await check_crashed(copy, books, before)


def copy_files(path: Path, copy: Path) -> None:
    """Copies the file and the log, which is too small to be emptied meanwhile."""
    for name in (path.name, path.name + "-wal"):
        with suppress(FileNotFoundError):
            shutil.copyfile(path.parent / name, copy.parent / name)
