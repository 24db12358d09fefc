"""What the tests of the ledger run on: every store behind the same few handles, and what a task of theirs is.

A new store is a rig and a row of STORES; then it is held to the whole contract, and to the model.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest
from redis import Redis

from pomelo.errors import PomeloError
from pomelo.stores.base import Store
from pomelo.stores.ledger import (
    Grant,
    LostReservationError,
    Reserved,
    ReserveRequest,
    Settled,
    Settlement,
    UsageRecord,
    Wallet,
)
from pomelo.stores.redis import Timing, open_redis
from pomelo.stores.sqlite import open_sqlite
from tests.redis_server import any_server

MODEL = "gpt-4"
WALLET = Wallet("acme", True)
"""Whose tasks they are, where nothing else is said. `rigged` gives it 1,000 microcredits."""


class Clock:
    """The store's clocks, in the test's hand: wall time and monotonic time."""

    jumping = True
    """Whether the store has to do with the machine's wall clock."""

    def __init__(self) -> None:
        # Halves and wholes are exact: a window ends when it ends.
        self.wall = 1_800_000_000.0
        self.steady = 5_000.0

    def passes(self, seconds: float) -> None:
        """Time goes on."""
        self.wall += seconds
        self.steady += seconds

    def jumps(self, seconds: float) -> None:
        """Somebody sets the machine's clock."""
        self.wall += seconds


class Rig(Protocol):
    """A store under test. `clock` is None where the store's can't be set."""

    store: Store
    clock: Clock | None

    async def open(self) -> None:
        """Opens the store, new or as `close` left it."""
        ...

    async def close(self) -> None:
        """Closes it in good order."""
        ...

    async def crash(self) -> None:
        """Leaves as a process does that is killed, and opens as the next one does, once it is sure of that."""
        ...


class SqliteRig:
    """A file in a folder. A crash goes on with copies of its files as they are, the log in them unread."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.path = folder / "0" / "pomelo.db"
        self._crashes = 0
        self._stack = AsyncExitStack()

    async def open(self) -> None:
        opening = open_sqlite(self.path, now=lambda: self.clock.wall, monotonic=lambda: self.clock.steady)
        self.store = await self._stack.enter_async_context(opening)

    async def close(self) -> None:
        await self._stack.aclose()

    async def crash(self) -> None:
        self._crashes += 1
        left = self.path.parent
        self.path = left.parent / str(self._crashes) / self.path.name
        self.path.parent.mkdir()
        for name in (self.path.name, self.path.name + "-wal"):
            shutil.copyfile(left / name, self.path.parent / name)
        await self.close()
        shutil.rmtree(left)
        await self.open()


class RedisClock(Clock):
    """The server's clock. What the server counts down by its real one is shortened along.

    The clock of a machine that Pomelo runs on is none of its business.
    """

    jumping = False

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url

    def passes(self, seconds: float) -> None:
        super().passes(seconds)
        with Redis.from_url(self._url) as server:
            for key in server.scan_iter():
                if (left := server.pttl(key)) >= 0:
                    server.pexpire(key, max(0, int(left - seconds * 1000)))

    def jumps(self, seconds: float) -> None:
        pass


class RedisRig:
    """The server of all tests, emptied. A crash is a store that says and does nothing more."""

    def __init__(self, folder: Path) -> None:
        self.url = any_server()
        self.clock = RedisClock(self.url)
        self._archive = f"sqlite:{folder / 'usage.db'}"
        self._stack = AsyncExitStack()
        with Redis.from_url(self.url) as server:
            server.flushdb()

    async def open(self) -> None:
        opening = open_redis(
            f"{self.url}?persistence=none",
            self._archive,
            timing=Timing(limit=20.0, attempt=5.0, beat=0.02, dead=0.1),
            now=lambda: self.clock.wall,
            server_time=lambda: self.clock.wall,
        )
        self.store: Any = await self._stack.enter_async_context(opening)

    async def close(self) -> None:
        await self._stack.aclose()

    async def crash(self) -> None:
        await self.store.abandon()
        await self.close()
        await self.open()
        while await self.store.held():  # noqa: ASYNC110 - the owners' beats decide.
            await asyncio.sleep(0.01)


STORES: dict[str, Callable[[Path], Rig]] = {"sqlite": SqliteRig, "redis": RedisRig}
"""A rig for every store."""


@pytest.fixture(params=STORES)
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    """An open store of each kind, in which WALLET has 1,000 microcredits."""
    made = STORES[request.param](tmp_path)
    await made.open()
    try:
        assert await made.store.add_account(WALLET.account, "pro", 1.0)
        await made.store.grant(Grant("first", WALLET, 1_000, 1.0))
        yield made
    finally:
        await made.close()


@pytest.fixture
def clock(rig: Rig) -> Clock:
    """Its clock."""
    if rig.clock is None:
        pytest.skip("this store's clock can't be set")
    return rig.clock


def record(task_id: str, **changes: Any) -> UsageRecord:
    """A task's record."""
    values: dict[str, Any] = {
        "request_id": f"req-{task_id}",
        "account": WALLET.account,
        "live": WALLET.live,
        "key_id": "k" * 12,
        "wire": "rest",
        "model": MODEL,
        "task_type": "text",
    }
    return UsageRecord(task_id, **(values | changes))


def taking(task_id: str, least: int = 10, most: int | None = None, **changes: Any) -> ReserveRequest:
    """What a task asks for; of what isn't a Take's, its record has it."""
    ours = {name: changes.pop(name) for name in _TAKES if name in changes}
    return ReserveRequest(record(task_id, **changes), least, least if most is None else most, **ours)


_TAKES = ("requests_limit", "concurrency_limit", "tokens", "tokens_limit", "idempotency_key", "sufficient")


def ending(
    task_id: str, cost: int = 10, tokens: int = 0, answer: bytes | None = None, **changes: Any
) -> Settlement:
    """How a task ends."""
    return Settlement(record(task_id, cost=cost, **changes), tokens, answer)


async def ran(store: Store, task_id: str, cost: int = 10, **changes: Any) -> Settled:
    """A task from its take to its settlement."""
    assert isinstance(await store.reserve(taking(task_id, cost, **changes)), Reserved)
    return await store.settle(ending(task_id, cost, **changes))


async def refused(asked: Awaitable[Any]) -> str:
    """The code of what takes nothing."""
    answer = await asked
    assert hasattr(answer, "code"), answer
    code: str = answer.code
    return code


async def fails(asked: Awaitable[Any]) -> str:
    """The code of the error that comes."""
    with pytest.raises(PomeloError) as caught:
        await asked
    return caught.value.code


async def lost(asked: Awaitable[Any]) -> bool:
    """Whether the task's hold is gone."""
    try:
        await asked
    except LostReservationError:
        return True
    return False
