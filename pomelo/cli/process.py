"""A serving process: its event loop and signals, its first key, and its output."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pomelo import __version__
from pomelo.accounts.keys import Keyring
from pomelo.cli.operator_page import OperatorPage, open_admin
from pomelo.cli.terminal import FailureError, discard_output
from pomelo.configuration import rest_url, store_of
from pomelo.configuration.fleet import check_server
from pomelo.network.addresses import split_address
from pomelo.network.listening import bind_blocking
from pomelo.runtime import process
from pomelo.runtime.logs import format_trace
from pomelo.secrets import write_private
from pomelo.settings import Settings, SettingsError
from pomelo.telemetry.log import open_log
from pomelo.telemetry.readiness import Readiness
from pomelo.telemetry.task_log import TaskLog
from pomelo.telemetry.tracing import open_tracing

if TYPE_CHECKING:
    from pomelo.app import App
    from pomelo.telemetry.events import Observer
    from pomelo.telemetry.metrics import Metrics

SWITCH_INTERVAL = 0.0001
"""Seconds after which a thread that waits for the interpreter gets it."""

_STDOUT, _STDOUT_WAIT = 1, 0.5
"""A descriptor, and the seconds that the greeting waits for its reader, once."""

log = logging.getLogger("pomelo.process")

_BODY = '{"model": "gpt-4", "messages": [{"role": "user", "content": "Hello, world!"}]}'


def run_process(
    main: Callable[[asyncio.Event, TaskLog], Coroutine[Any, Any, None]],
    settings: Settings,
    signals: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM),
    worker: int | None = None,
) -> None:
    """Runs `main` to its end. The first signal sets its event, the second ends the process, unless it is a
    worker. `main` also gets the observer that logs tasks; `worker` is the number of this process among
    several."""
    process.raise_descriptor_limit()
    with open_log(settings.log_level, settings.log_format, worker) as task_log:
        _run(lambda stop: main(stop, task_log), signals, worker)


def _run(
    main: Callable[[asyncio.Event], Coroutine[Any, Any, None]], signals: tuple[int, ...], worker: int | None
) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()

        def handle_signal() -> None:
            stop.set()
            if worker is not None:
                return  # what is sent to all processes, the supervisor sends again
            for number in signals:
                loop.remove_signal_handler(number)
                if os.getpid() == 1:  # of a container: Linux ignores what it has no handler for
                    loop.add_signal_handler(number, os._exit, 128 + number)
                else:
                    signal.signal(number, signal.SIG_DFL)

        for number in signals:
            loop.add_signal_handler(number, handle_signal)
        await main(stop)

    # SQLite's thread releases the interpreter at every statement, and a busy loop would keep it for 5 ms.
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        import uvloop
    except ImportError:  # not available for this system
        loop_factory = None
    else:
        loop_factory = uvloop.new_event_loop
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(run())
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the loop has restored the default
    except (KeyboardInterrupt, SystemExit) as error:
        # Not from a signal, but from an asyncio task, such as one that a plug-in has started.
        log.critical("The server was ended by an exception\n%s", format_trace(error))
        raise


@asynccontextmanager
async def on_hangup(reload: Callable[[], Awaitable[None]], stop: asyncio.Event) -> AsyncIterator[None]:
    """Within the context, SIGHUP calls `reload`, one call at a time; also one that was blocked before. If the
    terminal of this process is closed, which sends SIGHUP too, `stop` is set instead."""
    loop = asyncio.get_running_loop()
    hangup = asyncio.Event()
    on_terminal = sys.stderr.isatty()

    async def handle() -> None:
        while True:
            await hangup.wait()
            hangup.clear()
            if on_terminal and not sys.stderr.isatty():
                stop.set()
                return
            try:
                await reload()
            except Exception as error:
                log.error("The configuration was not reloaded\n%s", format_trace(error))

    loop.add_signal_handler(signal.SIGHUP, hangup.set)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})  # held since the start of `pomelo serve`
    handling = asyncio.create_task(handle())
    try:
        yield
    finally:
        handling.cancel()
        # While the process drains. The loop would restore the default before, and SIGHUP end the process.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


async def serve_app(
    settings: Settings, load: Callable[[], Settings], stop: asyncio.Event, task_log: TaskLog
) -> None:
    """Serves gRPC and REST in this process until `stop` is set. At SIGHUP, changes to the settings that
    `load` returns.

    Raises:
        FailureError: an address is in use.
        SettingsError, StoreError: the data folder or the store can't be used.
    """
    readiness = Readiness("store_unavailable")
    # Before the servers listen, so that a caller who can connect finds the key, too.
    new_key = await create_development_key(settings)
    async with AsyncExitStack() as stack:
        try:
            opening = open_observed_app(settings, task_log, readiness)
            app, admin = await stack.enter_async_context(opening)
        except OSError as error:  # all has been closed: only the addresses of others are in use
            raise find_used_address(**addresses(settings)) or error from error
        async with on_hangup(lambda: app.reload(load), stop):
            print_greeting(settings, app.configured, app.rest, app.grpc, admin, new_key)
            await wait_for_signal(stop, settings)
            await wait_for_end(stop, settings, readiness)


@asynccontextmanager
async def open_observed_app(
    settings: Settings, task_log: TaskLog, readiness: Readiness, worker: int | None = None
) -> AsyncIterator[tuple[App, str]]:
    """Yields the application, and the address of its metrics and of the operator's page. `worker` as in
    `open_admin`.

    Raises:
        OSError: an address is in use.
        SettingsError, StoreError: the data folder or the store can't be used.
    """
    from pomelo.app import open_app

    metrics, page = process_metrics(task_log), OperatorPage()
    async with open_admin(settings, metrics, readiness, page, worker) as admin:
        async with (
            open_traces(worker) as traces,
            open_app(
                settings, worker=worker, observers=(task_log, *traces), metrics=metrics, readiness=readiness
            ) as app,
        ):
            page.operator = app.operator
            process.defer_garbage_collection()
            yield app, admin
        page.operator = None


@asynccontextmanager
async def open_traces(worker: int | None) -> AsyncIterator[tuple[Observer, ...]]:
    """Yields the observers that send traces, as `open_tracing`.

    Raises:
        SettingsError: the variables of OpenTelemetry can't be used.
    """
    async with AsyncExitStack() as stack:
        try:
            traces = await stack.enter_async_context(open_tracing(worker))
        except ValueError as error:
            raise SettingsError(str(error)) from error
        yield traces


async def serve_gateway(
    settings: Settings,
    target: str,
    tls: bool | None,
    ca: Path | None,
    load: Callable[[], Settings],
    stop: asyncio.Event,
    task_log: TaskLog,
) -> None:
    """Serves REST for the gRPC server at `target` until `stop` is set. At SIGHUP, changes to the settings
    that `load` returns.

    Raises:
        FailureError: an address is in use.
        SettingsError: the data folder, the catalogue or the certificate can't be used.
    """
    from pomelo.app import open_gateway
    from pomelo.configuration.reload import GatewayReloader

    metrics, readiness = process_metrics(task_log), Readiness("server_unavailable")
    page = OperatorPage()
    reloader = GatewayReloader(settings)
    async with AsyncExitStack() as stack:
        try:
            admin = await stack.enter_async_context(open_admin(settings, metrics, readiness, page))
            opening = open_gateway(
                settings,
                target,
                tls=tls,
                ca=ca,
                reloader=reloader,
                observers=[task_log],
                metrics=metrics,
                readiness=readiness,
            )
            address = await stack.enter_async_context(opening)
        except OSError as error:
            await stack.aclose()
            used = find_used_address(POMELO_REST=settings.rest, POMELO_ADMIN=settings.admin)
            raise used or error from error
        process.defer_garbage_collection()
        async with on_hangup(lambda: reloader.reload(load), stop):
            _print(f"Pomelo {__version__}, a gateway")
            _print(f"  REST  {rest_url(settings, address)}")
            _print(f"  gRPC  asks {target}")
            _print(f"  admin {_admin_url(admin)}")
            await wait_for_signal(stop, settings)
            await wait_for_end(stop, settings, readiness)


def process_metrics(task_log: TaskLog) -> Metrics:
    """Returns the metrics of this process, with what its log has dropped."""
    from pomelo.telemetry.metrics import Metrics

    metrics = Metrics()
    metrics.log_lines_dropped.read_one(task_log.lines_dropped)
    return metrics


def addresses(settings: Settings) -> dict[str, str]:
    """Returns the addresses that a server listens on, by their variables."""
    return {"POMELO_REST": settings.rest, "POMELO_GRPC": settings.grpc, "POMELO_ADMIN": settings.admin}


async def wait_for_end(stop: asyncio.Event, settings: Settings, readiness: Readiness) -> None:
    """Returns when new calls are to be refused: `drain_delay` after `stop` was set. Until then only health
    checks fail, so that load balancers send calls elsewhere."""
    await stop.wait()
    readiness.drain()
    await asyncio.sleep(settings.drain_delay)


async def wait_for_signal(stop: asyncio.Event, settings: Settings) -> None:
    """Returns once `stop` is set, and logs what happens next."""
    await stop.wait()
    if settings.drain_delay:
        log.warning("Ending in %g s; until then new calls are accepted", settings.drain_delay)
    log.warning("Ending: running tasks have %g s. Signal again to end immediately.", settings.grace)


def check_servers(settings: Settings) -> None:
    """Refuses settings with which not all servers would be served.

    Raises:
        SettingsError: both REST and gRPC are off, or two servers have the same address.
    """
    if not settings.rest and not settings.grpc:
        raise SettingsError("POMELO_REST and POMELO_GRPC are both empty: nothing to serve. Set one of them")
    check_addresses(**addresses(settings))


def check_addresses(**addresses: str) -> None:
    """Refuses addresses that are the same; the names are their variables.

    Raises:
        SettingsError: two are.
    """
    for (name, address), (other, same) in combinations(addresses.items(), 2):
        if address and address == same and split_address(address)[1]:
            raise SettingsError(f"{name} and {other} are both {address}. Set one of them to another address")


def find_used_address(**addresses: str) -> FailureError | None:
    """Returns an error for the first address that can't be listened on while this process listens on those
    before it; the names are its variables."""
    with ExitStack() as listening:
        for name, address in addresses.items():
            if not address:
                continue
            host, port = split_address(address)
            try:
                for each in bind_blocking(host, port):
                    listening.enter_context(each)
            except OSError as error:
                reason = (error.strerror or "it can't be listened on").partition(" (")[0]
                used = error.errno == errno.EADDRINUSE
                advice = "End the program that listens there, or set" if used else "Set"
                return FailureError(f"{name}: {address}: {reason}. {advice} another address")
    return None


async def create_development_key(settings: Settings) -> str | None:
    """Creates a test key if the store has no keys, and writes it to the data folder for `pomelo run`.

    Raises:
        SettingsError, StoreError: the data folder or the store can't be used.
    """
    await check_server(settings)
    secret = settings.root_secret()
    async with store_of(settings) as store:
        if await store.list_keys(limit=1):
            return None
        _, key = await Keyring(store, secret, previous=settings.previous_secrets()).create()
        write_private(settings.key_file, key, replace=True)
    return key


def print_greeting(
    settings: Settings,
    configured: Collection[str],
    address: tuple[str, int] | None,
    grpc: str | None,
    admin: str,
    new_key: str | None,
) -> None:
    """Prints the addresses, a new development key, and a curl command to try."""
    _print(f"Pomelo {__version__}")
    rest = rest_url(settings, address) if address else None
    _print(f"  REST  {rest or 'off'}")
    _print(f"  gRPC  {grpc or 'off'}")
    _print(f"  admin {_admin_url(admin)}")
    _print(f"  data  {settings.data.absolute()}")
    if not configured:
        _print("  No provider has a key: test keys work, live keys need one, such as OPENAI_API_KEY")
    if new_key is not None:
        _print(f"\nYour test key, stored in {settings.key_file} for `pomelo run`:\n  {new_key}")
    key = new_key
    if key is None and settings.key_file.exists():
        key = f"$(cat {shlex.quote(str(settings.key_file.absolute()))})"
    if rest is not None and key is not None:
        _print(
            f'\nTry it:\n  curl {rest}/api/v1/task -H "Authorization: Bearer {key}" '
            f"-H 'Content-Type: application/json' -d '{_BODY}'\n"
        )


def _admin_url(address: str) -> str:
    return f"http://{address}/metrics" if address else "off"


def _print(line: str) -> None:
    """Prints a line of the greeting. The server serves, too, if nobody reads it or the disk is full."""
    try:
        if not select.select((), (_STDOUT,), (), _STDOUT_WAIT)[1]:  # a pipe is full, and its reader hangs
            discard_output()
        typer.echo(line)
        sys.stdout.flush()
    except OSError:
        discard_output()
