"""`pomelo serve` and `pomelo gateway`: the processes that stay, until a signal ends them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Collection, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pomelo import __version__
from pomelo.cli.terminal import Ca, Config, FailureError

if TYPE_CHECKING:
    import asyncio

    from pomelo.settings import Settings

SWITCH_INTERVAL = 0.0001
"""Seconds after which a thread that waits for the interpreter gets it."""

_BODY = '{"model": "gpt-4", "messages": [{"role": "user", "content": "Hello, world!"}]}'


def serve(
    config: Config = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", help="Processes that serve. Default: 1; more need a Redis store."),
    ] = None,
) -> None:
    """Serve gRPC and REST until SIGTERM or Ctrl-C."""
    from pomelo.settings import SettingsError, load, with_workers

    settings = load(config)
    if workers is not None:
        settings = with_workers(settings, workers)
    if not settings.rest and not settings.grpc:
        raise SettingsError("POMELO_REST and POMELO_GRPC are both empty: nobody could ask. Set one of them")
    if settings.workers > 1:
        from pomelo.cli.workers import supervise

        run(lambda stop: supervise(settings, stop))
    else:
        run(lambda stop: _serve(settings, stop))


def gateway(
    target: Annotated[str, typer.Option(metavar="HOST:PORT", help="The gRPC server to ask.")],
    tls: Annotated[
        bool | None,
        typer.Option(
            "--tls/--no-tls",
            help="Speak TLS to it. Default: unless it is on this machine or POMELO_INSECURE is 1.",
        ),
    ] = None,
    ca: Ca = None,
    config: Config = None,
) -> None:
    """Serve REST alone, before a gRPC server that runs elsewhere."""
    from pomelo.settings import load

    settings = load(config)
    settings.rest_address()
    if ca is not None:
        from pomelo.cli.trust import authority

        if tls is False:
            raise FailureError("--ca and --no-tls exclude each other: without TLS nobody is trusted")
        authority(ca)
        tls = True
    run(lambda stop: _gateway(settings, target, tls, ca, stop))


async def _serve(settings: Settings, stop: asyncio.Event) -> None:
    from pomelo.app import open_app

    # Before the doors open: whoever finds the server answering finds the key, too.
    made = await development_key(settings)
    async with AsyncExitStack() as stack:
        try:
            app = await stack.enter_async_context(open_app(settings))
        except OSError as error:
            raise taken(POMELO_REST=settings.rest, POMELO_GRPC=settings.grpc) or error from error
        greet(settings, app.configured, app.rest, app.grpc, made)
        await until(stop, settings)


async def _gateway(
    settings: Settings, target: str, tls: bool | None, ca: Path | None, stop: asyncio.Event
) -> None:
    from pomelo.app import open_gateway

    async with AsyncExitStack() as stack:
        try:
            host, port = await stack.enter_async_context(open_gateway(settings, target, tls=tls, ca=ca))
        except OSError as error:
            raise taken(POMELO_REST=settings.rest) or error from error
        _say(f"Pomelo {__version__}, a gateway")
        _say(f"  REST  {_url(settings, host, port)}")
        _say(f"  gRPC  asks {target}")
        await until(stop, settings)


async def until(stop: asyncio.Event, settings: Settings) -> None:
    """Returns at the first signal, and tells what happens now."""
    await stop.wait()
    typer.echo(f"Ending: running tasks have {settings.grace:g} s. Signal again to end at once.", err=True)


def taken(**addresses: str) -> FailureError | None:
    """What to say of the first of these addresses, by their variables, that can't be listened on."""
    import socket

    from pomelo.settings import split_address

    for name, address in addresses.items():
        if not address:
            continue
        host, port = split_address(address)
        try:
            for family, *_, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                socket.create_server(place[:2], family=family).close()
        except OSError as error:
            reason = (error.strerror or "it can't be listened on").partition(" (")[0]
            return FailureError(
                f"{name}: {address}: {reason}. End what listens there, or set another address"
            )
    return None


def run(
    main: Callable[[asyncio.Event], Coroutine[Any, Any, None]],
    signals: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM),
) -> None:
    """Runs `main` on a fast event loop. The first of the signals sets its event, the second is the end."""
    import asyncio
    import logging

    from pomelo import process
    from pomelo.logs import LimitedHandler, format_trace

    process.raise_descriptor_limit()
    logging.basicConfig(
        level=logging.WARNING,
        handlers=[LimitedHandler(logging.StreamHandler(sys.stderr))],
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("pomelo").setLevel(logging.INFO)

    async def running() -> None:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()

        def first(number: int) -> None:
            stop.set()
            for each in signals:
                loop.remove_signal_handler(each)
                signal.signal(each, signal.SIG_DFL)

        for number in signals:
            loop.add_signal_handler(number, first, number)
        await main(stop)

    # SQLite's thread gives the interpreter up at every statement, and a busy loop would keep it for 5 ms.
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        import uvloop
    except ImportError:  # not made for this system
        make_loop = None
    else:
        make_loop = uvloop.new_event_loop
    try:
        with asyncio.Runner(loop_factory=make_loop) as runner:
            runner.run(running())
    except (KeyboardInterrupt, SystemExit) as error:
        # Signals end it otherwise: this came from a task, such as one that a plug-in has started.
        logging.getLogger("pomelo").critical("The server was ended by an exception\n%s", format_trace(error))
        raise


async def development_key(settings: Settings) -> str | None:
    """On a store without keys: a test key, kept in the data folder for `pomelo run`. Else None."""
    from pomelo.accounts.keys import Keyring
    from pomelo.configuration import store_of
    from pomelo.settings import write_private

    secret = settings.root_secret()
    async with store_of(settings) as store:
        keyring = Keyring(store, secret)
        if await keyring.list(limit=1):
            return None
        _, key = await keyring.create()
        write_private(settings.key_file, key, replace=True)
    return key


def greet(
    settings: Settings,
    configured: Collection[str],
    address: tuple[str, int] | None,
    grpc: str | None,
    made: str | None,
) -> None:
    """Tells where it serves, and how to begin."""
    _say(f"Pomelo {__version__}")
    rest = _url(settings, *address) if address else None
    _say(f"  REST  {rest or 'off'}")
    _say(f"  gRPC  {grpc or 'off'}")
    _say(f"  data  {settings.data.absolute()}")
    if not configured:
        _say("  No provider has a key: test keys work, live keys need one, such as OPENAI_API_KEY")
    if made is not None:
        _say(f"\nYour test key, kept in {settings.key_file} for `pomelo run`:\n  {made}")
    key = made or (f"$(cat {settings.key_file.absolute()})" if settings.key_file.exists() else None)
    if rest is not None and key is not None:
        _say(
            f'\nTry it:\n  curl {rest}/api/v1/task -H "Authorization: Bearer {key}" '
            f"-H 'Content-Type: application/json' -d '{_BODY}'\n"
        )


def _url(settings: Settings, host: str, port: int) -> str:
    scheme = "https" if settings.tls_cert else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _say(line: str) -> None:
    typer.echo(line)
    sys.stdout.flush()
