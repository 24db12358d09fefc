"""`pomelo serve` with several workers: processes that share the addresses, and one that watches them.

The watching one serves nothing. It takes the addresses first, so that no other program can share them, starts
the workers, starts one again that died, and ends them all in good order.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from pomelo.cli.serve import development_key, greet, run, taken, until
from pomelo.cli.terminal import FailureError, explain
from pomelo.logs import format_trace
from pomelo.settings import Settings, split_address

START_WAIT = 60.0
"""Seconds that a worker may take to serve."""

AGAIN_AFTER = 1.0
"""Seconds after which a worker that died is started again."""

END_WAIT = 15.0
"""Seconds beyond the grace after which a worker that does not end is killed."""

log = logging.getLogger("pomelo.workers")


class Ready(NamedTuple):
    """What a worker tells once it serves."""

    configured: frozenset[str]
    rest: tuple[str, int] | None
    grpc: str | None


async def supervise(settings: Settings, stop: asyncio.Event) -> None:
    """Serves with as many workers as the settings say, until `stop`.

    Raises:
        FailureError: an address is taken, or the workers can't serve.
    """
    made = await development_key(settings)
    failure = taken(POMELO_REST=settings.rest, POMELO_GRPC=settings.grpc)
    if failure is not None:
        raise failure
    with _reserved(settings) as settings:
        workers = [_Worker(settings, number) for number in range(settings.workers)]
        try:
            ready = [await worker.start() for worker in workers]
            greet(settings, ready[0].configured, ready[0].rest, ready[0].grpc, made)
            watching = [asyncio.create_task(worker.watch()) for worker in workers]
            await until(stop, settings)
            for task in watching:
                task.cancel()
        finally:
            await asyncio.gather(*[worker.end(settings.grace + END_WAIT) for worker in workers])


@contextmanager
def _reserved(settings: Settings) -> Iterator[Settings]:
    """Holds the addresses for the workers to listen on; a port of 0 becomes the one that was found."""
    found = {}
    with ExitStack() as stack:
        for name in ("rest", "grpc"):
            address = getattr(settings, name)
            if not address:
                continue
            host, port = split_address(address)
            family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            held = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind(place)
            found[name] = f"{f'[{host}]' if ':' in host else host}:{held.getsockname()[1]}"
        yield settings.model_copy(update=found)


class _Worker:
    """One of the processes, started again whenever it dies."""

    def __init__(self, settings: Settings, number: int) -> None:
        self._settings = settings
        self._number = number
        self._process: Any = None
        self._line: Connection | None = None

    async def start(self) -> Ready:
        """Starts it; returns when it serves.

        Raises:
            FailureError: it can't.
        """
        # Spawned, not forked: gRPC and the event loop do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        process = context.Process(target=_work, args=(self._settings, self._number, theirs))
        process.start()
        self._process = process
        theirs.close()
        told = await asyncio.to_thread(self._told)
        if isinstance(told, Ready):
            return told
        raise FailureError(told)

    def _told(self) -> Ready | str:
        line = self._line
        try:
            if line is not None and line.poll(START_WAIT):
                told: Ready | str = line.recv()
                return told
        except EOFError:
            return f"worker {self._number} ended before it served"
        return f"worker {self._number} does not serve after {START_WAIT:g} s"

    async def watch(self) -> None:
        """Starts it again whenever it has died; until it is cancelled."""
        while True:
            await self._died()
            log.error("worker %d died with status %s", self._number, self._process.exitcode)
            await asyncio.sleep(AGAIN_AFTER)
            try:
                await self.start()
            except FailureError as error:
                log.error("worker %d can't be started again: %s", self._number, error)
            except Exception as error:  # e.g. no free process or descriptor; the next try may succeed
                log.error("worker %d can't be started again\n%s", self._number, format_trace(error))

    async def end(self, wait: float) -> None:
        """Lets it end, and kills it when it does not."""
        process = self._process
        if process is None:
            return
        if process.is_alive():
            process.terminate()
            await asyncio.to_thread(process.join, wait)
        if process.is_alive():
            process.kill()
            await asyncio.to_thread(process.join)
        if self._line is not None:
            self._line.close()

    async def _died(self) -> None:
        loop = asyncio.get_running_loop()
        died = asyncio.Event()
        sentinel = self._process.sentinel
        loop.add_reader(sentinel, died.set)
        try:
            await died.wait()
        finally:
            loop.remove_reader(sentinel)
        self._process.join()


def _work(settings: Settings, number: int, line: Connection) -> None:
    """A worker's process, from its beginning to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the watching process tells us
    run(lambda stop: _serve(settings, number, line, stop), (signal.SIGTERM,))


async def _serve(settings: Settings, number: int, line: Connection, stop: asyncio.Event) -> None:
    from pomelo.app import open_app

    # The other end is closed when the watching process is gone, however it went.
    asyncio.get_running_loop().add_reader(line.fileno(), stop.set)
    try:
        async with open_app(settings, worker=number) as app:
            line.send(Ready(app.configured, app.rest, app.grpc))
            await stop.wait()
    except Exception as error:
        told = explain(error)
        if told is None or stop.is_set():
            raise
        line.send(told)
