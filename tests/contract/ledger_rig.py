"""A rig for every store, so that the same tests run on each, and the tasks of these tests.

A new store needs a rig and a row of STORES; then all contract tests and the model test run on it.
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
from pomelo.stores.accounts import Balance, Grant, Wallet
from pomelo.stores.base import Store
from pomelo.stores.ledger import (
    IdempotencyKey,
    LostReservationError,
    Refused,
    ReplayedAnswer,
    Reserved,
    ReserveRequest,
    Settled,
    Settlement,
)
from pomelo.stores.redis import Timing, open_redis
from pomelo.stores.sqlite import SqliteStore, open_sqlite
from pomelo.stores.usage import UsageRecord, WalletState
from tests.limits import counters
from tests.redis_server import any_server

MODEL = "gpt-4"
WALLET = Wallet("acme", True)
"""The default wallet of the tasks. The fixture `rig` gives it 1,000 microcredits."""

KEY = IdempotencyKey("order-7", b"\x00digest")


class Clock:
    """The clocks of the store, set by the test: wall time and monotonic time."""

    jumping = True
    """Whether the store uses the machine's wall clock."""

    def __init__(self) -> None:
        # Halves are exact in floating point.
        self.wall = 1_800_000_000.0
        self.steady = 5_000.0

    def passes(self, seconds: float) -> None:
        """Lets time pass."""
        self.wall += seconds
        self.steady += seconds

    def jumps(self, seconds: float) -> None:
        """Changes the machine's clock."""
        self.wall += seconds


class Rig(Protocol):
    """A store under test, and its clock."""

    @property
    def store(self) -> Store:
        """The open store."""
        ...

    @property
    def clock(self) -> Clock:
        """The clock of the store."""
        ...

    async def open(self) -> None:
        """Opens the store, new or as `close` left it."""
        ...

    async def close(self) -> None:
        """Closes the store."""
        ...

    async def crash(self) -> None:
        """Ends the store like a killed process, opens it again, and waits until its tasks are recovered."""
        ...


class SqliteRig:
    """A file in a folder. After a crash the rig uses copies of its files, with the log not yet read. It crashes
    after the counts of reserved tasks were written, which is at most COUNTS_DELAY later."""

    store: SqliteStore

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.path = folder / "0" / "pomelo.db"
        self._crashes = 0
        self._stack = AsyncExitStack()

    async def open(self) -> None:
        opened = open_sqlite(self.path, now=lambda: self.clock.wall, monotonic=lambda: self.clock.steady)
        self.store = await self._stack.enter_async_context(opened)

    async def close(self) -> None:
        await self._stack.aclose()

    async def crash(self) -> None:
        await self.store.set_plan("", "")  # any change writes them too
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
    """The server's clock. Also shortens the TTLs, which the server counts by its real clock.

    The store does not use the clock of the machine that Pomelo runs on.
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
    """The server of all tests, emptied."""

    store: Store

    def __init__(self, folder: Path) -> None:
        self.url = any_server()
        self.clock = RedisClock(self.url)
        self._archive = f"sqlite:{folder / 'usage.db'}"
        self._stack = AsyncExitStack()
        with Redis.from_url(self.url) as server:
            server.flushdb()

    async def open(self) -> None:
        opened = open_redis(
            f"{self.url}?persistence=none",
            self._archive,
            timing=Timing(timeout=20.0, attempt_timeout=5.0, heartbeat=0.02, dead_after=0.1),
            now=lambda: self.clock.wall,
            server_time=lambda: self.clock.wall,
        )
        store: Any = await self._stack.enter_async_context(opened)
        store.drain_usage()
        self.store = store

    async def close(self) -> None:
        await self._stack.aclose()

    async def crash(self) -> None:
        await abandon(self.store)
        await self.close()
        await self.open()
        while await self.store.drafts():  # noqa: ASYNC110 (recovered after some heartbeats)
            await asyncio.sleep(0.01)


async def abandon(store: Any) -> None:
    """Stops a store on Redis as if its process were killed. It must still be closed."""
    store._connection.closed = True
    await store._worker.stop()


STORES: dict[str, Callable[[Path], Rig]] = {"sqlite": SqliteRig, "redis": RedisRig}
"""The rig of each store."""


@pytest.fixture(params=STORES)
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    """Each open store, in which WALLET has 1,000 microcredits."""
    created = STORES[request.param](tmp_path)
    await created.open()
    try:
        assert await created.store.add_account(WALLET.account, "pro", 1.0)
        await created.store.grant(Grant("first", WALLET, 1_000, 1.0))
        yield created
    finally:
        await created.close()


@pytest.fixture
def clock(rig: Rig) -> Clock:
    """The clock of the rig."""
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


def request(
    task_id: str,
    minimum: int = 10,
    maximum: int | None = None,
    *,
    requests_limit: int | None = None,
    concurrency_limit: int | None = None,
    tokens: int = 0,
    tokens_limit: int | None = None,
    idempotency_key: IdempotencyKey | None = None,
    sufficient: int = 0,
    **changes: Any,
) -> ReserveRequest:
    """A task's request. `changes` are fields of its draft. Without tokens and their limit it counts none."""
    draft = record(task_id, **changes)
    taken = counters(requests_limit, concurrency_limit, tokens, tokens_limit, draft.model)
    return ReserveRequest(
        draft,
        minimum,
        minimum if maximum is None else maximum,
        taken if tokens or tokens_limit is not None else taken[:2],
        idempotency_key,
        sufficient,
        "concurrency",
    )


