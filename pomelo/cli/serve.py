"""`pomelo serve` and `pomelo gateway`: the processes that run until a signal ends them."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from pomelo.cli.hangup import hold_hangup
from pomelo.cli.terminal import Ca, Config, FailureError

_TARGET_SCHEMES = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "xds:")
"""Beginnings of names that gRPC resolves itself."""


def serve(
    config: Config = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", help="Number of serving processes. Default: 1; more need a Redis store."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only check whether the server could start. Status 1 if not.")
    ] = False,
) -> None:
    """Serve gRPC and REST until SIGTERM or Ctrl-C. SIGHUP reloads the configuration.

    Variables such as POMELO_REST, or pomelo.toml, set addresses and everything else.
    """
    if check:
        from pomelo.cli.check import check_start

        check_start(config, workers)
        return
    hold_hangup()
    from pomelo.settings import find_file, load

    # A file that was there at the start has to be there at a reload, too.
    load_again = partial(load, find_file(config), workers=workers)
    settings = load_again()
    from pomelo.cli.process import check_servers, run_process, serve_app
    from pomelo.cli.workers import supervise

    check_servers(settings)
    main = supervise if settings.workers > 1 else serve_app
    run_process(partial(main, settings, load_again), settings)


def gateway(
    target: Annotated[str, typer.Option(metavar="HOST:PORT", help="The gRPC server to call.")],
    tls: Annotated[
        bool | None,
        typer.Option(
            "--tls/--no-tls",
            help="Use TLS to the server. Default: unless it is on this machine.",
        ),
    ] = None,
    ca: Ca = None,
    config: Config = None,
) -> None:
    """Serve only REST, for a gRPC server that runs elsewhere. SIGHUP reloads the configuration."""
    _check_target(target)
    hold_hangup()
    from pomelo.settings import find_file, load

    load_again = partial(load, find_file(config))
    settings = load_again()
    settings.rest_address()
    if ca is not None:
        from pomelo.cli.trust import trust_authority

        if tls is False:
            raise FailureError("--ca and --no-tls exclude each other: without TLS there is no certificate")
        trust_authority(ca)
        tls = True
    from pomelo.cli.process import check_addresses, run_process, serve_gateway

    check_addresses(POMELO_REST=settings.rest, POMELO_ADMIN=settings.admin)
    run_process(partial(serve_gateway, settings, target, tls, ca, load_again), settings)


def _check_target(target: str) -> None:
    """Refuses a target that no server can have, such as an empty one: the gateway would wait for it for ever.

    Raises:
        typer.BadParameter: it is neither an address nor one of gRPC's names with a scheme.
    """
    from pomelo.network.addresses import split_address

    if target.startswith(_TARGET_SCHEMES):
        return
    try:
        _, port = split_address(target)
        if not port:
            raise ValueError("must have the port of the server, not 0")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--target") from None
