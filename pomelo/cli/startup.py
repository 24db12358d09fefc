"""The start of a serving process: its event loop and signals, its first key, and what it prints."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable, Collection, Coroutine
from typing import Any

import typer

from pomelo import __version__, process
from pomelo.addresses import split_address
from pomelo.cli.terminal import FailureError
from pomelo.configuration import rest_url, store_of
from pomelo.logs import LimitedHandler, format_trace
from pomelo.secrets import write_private
from pomelo.settings import Settings

SWITCH_INTERVAL = 0.0001
"""Seconds after which a thread that waits for the interpreter gets it."""

_BODY = '{"model": "gpt-4", "messages": [{"role": "user", "content": "Hello, world!"}]}'


def run_process(
    main: Callable[[asyncio.Event], Coroutine[Any, Any, None]],
    signals: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM),
) -> None:
    """Runs `main` to its end. The first signal sets its event, the second ends the process."""
    process.raise_descriptor_limit()
    logging.basicConfig(
        level=logging.WARNING,
        handlers=[LimitedHandler(logging.StreamHandler(sys.stderr))],
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("pomelo").setLevel(logging.INFO)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()

        def handle_signal() -> None:
            stop.set()
            for number in signals:
                loop.remove_signal_handler(number)
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
    except (KeyboardInterrupt, SystemExit) as error:
        # Not from a signal, but from an asyncio task, such as one that a plug-in has started.
        logging.getLogger("pomelo").critical("The server was ended by an exception\n%s", format_trace(error))
        raise


async def wait_for_signal(stop: asyncio.Event, settings: Settings) -> None:
    """Returns once `stop` is set, and prints what happens next."""
    await stop.wait()
    typer.echo(f"Ending: running tasks have {settings.grace:g} s. Signal again to end immediately.", err=True)


def find_used_address(**addresses: str) -> FailureError | None:
    """Returns an error for the first address that can't be listened on; the names are its variables."""
    for name, address in addresses.items():
        if not address:
            continue
        host, port = split_address(address)
        try:
            for family, *_, socket_address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                socket.create_server(socket_address[:2], family=family).close()
        except OSError as error:
            reason = (error.strerror or "it can't be listened on").partition(" (")[0]
            return FailureError(
                f"{name}: {address}: {reason}. End the program that listens there, or set another address"
            )
    return None


async def create_development_key(settings: Settings) -> str | None:
    """Creates a test key if the store has no keys, and writes it to the data folder for `pomelo run`.

    Raises:
        SettingsError, StoreError: the data folder or the store can't be used.
    """
    from pomelo.accounts.keys import Keyring

    secret = settings.root_secret()
    async with store_of(settings) as store:
        keyring = Keyring(store, secret)
        if await keyring.list(limit=1):
            return None
        _, key = await keyring.create()
        write_private(settings.key_file, key, replace=True)
    return key


def print_greeting(
    settings: Settings,
    configured: Collection[str],
    address: tuple[str, int] | None,
    grpc: str | None,
    new_key: str | None,
) -> None:
    """Prints the addresses, a new development key, and a curl command to try."""
    print_flushed(f"Pomelo {__version__}")
    rest = rest_url(settings, address) if address else None
    print_flushed(f"  REST  {rest or 'off'}")
    print_flushed(f"  gRPC  {grpc or 'off'}")
    print_flushed(f"  data  {settings.data.absolute()}")
    if not configured:
        print_flushed("  No provider has a key: test keys work, live keys need one, such as OPENAI_API_KEY")
    if new_key is not None:
        print_flushed(f"\nYour test key, kept in {settings.key_file} for `pomelo run`:\n  {new_key}")
    key = new_key or (f"$(cat {settings.key_file.absolute()})" if settings.key_file.exists() else None)
    if rest is not None and key is not None:
        print_flushed(
            f'\nTry it:\n  curl {rest}/api/v1/task -H "Authorization: Bearer {key}" '
            f"-H 'Content-Type: application/json' -d '{_BODY}'\n"
        )


def print_flushed(line: str) -> None:
    """Prints a line and flushes it."""
    typer.echo(line)
    sys.stdout.flush()