def settlement(
    task_id: str, cost: int = 10, tokens: int = 0, answer: bytes | None = None, **changes: Any
) -> Settlement:
    """A task's settlement."""
    ended = record(task_id, cost=cost, **changes)
    return Settlement(ended, counters(tokens=tokens, model=ended.model), answer)


async def run_task(store: Store, task_id: str, cost: int = 10, **changes: Any) -> Settled:
    """Reserves and settles a task."""
    assert isinstance(await store.reserve(request(task_id, cost, **changes)), Reserved)
    return await store.settle(settlement(task_id, cost, **changes))


async def amount(reserving: Awaitable[Reserved | Refused | ReplayedAnswer]) -> int:
    """The credits that a request reserved."""
    answer = await reserving
    assert isinstance(answer, Reserved)
    return answer.amount


async def refusal(reserving: Awaitable[Any]) -> str:
    """Why a request was refused: the counter whose limit would be exceeded, or another code."""
    answer = await reserving
    assert isinstance(answer, Refused), answer
    assert (answer.code == "limit_exceeded") == bool(answer.counter)
    return answer.counter or answer.code


async def error_code(call: Awaitable[Any]) -> str:
    """The code of the error that a call raises."""
    with pytest.raises(PomeloError) as caught:
        await call
    return caught.value.code


async def is_lost(call: Awaitable[Any]) -> bool:
    """Whether a call raises LostReservationError."""
    try:
        await call
    except LostReservationError:
        return True
    return False


async def balance(rig: Rig, wallet: Wallet = WALLET) -> tuple[int, int, int]:
    """What is spent, held and available."""
    found = await rig.store.balance(wallet)
    assert found.granted == found.spent + found.held + found.available
    return found.spent, found.held, found.available


async def wallets(store: Store) -> list[Wallet]:
    """All wallets that ever had a grant or a reservation, sorted."""
    found = [state.wallet async for page in store.wallet_states() for state in page]
    return sorted(found, key=lambda wallet: (wallet.account, wallet.live))


async def held(store: Store, wallet: Wallet) -> tuple[int, int]:
    """The amount that a wallet's balance says is held, and the sum of its reservations."""
    states = {state.wallet: state async for page in store.wallet_states() for state in page}
    state = states.get(wallet, WalletState(wallet, Balance(), 0, 0))
    return state.balance.held, state.reservations_sum
