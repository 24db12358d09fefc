"""A server that kills itself at a named point: the program of the crash tests.

It is the usual app with a wrapped store, wrapped providers and its own SQLite connections. They send the
process SIGKILL when a task whose request id names the point reaches it, as in "crash.after_reserve.7". With
DIE_IN_RECOVERY set, it dies while it recovers the tasks of the server before it.

It prints its addresses in one line of JSON, then answers each line on stdin with one line: `state` with the
state of the store, `fill` and `empty` after it has filled or freed the data folder's disk. SIGTERM ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, cast

import uvloop

from pomelo.app import App, open_app
from pomelo.engine.circuit_breaker import MINIMUM_CALLS, CircuitBreaker
from pomelo.engine.routing import Router
from pomelo.providers.base import Event, Job, JobMethod, Provider
from pomelo.providers.registry import read_registry
from pomelo.settings import load
from pomelo.stores.base import Store
from tests.faults.books import state
from tests.faults.vendor import STOPPED_MODEL


class CrashPoints:
    """Kills the process when a task reaches the point that its request id names."""

    def __init__(self) -> None:
        self.requests: dict[str, str] = {}
        """Request ids by task id."""
        self.reserved: list[str] = []
        self.voided: list[str] = []
        """Task ids, in the order in which they were reserved or voided."""

    def reach(self, point: str, task_id: str) -> None:
        """Kills the process if this is the point of that task."""
        if self.requests.get(task_id, "").startswith(f"crash.{point}."):
            os.kill(os.getpid(), signal.SIGKILL)


TASKS_OF: dict[str, Callable[..., list[str]]] = {
    "reserve": lambda request: [request.draft.task_id],
    "settle": lambda settlement: [settlement.record.task_id],
    "void": lambda wallet, task_id, **options: [task_id],
    "note": lambda records: [record.task_id for record in records],
}
"""The tasks of each operation that the server dies around."""


class CrashingStore:
    """A store that dies before and after an operation."""

    def __init__(self, store: Store, points: CrashPoints) -> None:
        self._store = store
        self._points = points

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        return partial(self._around, name, found) if name in TASKS_OF else found

    def _around(
        self, operation: str, call: Callable[..., Awaitable[Any]], *arguments: Any, **options: Any
    ) -> Awaitable[Any]:
        task_ids = TASKS_OF[operation](*arguments, **options)
        if operation == "reserve":
            self._points.requests[task_ids[0]] = arguments[0].draft.request_id
        for task_id in task_ids:
            self._points.reach(f"before_{operation}", task_id)
        if operation == "reserve":
            self._points.reserved += task_ids
        elif operation == "void":
            self._points.voided += task_ids
        result = call(*arguments, **options)  # it starts immediately, even if it is not awaited

        async def wait() -> Any:
            value = await result
            for task_id in task_ids:
                self._points.reach(f"after_{operation}", task_id)
            return value

        return asyncio.ensure_future(wait())


class CrashingProvider:
    """A provider that dies before it is called, at the first event, at the third, and at the end."""

    def __init__(self, provider: Provider, points: CrashPoints) -> None:
        self._provider = provider
        self._points = points

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._provider, name)
        return partial(self._events, found) if callable(found) and name != "aclose" else found

    async def _events(self, method: JobMethod, job: Job[Any]) -> AsyncGenerator[Event, None]:
        self._points.reach("before_the_provider", job.task_id)
        async with aclosing(method(job)) as events:
            number = 0
            async for event in events:
                number += 1
                if number == 1:
                    self._points.reach("at_the_first_piece", job.task_id)
                if number == 3:
                    self._points.reach("between_pieces", job.task_id)
                yield event
        self._points.reach("at_the_end", job.task_id)


class CrashingConnection(sqlite3.Connection):
    """A connection that dies between the statements of a transaction."""

    points: CrashPoints
    recovering: bool
    charged: tuple[str, ...] = ()
    """The tasks whose records are written but not yet committed."""

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        if sql.startswith("BEGIN"):
            self.charged = ()
        elif sql.startswith("DELETE FROM holds") and self.recovering:
            os.kill(os.getpid(), signal.SIGKILL)
        elif sql == "COMMIT":
            for task_id in self.charged:
                self.points.reach("in_settle_before_the_commit", task_id)
        return super().execute(sql, parameters)

    def executemany(self, sql: str, parameters: Any, /) -> sqlite3.Cursor:
        rows = list(parameters)
        if sql.startswith("INSERT INTO usage"):
            self.charged = tuple(row[0] for row in rows)
            for task_id in self.charged:
                self.points.reach("in_settle_before_the_record", task_id)
        elif sql.startswith("UPDATE wallets"):
            for task_id in self.charged:
                self.points.reach("in_settle_before_the_charge", task_id)
            for task_id in self.points.reserved:
                self.points.reach("in_reserve", task_id)
            for task_id in self.points.voided:
                self.points.reach("in_void", task_id)
        return super().executemany(sql, rows)


def fill(folder: Path) -> None:
    with (folder / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        for size in (65536, 4096):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass


async def answer(app: App, words: list[str]) -> Any:
    match words:
        case ["state", since]:
            return await state(app.store, float(since))
        case ["fill"]:
            await asyncio.to_thread(fill, app.settings.data)
        case ["empty"]:
            (app.settings.data / "filler").unlink()
    return None


async def main() -> None:
    loop = asyncio.get_running_loop()
    ending = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ending.set)
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    points = CrashPoints()
    CrashingConnection.points = points
    CrashingConnection.recovering = bool(os.environ.get("DIE_IN_RECOVERY"))
    sqlite3.connect = partial(sqlite3.connect, factory=CrashingConnection)  # type: ignore[assignment]

    def router(providers: Mapping[str, Provider]) -> Router:
        crashing = {name: CrashingProvider(one, points) for name, one in providers.items()}
        return Router(crashing, breaker=breaker)

    stopped = read_registry(None).catalog.models[STOPPED_MODEL].routes[0].model

    def breaker(provider: str, model: str) -> CircuitBreaker:
        minimum = MINIMUM_CALLS if model == stopped else 10**9
        return CircuitBreaker(provider, model, minimum_calls=minimum)

    def wrapped(store: Store) -> Store:
        return cast(Store, CrashingStore(store, points))

    async with open_app(load(None), wrap_store=wrapped, make_router=router) as app:
        assert app.rest is not None
        write_line({"REST": "http://{}:{}".format(*app.rest), "gRPC": app.grpc})
        listening = asyncio.create_task(listen(app, lines))
        await ending.wait()
        listening.cancel()


async def listen(app: App, lines: asyncio.StreamReader) -> None:
    while line := await lines.readline():
        write_line(await answer(app, line.decode().split()))


def write_line(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
