"""A server that kills itself at a named point: the program that the tests of crashes start.

It is the app as it is, opened with its seams: a store, a provider and SQLite connections that stand between
the house and its own, and send the process SIGKILL when the task comes by whose request id names the point,
as in "crash.after_take.7". With DIE_IN_RECOVERY set it dies while it charges the orphans of the one before.

It says in one line of JSON where it listens, then answers each word on stdin with one: `state` tells what the
store holds, `fill` and `empty` fill the data folder's disk and free it. SIGTERM ends it in good order.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from pomelo.app import App, open_app
from pomelo.engine.circuit_breaker import CircuitBreaker
from pomelo.engine.routing import Router
from pomelo.providers.base import Event, Job, JobMethod, Provider
from pomelo.settings import load
from pomelo.stores.accounts import Wallet
from pomelo.stores.base import Store
from pomelo.stores.ledger import ReserveRequest, Settlement
from pomelo.stores.usage import UsageRecord
from tests.faults.books import state

T = TypeVar("T")


class Fate:
    """Who dies where."""

    def __init__(self) -> None:
        self.requests: dict[str, str] = {}
        """Request ids by task id."""

    def at(self, point: str, task_id: str) -> None:
        """Ends the process, if this is the point of that task."""
        if self.requests.get(task_id, "").startswith(f"crash.{point}."):
            os.kill(os.getpid(), signal.SIGKILL)


class DyingStore:
    """A store that dies before and after it does something. All else is the inner one's."""

    def __init__(self, store: Store, fate: Fate) -> None:
        self._store = store
        self._fate = fate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def reserve(self, take: ReserveRequest) -> Awaitable[Any]:
        """See LedgerStore."""
        task_id = take.draft.task_id
        self._fate.requests[task_id] = take.draft.request_id
        return self._around("take", [task_id], lambda: self._store.reserve(take))

    def settle(self, settlement: Settlement) -> Awaitable[Any]:
        """See LedgerStore."""
        return self._around("settle", [settlement.record.task_id], lambda: self._store.settle(settlement))

    def void(self, wallet: Wallet, task_id: str, *, refund: bool = False) -> Awaitable[None]:
        """See LedgerStore."""
        return self._around("void", [task_id], lambda: self._store.void(wallet, task_id, refund=refund))

    async def note(self, records: Sequence[UsageRecord]) -> list[str]:
        """See LedgerStore."""
        task_ids = [record.task_id for record in records]
        return await self._around("note", task_ids, lambda: self._store.note(records))

    def _around(self, what: str, task_ids: list[str], do: Callable[[], Awaitable[T]]) -> Awaitable[T]:
        for task_id in task_ids:
            self._fate.at(f"before_{what}", task_id)
        doing = do()  # it begins at once, whoever awaits it

        async def done() -> T:
            value = await doing
            for task_id in task_ids:
                self._fate.at(f"after_{what}", task_id)
            return value

        return asyncio.ensure_future(done())


class DyingProvider:
    """A provider that dies before it is asked, at the first piece, after the third, and at the end."""

    def __init__(self, provider: Provider, fate: Fate) -> None:
        self._provider = provider
        self._fate = fate

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._provider, name)
        return partial(self._events, found) if callable(found) and name != "aclose" else found

    async def _events(self, method: JobMethod, job: Job) -> AsyncGenerator[Event, None]:
        self._fate.at("before_the_provider", job.task_id)
        async with aclosing(method(job)) as events:
            number = 0
            async for event in events:
                number += 1
                if number == 1:
                    self._fate.at("at_the_first_piece", job.task_id)
                if number == 3:
                    self._fate.at("between_pieces", job.task_id)
                yield event
        self._fate.at("at_the_end", job.task_id)


class DyingConnection(sqlite3.Connection):
    """A connection that dies between the statements of a step."""

    fate: Fate
    recovering: bool
    task_id = ""
    """Whose step it is."""
    charged: str = ""
    """Whose record was written, and is not committed."""

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        """Executes it, or dies before."""
        if sql.startswith("SAVEPOINT"):
            self.task_id = ""
        elif "AS task_id) AS q" in sql:
            self.task_id = parameters[3]
        elif sql.startswith("INSERT INTO holds"):
            self.fate.at("in_take", self.task_id)
        elif sql.startswith("UPDATE wallets SET spent"):
            self.fate.at("in_settle_before_the_charge", self.task_id)
        elif sql.startswith("DELETE FROM holds"):
            self.fate.at("in_void", self.task_id)
            if self.recovering:
                os.kill(os.getpid(), signal.SIGKILL)
        elif sql.startswith("INSERT INTO usage"):
            self.fate.at("in_settle_before_the_record", self.task_id)
            self.charged = self.task_id
        elif sql == "COMMIT":
            self.fate.at("in_settle_before_the_commit", self.charged)
        return super().execute(sql, parameters)


def fill(folder: Path) -> None:
    """Takes all that is left of the disk."""
    with (folder / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        for size in (65536, 4096):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass


async def answer(app: App, words: list[str]) -> Any:
    """What a line of stdin asks for."""
    match words:
        case ["state", since]:
            return await state(app.store, float(since))
        case ["fill"]:
            await asyncio.to_thread(fill, app.settings.data)
        case ["empty"]:
            (app.settings.data / "filler").unlink()
    return None


async def main() -> None:
    """Serves until SIGTERM."""
    loop = asyncio.get_running_loop()
    ending = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ending.set)
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    fate = Fate()
    DyingConnection.fate = fate
    DyingConnection.recovering = bool(os.environ.get("DIE_IN_RECOVERY"))
    sqlite3.connect = partial(sqlite3.connect, factory=DyingConnection)  # type: ignore[assignment]

    def router(providers: Mapping[str, Provider]) -> Router:
        dying = {name: DyingProvider(one, fate) for name, one in providers.items()}
        return Router(dying, breaker=partial(CircuitBreaker, minimum_calls=10**9))

    def wrapped(store: Store) -> Store:
        return DyingStore(store, fate)  # type: ignore[return-value]

    async with open_app(load(None), wrap_store=wrapped, make_router=router) as app:
        assert app.rest is not None
        say({"rest": "http://{}:{}".format(*app.rest), "grpc": app.grpc})
        asking = asyncio.create_task(listen(app, lines))
        await ending.wait()
        asking.cancel()


async def listen(app: App, lines: asyncio.StreamReader) -> None:
    """Answers the lines of stdin, one after another."""
    while line := await lines.readline():
        say(await answer(app, line.decode().split()))


def say(what: Any) -> None:
    """Writes one line of JSON."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
