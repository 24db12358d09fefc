"""Fixtures for tests of the store on Redis: real servers, emptied before each test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pomelo.stores import open_store
from pomelo.stores.accounts import Grant
from pomelo.stores.base import StoreError
from pomelo.stores.redis import Timing, open_redis
from pomelo.stores.redis.key_names import WORKERS
from tests.contract.ledger_rig import WALLET, abandon
from tests.redis_server import RedisServer, binary, reply_of, shipped_binary

IDLE = {"heartbeat": 3600.0, "drain": 3600.0}
"""The store does nothing of its own accord."""


@pytest.fixture(scope="module", params=["machine", "shipped"])
def started_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """The server of this machine and the one that a package ships: Redis and Valkey, if both exist."""
    program = binary() if request.param == "machine" else shipped_binary()
    if request.param == "shipped" and binary() == program:
        pytest.skip("the machine has only this server")
    with RedisServer(program=program) as started:
        yield started


ONE_SERVER = pytest.mark.parametrize("started_server", ["machine"], indirect=True)
"""Marks a module with tests of processes, for which one type of server is enough."""


@pytest.fixture
def server(started_server: RedisServer) -> RedisServer:
    """The server, emptied."""
    started_server.do("FLUSHALL")
    return started_server


def open_on(url: str, folder: Path, **timing: float) -> Any:
    # On a busy machine, a thousand concurrent calls may take longer than the usual timeout.
    timing = {"timeout": 20.0, "attempt_timeout": 5.0} | timing
    return open_redis(url, f"sqlite:{folder / 'usage.db'}", timing=Timing(**timing))


async def open_with_credits(stack: AsyncExitStack, server: RedisServer, folder: Path, **timing: float) -> Any:
    store = await stack.enter_async_context(open_on(server.url, folder, **timing))
    store.drain_usage()
    await store.add_account(WALLET.account, "pro", 1.0)
    await store.grant(Grant("g", WALLET, 1_000, 1.0))
    return store


Opener = Callable[..., Awaitable[Any]]
"""Opens a store with the `timing` that it is called with, in which WALLET has 1,000 microcredits."""


@pytest.fixture
async def opened(server: RedisServer, tmp_path: Path) -> AsyncIterator[Opener]:
    """Opens stores on the server, with one archive. They are closed after the test."""
    async with AsyncExitStack() as stack:
        yield partial(open_with_credits, stack, server, tmp_path)


async def refusal_message(url: str, folder: Path) -> str:
    with pytest.raises(StoreError) as caught:
        async with open_store(url, archive=f"sqlite:{folder / 'usage.db'}"):
            pass
    message = str(caught.value)
    assert "\n" not in message
    assert "secret" not in message
    return message


class FaultyClient:
    """The client of a store. For each command that `hits` selects, it raises the result of `error` instead of
    sending the command or, with `after`, after sending it. Calls time out after `timeout` seconds."""

    def __init__(self, store: Any, timeout: float = 0.9) -> None:
        self._client = store._connection._client
        store._connection._client = self
        self._store = store
        self._usual_timeout = store._connection.timing.timeout
        # Not when opening the store, which may take longer on a busy machine.
        self.set_timeout(timeout)
        self.error: Callable[[], Exception] = lambda: RuntimeError("the handler is closed")
        self.hits: Callable[[tuple[Any, ...]], bool] = lambda command: False
        self.after = False
        self.failed: list[tuple[Any, ...]] = []

    def set_timeout(self, timeout: float) -> None:
        self._store._connection.timing = replace(self._store._connection.timing, timeout=timeout)
        self._store._operations._timeout = timeout

    def end(self) -> None:
        """Ends the errors. From now on a call has its usual timeout, which a busy machine may need."""
        self.hits = lambda command: False
        self.set_timeout(self._usual_timeout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def execute_command(self, *command: Any) -> asyncio.Future[Any]:
        return reply_of(self._execute(command))

    async def _execute(self, command: tuple[Any, ...]) -> Any:
        if not self.hits(command):
            return await self._client.execute_command(*command)
        self.failed.append(command)
        if self.after:
            await self._client.execute_command(*command)
        raise self.error()


async def abandon_dead(store: Any, server: RedisServer) -> None:
    """Abandons a store whose process the others have marked dead."""
    await abandon(store)
    server.do("HSET", WORKERS, store._worker.id, "dead")


def lose_replies(store: Any, part: str) -> FaultyClient:
    """Loses the replies to the first two commands that have that part: to the first one, the server may have
    answered that it does not know the script."""
    faults = FaultyClient(store, 20.0)
    faults.error, faults.after = lambda: ConnectionResetError(104, "reset"), True
    faults.hits = lambda command: part in command and len(faults.failed) < 2
    return faults


async def until(condition: Callable[[], Any]) -> None:
    """Waits for a condition, which may be asynchronous."""
    async with asyncio.timeout(20):
        while True:
            found = condition()
            if found is True or (not isinstance(found, bool) and await found):
                return
            await asyncio.sleep(0.01)
