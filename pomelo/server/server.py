"""The gRPC servers: the public one, with health and reflection, and the operator's on a unix socket."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection_pb2_grpc import add_ServerReflectionServicer_to_server

from pomelo.gen.v1 import (
    account_service_pb2,
    media_service_pb2,
    model_service_pb2,
    task_service_pb2,
)
from pomelo.network.listening import make_free
from pomelo.network.origin import GatewayProof
from pomelo.network.tls import Certificate
from pomelo.runtime import process
from pomelo.server import health
from pomelo.server.call_limits import CallLimits, Running
from pomelo.server.calls import FrontEnd
from pomelo.server.connection_guard import ConnectionGuard
from pomelo.server.connection_limits import ConnectionLimits, ConnectionObserver
from pomelo.server.operator import ADMIN_SERVICE, admin_handlers, socket_address
from pomelo.server.reflection import OpenReflection
from pomelo.server.servicers import (
    AccountServicer,
    MediaServicer,
    ModelServicer,
    ReflectionServicer,
    TaskServicer,
)
from pomelo.service import Operator, Services
from pomelo.telemetry.events import Observer
from pomelo.telemetry.readiness import Readiness

log = logging.getLogger("pomelo.server")

CONNECTION_STREAMS = 1000
"""The default of `ServerOptions.connection_streams`."""

_MAX_PENDING = 4_000
_QUIET_TIME = 1.0
"""Seconds to wait for the end of the last answers before the connections are ended."""

_CLEANUP_TIME = 10.0
"""Seconds that cancelled handlers have for their cleanup."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """The address and limits of the public server. Times are in seconds.

    The address is `host:port` (port 0: any free one), `[v6]:port` or `unix:/path`. With a `certificate` it
    uses TLS, and a caller must present a certificate of its `client_ca`, if it has one. `grace` is how long
    running calls may continue when the server stops.

    `connection_streams` are concurrent calls on one connection: at least as many as one account may run,
    since a client silently delays further ones. `limits` bound what calls may cost; by default a message may
    be as large as the largest JSON body of REST (8 MiB), so that both protocols accept the same. `observers`
    get reports of calls.
    """

    address: str = "127.0.0.1:50051"
    grace: float = 10.0
    certificate: Certificate | None = None
    limits: CallLimits = field(default_factory=CallLimits)
    connection_streams: int = CONNECTION_STREAMS
    reuse_port: bool = False
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    observers: Sequence[Observer] = ()

    def channel_args(self) -> list[tuple[str, Any]]:
        """Returns grpc's channel arguments. Their times are in milliseconds."""
        return [
            # Otherwise a second server would share the port and its callers without an error.
            ("grpc.so_reuseport", int(self.reuse_port)),
            ("grpc.max_receive_message_length", self.limits.transport),
            ("grpc.max_concurrent_streams", self.connection_streams),
            # Calls that no handler has started yet; grpc refuses more of them without details.
            ("grpc.server.max_pending_requests", _MAX_PENDING),
            ("grpc.server.max_pending_requests_hard_limit", _MAX_PENDING),
            # Between two different limits, grpc would refuse calls at random.
            ("grpc.max_metadata_size", self.limits.transport_metadata),
            ("grpc.absolute_max_metadata_size", self.limits.transport_metadata),
            # Windows of 64 KiB instead of 4 MiB bound the memory that a slow peer occupies.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 64 * 1024),
            ("grpc.max_allowed_incoming_connections", self.connections.hard_connections),
            ("grpc.server_handshake_timeout_ms", 10_000),
            ("grpc.max_connection_idle_ms", 300_000),
            ("grpc.max_connection_age_ms", 1_800_000),
            ("grpc.max_connection_age_grace_ms", 600_000),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.keepalive_permit_without_calls", 1),
            # grpc closes a connection that pings too often in a pause of its writes, which a flood of pings
            # does not allow. Until then each ping costs more than the last: the guard is faster.
            ("grpc.http2.max_ping_strikes", 0),
        ]


class _Tls:
    """The certificate, which can be replaced. gRPC asks for it at each handshake, in its own threads."""

    def __init__(self, certificate: Certificate) -> None:
        self._requires_certificates = certificate.client_ca is not None
        self.replace(certificate)

    def replace(self, certificate: Certificate) -> None:
        pair = (certificate.key, certificate.chain)
        self._current = grpc.ssl_server_certificate_configuration([pair], certificate.client_ca)

    def credentials(self) -> Any:
        """Returns grpc's credentials."""
        known = self._current

        def fetch() -> Any:
            nonlocal known
            if self._current is known:
                return None  # which keeps the sessions that clients resume
            known = self._current
            return known

        return grpc.dynamic_ssl_server_credentials(known, fetch, self._requires_certificates)


@dataclass(frozen=True, slots=True)
class Server:
    """A running server. `address` is the bound one. While it is not ready, load balancers get NOT_SERVING;
    calls are still accepted."""

    address: str
    running: Running
    readiness: Readiness
    drain: Callable[[], None]
    """Makes clients connect to another server, now that their calls are refused: ends connections without a
    running call."""
    _tls: _Tls | None = None

    def replace_certificate(self, certificate: Certificate) -> None:
        """Replaces the certificate of a server with TLS, for new connections."""
        assert self._tls is not None
        self._tls.replace(certificate)


