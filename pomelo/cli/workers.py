"""`pomelo serve` with several workers: processes that share the addresses, and a supervisor.

The supervisor serves nothing. It reserves the addresses so that no other program can share them, starts the
workers, restarts those that died, and ends them all.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from pomelo.cli.hangup import signals_held
from pomelo.cli.process import (
    addresses,
    create_development_key,
    find_used_address,
    on_hangup,
    open_observed_app,
    print_greeting,
    run_process,
    wait_for_end,
    wait_for_signal,
)
from pomelo.cli.terminal import FailureError, explain
from pomelo.configuration.reload import log_refusal, read_changes
from pomelo.network.addresses import join_address, split_address
from pomelo.network.listening import reserve
from pomelo.runtime.logs import format_trace
from pomelo.settings import Settings, SettingsError
from pomelo.telemetry.readiness import Readiness
from pomelo.telemetry.task_log import TaskLog

START_TIMEOUT = 60.0
"""Seconds that a worker has to start serving. A restarted one is awaited longer, as the others serve."""

RESTART_DELAY = 1.0
"""Seconds after which a worker that died is restarted."""

END_TIMEOUT = 15.0
"""Seconds beyond the drain delay and the grace period after which a worker that has not ended is killed."""

log = logging.getLogger("pomelo.workers")


class Ready(NamedTuple):
    """The message of a worker that serves."""

    configured: frozenset[str]
    rest: tuple[str, int] | None
    grpc: str | None
    admin: str


async def supervise(
    settings: Settings, load: Callable[[], Settings], stop: asyncio.Event, task_log: TaskLog
) -> None:
    """Serves with the configured number of workers until `stop` is set. This process runs no tasks. At
    SIGHUP, the workers change to the settings that `load` returns.

    Raises:
        FailureError: an address is in use, or the workers can't serve.
    """
    new_key = await create_development_key(settings)
    failure = find_used_address(**addresses(settings))
    if failure is not None:
        raise failure
    with _reserve_addresses(settings) as settings:
        workers = [_Worker(settings, load, number) for number in range(settings.workers)]
        running = settings

        async def reload() -> None:
            nonlocal running
            try:
                running, _, _ = await read_changes(running, load)
            except SettingsError as error:
                log_refusal(error)
                return
            for worker in workers:
                worker.reload(running)

        try:
            ready = []
            for worker in workers:
                try:
                    ready.append(await worker.start())
                except FailureError:
                    if not stop.is_set():  # a signal to all processes ends one that starts
                        raise
                if stop.is_set():
                    await wait_for_signal(stop, settings)  # it logs what happens
                    return
            first = ready[0]
            print_greeting(settings, first.configured, first.rest, first.grpc, first.admin, new_key)
            tasks = [asyncio.create_task(worker.keep_running()) for worker in workers]
            async with on_hangup(reload, stop):
                await wait_for_signal(stop, settings)
            for task in tasks:
                task.cancel()
        finally:
            await asyncio.gather(
                *[worker.end(settings.drain_delay + settings.grace + END_TIMEOUT) for worker in workers]
            )


@contextmanager
def _reserve_addresses(settings: Settings) -> Iterator[Settings]:
    """Binds the addresses that the workers listen on; a port of 0 is replaced by a free one."""
    bound = {}
    with ExitStack() as stack:
        for name in ("rest", "grpc", "admin"):
            address = getattr(settings, name)
            if not address:
                continue
            host, port = split_address(address)
            sockets = [stack.enter_context(each) for each in reserve(host, port)]
            bound[name] = join_address(host, sockets[0].getsockname()[1])
        yield settings.model_copy(update=bound)


class _Worker:
    """One of the processes. It is restarted when it dies."""

    def __init__(self, settings: Settings, load: Callable[[], Settings], number: int) -> None:
        self._settings = settings
        self._load = load
        self._number = number
        self._process: Any = None
        self._started_with = settings
        self._serves = False
        self._pipe: Connection | None = None

    async def start(self) -> Ready:
        """Starts the process and waits until it serves.

        Raises:
            FailureError: it can't serve.
        """
        self._spawn()
        ready = await self._ready()
        if ready is None:
            raise FailureError(f"worker {self._number} does not serve after {START_TIMEOUT:g} s")
        return ready

    def _spawn(self) -> None:
        """Starts the process, with the settings of now."""
        self._serves, self._started_with = False, self._settings
        # Else a file in the current folder, such as socket.py, could replace a module of the new process.
        os.environ["PYTHONSAFEPATH"] = "1"
        # Spawned, not forked: gRPC and the event loop do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._pipe, worker_pipe = context.Pipe()
        process = context.Process(target=_work, args=(self._settings, self._load, self._number, worker_pipe))
        resource_tracker.ensure_running()  # else the first process starts it, which unblocks SIGINT
        with signals_held():
            process.start()
        self._process = process
        worker_pipe.close()

    async def _ready(self) -> Ready | None:
        """Waits until the process serves; None: it does not yet after START_TIMEOUT.

        Raises:
            FailureError: it can't serve.
        """
        assert self._pipe is not None
        message = await asyncio.to_thread(self._receive, self._pipe)
        if isinstance(message, str):
            raise FailureError(message)
        if message is not None:
            self._serves = True
            if self._settings is not self._started_with:
                self.reload(self._settings)
        return message

    def _receive(self, pipe: Connection) -> Ready | str | None:
        try:
            if pipe.poll(START_TIMEOUT):
                message: Ready | str = pipe.recv()
                return message
        except EOFError:
            return f"worker {self._number} ended before it served"
        return None

    def reload(self, settings: Settings) -> None:
        """Lets the process reload its configuration, once it serves. `settings` are for its next start."""
        self._settings = settings
        if self._serves and self._process.is_alive():
            os.kill(self._process.pid, signal.SIGHUP)

    async def keep_running(self) -> None:
        """Restarts the process whenever it dies, until it is cancelled."""
        while True:
            await self._wait_for_death()
            log.error("worker %d died with status %s", self._number, self._process.exitcode)
            await asyncio.sleep(RESTART_DELAY)
            try:
                self._spawn()
                while await self._ready() is None:
                    log.warning("worker %d does not serve yet. Still waiting", self._number)
            except FailureError as error:
                log.error("worker %d can't be restarted: %s", self._number, error)
            except Exception as error:  # e.g. no free process or descriptor; the next attempt may succeed
                log.error("worker %d can't be restarted\n%s", self._number, format_trace(error))

    async def end(self, seconds: float) -> None:
        """Ends the process, and kills it after `seconds`."""
        process = self._process
        if process is None:
            return
        if process.is_alive():
            process.terminate()
            await asyncio.to_thread(process.join, seconds)
        if process.is_alive():
            process.kill()
            await asyncio.to_thread(process.join)
        if self._pipe is not None:
            self._pipe.close()

    async def _wait_for_death(self) -> None:
        loop = asyncio.get_running_loop()
        died = asyncio.Event()
        sentinel = self._process.sentinel
        loop.add_reader(sentinel, died.set)
        try:
            await died.wait()
        finally:
            loop.remove_reader(sentinel)
        self._process.join()


def _work(settings: Settings, load: Callable[[], Settings], number: int, pipe: Connection) -> None:
    run_process(partial(_serve, settings, load, number, pipe), settings, (signal.SIGTERM,), worker=number)


async def _serve(
    settings: Settings,
    load: Callable[[], Settings],
    number: int,
    pipe: Connection,
    stop: asyncio.Event,
    task_log: TaskLog,
) -> None:
    readiness = Readiness("store_unavailable")
    stop_without_supervisor(pipe, stop)
    try:
        async with (
            open_observed_app(settings, task_log, readiness, number) as (app, admin),
            on_hangup(lambda: app.reload(load), stop),
        ):
            pipe.send(Ready(app.configured, app.rest, app.grpc, admin))
            await wait_for_end(stop, settings, readiness)
    except Exception as error:
        if stop.is_set():
            raise
        pipe.send(explain(error))


def stop_without_supervisor(pipe: Connection, stop: asyncio.Event) -> None:
    """Sets `stop` when the supervisor is gone, even if it was killed: the other end of its pipe is closed. If
    this process drains already, it ends immediately: the supervisor got a second signal."""
    loop = asyncio.get_running_loop()

    def on_closed() -> None:
        loop.remove_reader(pipe.fileno())  # it would be called again and again until the process has ended
        if stop.is_set():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        stop.set()

    loop.add_reader(pipe.fileno(), on_closed)
