"""The gRPC server: addresses, limits, health, reflection, and an end that waits for what runs.

`pomelo.app` opens it over the ports, and a second one on a unix socket for the operator. It knows no task
and no store.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from pomelo import process
from pomelo.gen.v1 import (
    account_service_pb2,
    admin_service_pb2,
    media_service_pb2,
    model_service_pb2,
    task_service_pb2,
)
from pomelo.gen.v1.admin_service_pb2_grpc import AdminServiceServicer, add_AdminServiceServicer_to_server
from pomelo.origin import GatewayProof
from pomelo.server import health
from pomelo.server.calls import FrontEnd
from pomelo.server.connections import ConnectionGuard, ConnectionLimits
from pomelo.server.limits import CallLimits, Connections, Running
from pomelo.server.servicers import (
    AccountServicer,
    MediaServicer,
    ModelServicer,
    ReflectionServicer,
    TaskServicer,
)
from pomelo.service import Services

log = logging.getLogger("pomelo.server")

_PENDING = 4_000
_AFTER_GRACE = 10.0
"""Seconds that handlers get to clean up once they were cancelled."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where and how the server listens.

    An address is `host:port` (port 0: any free one), `[v6]:port` or `unix:/path`. With a certificate and its
    key every address speaks TLS, and with `tls_client_ca` a caller must show a certificate of that
    authority. `grace` is in seconds: how long running calls may go on once the server stops.

    `connection_streams` are concurrent calls on one connection: more than the largest limited plan has, since
    a client silently delays further ones. `limits` bound what calls may cost; by default a message
    may be as large as the largest JSON body of REST (8 MiB), so that both protocols accept the same.
    `ping_interval`: a connection that pings more often, in seconds, is closed at the third such ping.
    """

    address: str | tuple[str, ...] = "127.0.0.1:50051"
    grace: float = 10.0
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    limits: CallLimits = field(default_factory=CallLimits)
    connection_streams: int = 1000
    # Clients ping every 10 s where a balancer's guide says so, also between calls.
    ping_interval: float = 5.0
    reuse_port: bool = False
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)

    def channel_args(self) -> list[tuple[str, Any]]:
        """The options in grpc's own words. Times there are in milliseconds."""
        return [
            # Without it a second server would share the port, and callers, with no error.
            ("grpc.so_reuseport", int(self.reuse_port)),
            ("grpc.max_receive_message_length", self.limits.transport),
            ("grpc.max_concurrent_streams", self.connection_streams),
            # Calls wait here for a moment until we see them; above this grpc refuses them without details.
            ("grpc.server.max_pending_requests", _PENDING),
            ("grpc.server.max_pending_requests_hard_limit", _PENDING),
            ("grpc.max_metadata_size", 8 * 1024),
            ("grpc.absolute_max_metadata_size", 16 * 1024),
            # Windows of 64 KiB, not of 4 MiB: what a slow peer makes us hold is small.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 64 * 1024),
            ("grpc.max_allowed_incoming_connections", self.connections.hard_connections),
            ("grpc.server_handshake_timeout_ms", 10_000),
            ("grpc.max_connection_idle_ms", 300_000),
            ("grpc.max_connection_age_ms", 1_800_000),
            ("grpc.max_connection_age_grace_ms", 600_000),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.min_ping_interval_without_data_ms", round(self.ping_interval * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_ping_strikes", 2),
        ]

    def credentials(self) -> Any:
        """grpc's server credentials, or None without TLS.

        Raises:
            OSError: a file can't be read.
        """
        if self.tls_cert is None or self.tls_key is None:
            return None
        pair = (self.tls_key.read_bytes(), self.tls_cert.read_bytes())
        authority = self.tls_client_ca.read_bytes() if self.tls_client_ca else None
        return grpc.ssl_server_credentials([pair], authority, require_client_auth=authority is not None)


@dataclass(frozen=True, slots=True)
class Server:
    """A server that listens. `addresses` are the bound ones, in the order of the options."""

    addresses: tuple[str, ...]
    running: Running
    _health: health.HealthServicer

    @property
    def address(self) -> str:
        """The first address."""
        return self.addresses[0]

    def drain(self) -> None:
        """Tells balancers to send calls elsewhere; calls are still taken. Idempotent."""
        self._health.drain()


def _name(module: Any, service: str) -> str:
    return str(module.DESCRIPTOR.services_by_name[service].full_name)