@asynccontextmanager
async def open_server(
    services: Services,
    options: ServerOptions,
    *,
    proof: GatewayProof | None = None,
    connections: ConnectionObserver | None = None,
    readiness: Readiness | None = None,
    report_connections: Callable[[Callable[[], int], int], None] = lambda count, limit: None,
) -> AsyncIterator[Server]:
    """Serves `services`, with health and reflection.

    `proof` recognises gateways; without it they are ordinary callers. Health is SERVING while `readiness`
    says that the process is ready. `connections` receives the reports about each connection's calls in place
    of the guard. `report_connections` is called once, with a function that returns the number of connections,
    and with their limit. Leaving stops the server: health is NOT_SERVING, new calls are refused, running ones
    may end within the grace and are then cancelled. It returns when their handlers have ended.

    Raises:
        OSError: an address can't be listened on.
    """
    readiness = readiness or Readiness()
    options = replace(options, connections=options.connections.within(process.descriptor_limit()))
    guard = ConnectionGuard(options.connections, options.limits.transport)
    report_connections(lambda: guard.count, options.connections.connections)
    front_end = FrontEnd(
        services.access,
        options.limits,
        connections or guard,
        proof,
        options.connections.trusted,
        options.observers,
    )
    server = _create_server(options)
    _add_services(server, front_end, services, readiness)
    tls = _Tls(options.certificate) if options.certificate is not None else None
    address = _bind(server, options.address, tls.credentials() if tls else None)
    await server.start()
    is_guarded = not connections and not address.startswith("unix:")
    async with (
        process.in_background(front_end.watch_streams()),
        guard.watch(int(address.rpartition(":")[2]) if is_guarded else 0),
    ):
        try:
            yield Server(address, front_end.running, readiness, guard.drain, tls)
        finally:
            readiness.drain()
            with suppress(TimeoutError):
                async with asyncio.timeout(min(options.grace, _QUIET_TIME)):
                    await front_end.running.idle()
            stopping = time.monotonic()
            if not front_end.running.count:
                await guard.hang_up()
            await server.stop(max(0.0, options.grace - (time.monotonic() - stopping)))
            try:
                async with asyncio.timeout(_CLEANUP_TIME):
                    await front_end.running.idle()
            except TimeoutError:
                count = front_end.running.count
                log.error("%d calls did not end within %s s of being cancelled", count, _CLEANUP_TIME)


def _create_server(options: ServerOptions) -> Any:
    """Returns a grpc.aio server, whose log does not have the callers who leave."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_not_of_a_caller_who_left)
    return grpc.aio.server(options=options.channel_args())


def _is_not_of_a_caller_who_left(record: logging.LogRecord) -> bool:
    """Returns whether to log a record of grpc: not if a response was not sent to its end because its caller
    has left, which grpc logs as an error with its trace."""
    return not str(record.msg).startswith("ExecuteBatchError raised in core")


def _add_services(server: Any, front_end: FrontEnd, services: Services, readiness: Readiness) -> None:
    """Adds the public services, health and reflection to a grpc.aio server."""
    servicers: dict[Any, object] = {
        task_service_pb2.DESCRIPTOR: TaskServicer(services.tasks),
        model_service_pb2.DESCRIPTOR: ModelServicer(services.models),
        media_service_pb2.DESCRIPTOR: MediaServicer(services.media),
        account_service_pb2.DESCRIPTOR: AccountServicer(services.accounts),
    }
    names = [service.full_name for file in servicers for service in file.services_by_name.values()]
    servicers |= {
        health_pb2.DESCRIPTOR: health.HealthServicer(names, readiness),
        reflection_pb2.DESCRIPTOR: ReflectionServicer([*names, health.SERVICE]),
    }
    # Registered methods have separate queues, from which grpc takes one new call at a time. In a common queue
    # a health check would wait behind a flood of other calls.
    for file, servicer in servicers.items():
        for service in file.services_by_name.values():
            server.add_registered_method_handlers(service.full_name, front_end.handlers(service, servicer))
    server.add_generic_rpc_handlers((front_end.unknown_method(),))


@asynccontextmanager
async def open_operator_socket(operator: Operator, path: Path, *, grace: float = 2.0) -> AsyncIterator[None]:
    """Serves AdminService on a unix socket at `path` that only its owner can open (mode 0600).

    It replaces a socket file that no process listens on. Leaving removes the file.

    Raises:
        OSError: the path is too long, another process listens there, or another file has this path.
    """
    make_free(path)
    server = _create_server(ServerOptions())
    name = ADMIN_SERVICE.full_name
    server.add_registered_method_handlers(name, admin_handlers(operator))
    add_ServerReflectionServicer_to_server(OpenReflection([name]), server)
    umask = os.umask(0o177)  # otherwise another user could open it before a chmod
    try:
        _bind(server, socket_address(path), None)
    finally:
        os.umask(umask)
    await server.start()
    try:
        yield
    finally:
        await server.stop(grace)


def _bind(server: Any, address: str, credentials: Any) -> str:
    """Listens on an address, and returns it with the bound port."""
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
