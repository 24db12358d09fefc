"""The list of the serving processes. An entry counts while its worker is alive."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from pomelo.ids import new_id
from pomelo.stores.base import StoreError
from pomelo.stores.fleet import Process
from pomelo.stores.redis.connection import Argument, Connection, Timing, translated_errors
from pomelo.stores.redis.key_names import FORMAT, PROCESSES, WORKERS, reported
from pomelo.stores.redis.scripts import NOTE_STATE
from pomelo.stores.redis.url import connect, parse_url
from pomelo.stores.redis.wallet_index import Role, WalletIndex
from pomelo.stores.redis.workers import Worker, clock_ahead

_FORMAT = b"1"
_POLL = 0.1
"""Seconds between two looks at the heartbeats of the other processes."""


class Processes(Role):
    """Implements `pomelo.stores.fleet.Fleet`."""

    _worker: Worker

    # Both are parts of a start, which waits for a busy server.

    @translated_errors
    async def register(self, process: Process) -> list[Process]:
        with self._connection.one_deadline(self._connection.timing.open):
            await self._worker.register(process)
            processes = await read_processes(self._connection)
        return [each for worker, each in processes.items() if worker != self._worker.id]

    @translated_errors
    async def clock_ahead(self) -> float:
        with self._connection.one_deadline(self._connection.timing.open):
            return await clock_ahead(self._connection)

    @translated_errors
    async def note_state(self, subject: str, state: str, seconds: float) -> bool:
        args: list[Argument] = [state, round(seconds), new_id("")]
        return bool(await self._connection.run(NOTE_STATE, [reported(subject)], args))


async def check_format(connection: Connection) -> None:
    """Checks, before this process writes anything else, that it knows the form of the data.

    Raises:
        StoreError: a newer version of Pomelo has written to the server.
        PomeloError: store_unavailable.
    """
    await connection.send("SET", FORMAT, _FORMAT, "NX")
    version = await connection.send("GET", FORMAT)
    if version != _FORMAT:
        raise StoreError(
            f"The data of the Redis server was written by a newer Pomelo ({version!r}). Upgrade Pomelo"
        )


async def read_processes(connection: Connection) -> dict[str, Process]:
    """The processes by their workers, oldest first.

    Raises:
        PomeloError: store_unavailable.
    """
    counts = await connection.send("HGETALL", WORKERS)
    live = {worker for worker, count in counts.items() if count != b"dead"}
    found = {}
    for worker, data in (await connection.send("HGETALL", PROCESSES)).items():
        if worker in live:
            with suppress(ValueError):  # of a newer version
                found[worker.decode()] = Process.decode(data)
    return dict(sorted(found.items(), key=lambda each: (each[1].started, each[1].host)))


async def read_fleet(url: str, *, living: bool = False) -> tuple[list[Process], float]:
    """The serving processes, oldest first, and the seconds by which this host's clock is ahead of the server.
    This process does not become one of them. `living` as in `pomelo.stores.read_fleet`.

    Raises:
        StoreError: the server can't be reached or used.
        PomeloError: store_unavailable.
    """
    timing = Timing()
    connection = Connection(await connect(parse_url(url), timing, timing.open), timing)
    try:
        if living:
            await _await_heartbeats(connection)
        with connection.one_deadline(timing.open):
            return list((await read_processes(connection)).values()), await clock_ahead(connection)
    finally:
        await connection.close()


async def _await_heartbeats(connection: Connection) -> None:
    """Waits until each serving process has sent a heartbeat or was marked dead, by this process if no other
    one watches."""
    await check_format(connection)
    worker = Worker(connection, WalletIndex(connection), time.monotonic)
    await worker.open()
    try:
        first = await connection.send("HGETALL", WORKERS)
        silent = {
            name for name in await connection.send("HKEYS", PROCESSES) if first.get(name, b"dead") != b"dead"
        }
        while silent:
            await asyncio.sleep(_POLL)
            await worker.check()  # a server that refuses heartbeats refuses those of all
            counts = await connection.send("HGETALL", WORKERS)
            silent = {name for name in silent if counts.get(name) == first[name]}
    finally:
        await worker.close(())