@asynccontextmanager
async def open_server(
    services: Services,
    options: ServerOptions,
    *,
    proof: GatewayProof | None = None,
    register: Callable[[Any], Sequence[str]] | None = None,
    connections: Connections | None = None,
) -> AsyncIterator[Server]:
    """Serves `services`, with health and reflection.

    `proof` recognises gateways; without it they are treated as ordinary callers. `connections` receives
    reports of the calls on each connection, in place of the guard. `register` may add servicers to the
    grpc.aio server before it starts, and returns their full names. Leaving drains: health is NOT_SERVING, no
    new call is taken, running ones may end within the grace and are then cancelled; it returns when their
    handlers have cleaned up.

    Raises:
        OSError: an address can't be listened on, or a TLS file can't be read.
    """
    options = replace(options, connections=options.connections.within(process.descriptor_limit()))
    guard = ConnectionGuard(options.connections, options.limits.transport)
    front = FrontEnd(services.access, options.limits, connections or guard, proof)
    server = grpc.aio.server(options=options.channel_args())
    ours = {
        task_service_pb2.DESCRIPTOR: TaskServicer(services.tasks),
        model_service_pb2.DESCRIPTOR: ModelServicer(services.models),
        media_service_pb2.DESCRIPTOR: MediaServicer(services.media),
        account_service_pb2.DESCRIPTOR: AccountServicer(services.accounts),
    }
    names = [*[service.full_name for file in ours for service in file.services_by_name.values()]]
    names += register(server) if register else ()
    healthy = health.HealthServicer(names)
    known = {
        **ours,
        health_pb2.DESCRIPTOR: healthy,
        reflection_pb2.DESCRIPTOR: ReflectionServicer([*names, health.SERVICE, reflection.SERVICE_NAME]),
    }
    # A queue for each method: grpc hands over one new call of a queue at a time, so that a health check, or a
    # caller, would otherwise wait behind a flood of calls of other methods.
    for file, servicer in known.items():
        for service in file.services_by_name.values():
            server.add_registered_method_handlers(service.full_name, front.handlers(service, servicer))
    server.add_generic_rpc_handlers((front.unknown(),))
    credentials = options.credentials()
    given = (options.address,) if isinstance(options.address, str) else options.address
    addresses = tuple([_bind(server, address, credentials) for address in given])
    await server.start()
    watched = () if connections else [port for address in addresses if (port := _port(address))]
    async with guard.watch(watched):
        try:
            yield Server(addresses, front.running, healthy)
        finally:
            healthy.drain()
            await server.stop(options.grace)
            try:
                async with asyncio.timeout(_AFTER_GRACE):
                    await front.running.idle()
            except TimeoutError:
                log.error(
                    "%d calls did not end within %s s of being cancelled", front.running.count, _AFTER_GRACE
                )


@asynccontextmanager
async def open_admin(
    servicer: AdminServiceServicer, path: Path, *, grace: float = 2.0
) -> AsyncIterator[None]:
    """Serves the operator's service on a unix socket at `path` that only its owner can open (mode 0600).

    A socket file that a dead process left behind is replaced; leaving removes the file.

    Raises:
        OSError: the path is too long or taken, by another process that listens there or by another file.
    """
    address = _socket_address(path)
    server = grpc.aio.server(options=ServerOptions().channel_args())
    add_AdminServiceServicer_to_server(servicer, server)
    reflection.enable_server_reflection(
        [_name(admin_service_pb2, "AdminService"), reflection.SERVICE_NAME], server
    )
    before = os.umask(0o177)  # no moment at which another user could open it
    try:
        _bind(server, address, None)
    finally:
        os.umask(before)
    await server.start()
    try:
        yield
    finally:
        await server.stop(grace)


def _bind(server: Any, address: str, credentials: Any) -> str:
    """Listens on an address and gives it back, with the port that was found."""
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise OSError(
            errno.EADDRINUSE,
            f"gRPC can't listen on {address}: it is taken, or not an address of this machine",
        ) from error
    if address.startswith("unix:"):
        return address
    return f"{address.rpartition(':')[0]}:{port}"


def _port(address: str) -> int:
    """The port of an address, 0 for a unix socket."""
    return 0 if address.startswith("unix:") else int(address.rpartition(":")[2])


def _socket_address(path: Path) -> str:
    """The address of a socket at `path`, which is free; removes one there that nobody listens on.

    grpc itself would remove one that somebody listens on, too.
    """
    path = path.absolute()
    if len(os.fsencode(path)) > 107:
        raise OSError(
            errno.ENAMETOOLONG, f"Too long for a socket: {path}. Use a data folder with a shorter path"
        )
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return f"unix:{quote(str(path))}"
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, f"{path} is in the way: it is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return f"unix:{quote(str(path))}"
    raise OSError(errno.EADDRINUSE, f"Another process listens on {path}. Is Pomelo running already?")
