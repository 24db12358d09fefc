"""What is measured of the store: the time of its operations, and the reservations that it has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from pomelo.call import MODE_NAMES
from pomelo.errors import PomeloError
from pomelo.money import MICROS
from pomelo.stores.ledger import LedgerStore, LostReservationError, OpenReservation
from pomelo.telemetry.instruments import Readings
from pomelo.telemetry.metrics import Metrics

OPERATIONS = ("reserve", "settle", "void", "note", "limit_status")
"""The operations that are timed: those that tasks wait for."""

READ_INTERVAL = 5.0
"""The fewest seconds between two reads of all reservations."""

MAX_READ_SHARE = 0.02
"""Maximum share of the time that these reads take: of very many wallets they are less frequent."""

READ_TIMEOUT = 1.0
"""Seconds that a report waits for a read; then it has the values of the read before. After a read that failed
it has none: the age of a reservation that may have ended would grow through an outage."""


class TimedLedgerStore:
    """A store whose operations are timed. All else is the store's own."""

    def __init__(self, store: LedgerStore, metrics: Metrics) -> None:
        self._store = store
        for operation in OPERATIONS:
            setattr(self, operation, _timed(store, operation, metrics))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def _timed(store: LedgerStore, operation: str, metrics: Metrics) -> Callable[..., Awaitable[Any]]:
    """Returns a method of a store, timed until its result is there, whether or not somebody awaits it."""
    clock = time.perf_counter

    observe = metrics.store_operations.observe
    metrics.store_errors.start(operation)

    def failed(error: BaseException) -> None:
        # That a reservation is lost is not a failure of the store.
        if not isinstance(error, LostReservationError):
            metrics.store_errors.values[operation,] += 1

    def done(started: float, future: asyncio.Future[Any]) -> None:
        observe(clock() - started, operation)
        error = asyncio.CancelledError() if future.cancelled() else future.exception()
        if error is not None:
            failed(error)

    async def wait(awaitable: Awaitable[Any], started: float) -> Any:
        try:
            result = await awaitable
        except Exception as error:
            observe(clock() - started, operation)
            failed(error)
            raise
        observe(clock() - started, operation)
        return result

    def call(*args: Any, **kwargs: Any) -> Awaitable[Any]:
        started = clock()
        result = getattr(store, operation)(*args, **kwargs)
        if not isinstance(result, asyncio.Future):
            return wait(result, started)
        if result.done():
            done(started, result)
        else:
            result.add_done_callback(partial(done, started))
        return result

    return call


class OpenReservations:
    """The reservations of the store, read for a report at most every READ_INTERVAL."""

    def __init__(self, store: LedgerStore, now: Callable[[], float]) -> None:
        self._store = store
        self._now = now
        self._found: list[OpenReservation] | None = None
        """None: not known."""
        self._reading: asyncio.Task[None] | None = None
        self._next_read = 0.0

    def register(self, metrics: Metrics) -> None:
        metrics.before_reading(self.refresh)
        metrics.held.read(self._held)
        metrics.reservation_age.read(self._age)

    async def refresh(self) -> None:
        """Reads the reservations, if it is time to."""
        if self._reading is None and time.monotonic() >= self._next_read:
            self._reading = asyncio.create_task(self._read())
        if self._reading is not None:
            await asyncio.wait({self._reading}, timeout=READ_TIMEOUT)

    async def _read(self) -> None:
        started = time.monotonic()
        try:
            self._found = await self._store.reservations()
        except PomeloError:  # the store can't be reached
            self._found = None
        finally:
            ended = time.monotonic()
            self._next_read = ended + max(READ_INTERVAL, (ended - started) / MAX_READ_SHARE)
            self._reading = None

    def _held(self) -> Readings:
        if self._found is None:
            return {}
        held = {("live",): 0, ("test",): 0}
        for one in self._found:
            held[MODE_NAMES[one.record.live],] += one.amount
        return {mode: amount / MICROS for mode, amount in held.items()}

    def _age(self) -> Readings:
        if self._found is None:
            return {}
        now = self._now()
        return {(): max(0.0, now - min((one.record.at for one in self._found), default=now))}
