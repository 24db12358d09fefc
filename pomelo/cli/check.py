"""`pomelo serve --check`: whether the server could start. It serves nothing, and changes nothing but the file
with which a bucket is checked, and the tasks of killed servers: see `pomelo.configuration.fleet`."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pomelo.cli.doctor import check_data, describe_certificate
from pomelo.cli.findings import Finding, report
from pomelo.cli.fleet import check_bucket
from pomelo.cli.server_checks import TIMEOUT
from pomelo.cli.terminal import FailureError, counted, explain

if TYPE_CHECKING:
    from pomelo.configuration import Configuration
    from pomelo.network.tls import Certificate
    from pomelo.settings import Settings


def check_start(config: Path | None, workers: int | None) -> None:
    """Prints a line for each thing that the start needs.

    Raises:
        typer.Exit: with status 1; the server could not start.
    """
    logging.getLogger("pomelo").setLevel(logging.ERROR)  # the findings say it
    report(_check(config, workers))


def _check(config: Path | None, workers: int | None) -> Iterator[Finding]:
    from pomelo.cli.client import is_served
    from pomelo.cli.process import check_servers
    from pomelo.configuration import read_configuration
    from pomelo.settings import SettingsError, load

    try:
        settings = load(config, workers=workers)
        check_servers(settings)
    except SettingsError as error:
        yield Finding("settings", "broken", str(error))
        return
    yield Finding("settings", "ok", "valid")
    served = is_served(settings.admin_socket)
    yield _data(settings)
    broken: list[str] = []
    try:
        configuration = read_configuration(settings)
        broken += configuration.registry.broken.values()
        asyncio.run(_open_providers(settings, configuration, lambda name, reason: broken.append(reason)))
    except SettingsError as error:
        yield Finding("configuration", "broken", str(error))
    else:
        catalog = configuration.registry.catalog
        yield Finding(
            "configuration",
            "ok",
            f"{counted(len(catalog.models), 'model')}, {counted(len(configuration.plans), 'plan')}",
        )
        for reason in broken:
            yield Finding("plug-in", "warning", f"{reason}. Its models are not available")
        yield _certificate(settings, configuration.certificate)
    yield _store(settings, served)
    if settings.media:
        yield asyncio.run(check_bucket(settings))
    yield from _tracing()
    yield from _addresses(settings, served)


def _data(settings: Settings) -> Finding:
    from pomelo.network.addresses import check_socket_path
    from pomelo.settings import SettingsError
    from pomelo.telemetry.exposition import worker_socket

    found = check_data(settings, exposed="warning")  # a start closes the folder
    if found.state == "off":
        parent = next(path for path in settings.data.absolute().parents if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            return Finding(
                "data", "broken", f"{settings.data} can't be created: {parent} can't be written to"
            )
    try:
        for number in range(1, settings.workers if settings.admin else 1):
            check_socket_path(worker_socket(settings.data, number))
        check_socket_path(settings.admin_socket)
        settings.check_secret()
    except OSError as error:
        return Finding("data", "broken", error.strerror or str(error))
    except SettingsError as error:
        return Finding("data", "broken", str(error))
    return found


async def _open_providers(
    settings: Settings, configuration: Configuration, on_broken: Callable[[str, str], None]
) -> None:
    from pomelo.providers import open_providers
    from pomelo.settings import SettingsError

    entries, origins = configuration.registry.entries.values(), settings.delivery_origins
    try:
        async with open_providers(entries, configuration.credentials, origins=origins, on_broken=on_broken):
            pass
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _certificate(settings: Settings, certificate: Certificate | None) -> Finding:
    if certificate is None:
        return Finding("TLS", "off", "POMELO_TLS_CERT is not set")
    assert settings.tls_cert is not None
    try:
        ends = _certificate_end(settings.tls_cert, certificate)
    except ssl.SSLCertVerificationError as error:
        return Finding("TLS", "broken", f"{settings.tls_cert}: {error.verify_message}")
    return describe_certificate(settings.tls_cert, ends)


def _certificate_end(path: Path, certificate: Certificate) -> float:
    """Returns when the certificate of a server ends, as Unix time, from a handshake in memory.

    Raises:
        ssl.SSLCertVerificationError: it is not valid now.
    """
    from pomelo.cli.trust import trust_own_certificate

    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = certificate.context.wrap_bio(to_server, to_client, server_side=True)
    client = trust_own_certificate(path).wrap_bio(to_client, to_server)
    finished = False
    while not finished:
        with suppress(ssl.SSLWantReadError):
            client.do_handshake()
            finished = True
        with suppress(ssl.SSLWantReadError):
            server.do_handshake()
    peer = client.getpeercert()
    assert peer is not None
    return ssl.cert_time_to_seconds(str(peer["notAfter"]))


def _store(settings: Settings, served: bool) -> Finding:
    from pomelo.cli.operator import has_database
    from pomelo.configuration.fleet import check_server
    from pomelo.errors import PomeloError
    from pomelo.settings import SettingsError
    from pomelo.stores import check_store
    from pomelo.stores.base import StoreError

    if settings.uses_sqlite:
        if served:
            return Finding("store", "ok", "SQLite, used by the running server")
        if not has_database(settings):
            return Finding("store", "off", "SQLite, created at the first start")
    try:
        asyncio.run(check_store(settings.store_url(), archive=settings.archive_url()))
        # A server of this data folder that runs ends before the one that is checked starts.
        asyncio.run(check_server(settings, replaced=socket.gethostname() if served else ""))
    except (StoreError, SettingsError, PomeloError, OSError) as error:
        return Finding("store", "broken", explain(error))
    return Finding("store", "ok", "SQLite" if settings.uses_sqlite else settings.store.partition(":")[0])


def _tracing() -> Iterator[Finding]:
    from pomelo.cli.process import open_traces
    from pomelo.settings import SettingsError
    from pomelo.telemetry.tracing import is_configured

    async def open_and_close() -> None:
        async with open_traces(None):
            pass

    if not is_configured(os.environ):
        return
    try:
        asyncio.run(open_and_close())
    except SettingsError as error:
        yield Finding("traces", "broken", str(error))
    else:
        yield Finding("traces", "ok", "sent to the collector that OpenTelemetry's variables name")


def _addresses(settings: Settings, served: bool) -> Iterator[Finding]:
    from pomelo.cli.process import addresses, find_used_address
    from pomelo.network.addresses import split_address

    names = {"POMELO_REST": "REST", "POMELO_GRPC": "gRPC", "POMELO_ADMIN": "admin"}
    ports = _ports(settings) if served else None
    free: dict[str, str] = {}
    for variable, address in addresses(settings).items():
        name = names[variable]
        if not address:
            yield Finding(name, "off", f"{variable} is empty")
            continue
        used = find_used_address(**free, **{variable: address})
        if used is None:
            free[variable] = address
            yield Finding(name, "ok", f"{address} is free")
        elif (
            served
            and (ports is None or split_address(address)[1] in ports)
            and find_used_address(**{variable: address}) is not None
        ):
            yield Finding(name, "ok", f"{address} is in use; a server of this data folder runs")
        else:
            yield Finding(name, "broken", str(used))


def _ports(settings: Settings) -> set[int] | None:
    """The ports of the running server, which it leaves before the one that is checked starts; None if it does
    not report them."""
    from pomelo.cli.operator import call_operator
    from pomelo.errors import PomeloError
    from pomelo.gen.admin.v1.admin_service_pb2 import GetServerRequest
    from pomelo.network.addresses import split_address

    try:
        found = call_operator(settings, lambda operator: operator.get_server(GetServerRequest()), TIMEOUT)
    except (FailureError, PomeloError):  # it runs an earlier version, or does not answer
        return None
    return {split_address(address)[1] for address in found.addresses} or None
