"""`pomelo serve` and `pomelo gateway`: the processes that run until a signal ends them."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pomelo.cli.terminal import Ca, Config, FailureError

if TYPE_CHECKING:
    import asyncio

    from pomelo.settings import Settings


def serve(
    config: Config = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", help="Number of serving processes. Default: 1; more need a Redis store."),
    ] = None,
) -> None:
    """Serve gRPC and REST until SIGTERM or Ctrl-C."""
    from pomelo.settings import SettingsError, load

    settings = load(config, workers=workers)
    if not settings.rest and not settings.grpc:
        raise SettingsError("POMELO_REST and POMELO_GRPC are both empty: nothing to serve. Set one of them")
    from pomelo.cli.startup import run_process

    if settings.workers > 1:
        from pomelo.cli.workers import supervise

        run_process(lambda stop: supervise(settings, stop))
    else:
        run_process(lambda stop: _serve(settings, stop))


def gateway(
    target: Annotated[str, typer.Option(metavar="HOST:PORT", help="The gRPC server to call.")],
    tls: Annotated[
        bool | None,
        typer.Option(
            "--tls/--no-tls",
            help="Use TLS to the server. Default: unless it is on this machine or POMELO_INSECURE is 1.",
        ),
    ] = None,
    ca: Ca = None,
    config: Config = None,
) -> None:
    """Serve REST alone, for a gRPC server that runs elsewhere."""
    from pomelo.settings import load

    settings = load(config)
    settings.rest_address()
    if ca is not None:
        from pomelo.cli.trust import trust_authority

        if tls is False:
            raise FailureError("--ca and --no-tls exclude each other: without TLS there is no certificate")
        trust_authority(ca)
        tls = True
    from pomelo.cli.startup import run_process

    run_process(lambda stop: _gateway(settings, target, tls, ca, stop))


async def _serve(settings: Settings, stop: asyncio.Event) -> None:
    from pomelo.app import open_app
    from pomelo.cli.startup import (
        create_development_key,
        find_used_address,
        print_greeting,
        wait_for_signal,
    )

    # Before the servers listen, so that a caller who can connect finds the key, too.
    new_key = await create_development_key(settings)
    async with AsyncExitStack() as stack:
        try:
            app = await stack.enter_async_context(open_app(settings))
        except OSError as error:
            used = find_used_address(POMELO_REST=settings.rest, POMELO_GRPC=settings.grpc)
            raise used or error from error
        print_greeting(settings, app.configured, app.rest, app.grpc, new_key)
        await wait_for_signal(stop, settings)


async def _gateway(
    settings: Settings, target: str, tls: bool | None, ca: Path | None, stop: asyncio.Event
) -> None:
    from pomelo import __version__
    from pomelo.app import open_gateway
    from pomelo.cli.startup import find_used_address, print_flushed, wait_for_signal
    from pomelo.configuration import rest_url

    async with AsyncExitStack() as stack:
        try:
            address = await stack.enter_async_context(open_gateway(settings, target, tls=tls, ca=ca))
        except OSError as error:
            raise find_used_address(POMELO_REST=settings.rest) or error from error
        print_flushed(f"Pomelo {__version__}, a gateway")
        print_flushed(f"  REST  {rest_url(settings, address)}")
        print_flushed(f"  gRPC  asks {target}")
        await wait_for_signal(stop, settings)
