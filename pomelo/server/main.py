"""The gRPC server: addresses, limits, health, reflection, and an end that waits for what runs.

`pomelo.app` opens it over the ports, and a second one on a unix socket for the operator. It knows no task
and no store.
"""

import asyncio
import errno
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pomelo.gen.v1 import (
    account_service_pb2,
    admin_service_pb2,
    media_service_pb2,
    model_service_pb2,
    task_service_pb2,
)
from pomelo.gen.v1.account_service_pb2_grpc import add_AccountServiceServicer_to_server
from pomelo.gen.v1.admin_service_pb2_grpc import AdminServiceServicer, add_AdminServiceServicer_to_server
from pomelo.gen.v1.media_service_pb2_grpc import add_MediaServiceServicer_to_server
from pomelo.gen.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from pomelo.gen.v1.task_service_pb2_grpc import add_TaskServiceServicer_to_server
from pomelo.origin import GatewayProof
from pomelo.server import health
from pomelo.server.servicers import AccountServicer, MediaServicer, ModelServicer, Running, TaskServicer
from pomelo.service import Services

log = logging.getLogger("pomelo.server")

_MIB = 1024 * 1024
_AFTER_GRACE = 10.0
"""Seconds that handlers get to clean up once they were cancelled."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where and how the server listens.

    An address is `host:port` (port 0: any free one), `[v6]:port` or `unix:/path`. With a certificate and its
    key every address speaks TLS, and with `tls_client_ca` a caller must show a certificate of that
    authority. `grace` is in seconds: how long running calls may go on once the server stops.

    `message_limit` is in bytes of one message from a caller; the default takes any JSON body that REST takes
    (8 MiB), so that both wires take the same. The defaults of the rest are for a server that strangers
    can reach: `connection_streams` are calls at once on one connection, `calls` on all of them.
    """

    address: str | tuple[str, ...] = "127.0.0.1:50051"
    grace: float = 10.0
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    message_limit: int = 9 * _MIB
    connection_streams: int = 100
    calls: int = 1000
    reuse_port: bool = False

    def channel_args(self) -> list[tuple[str, Any]]:
        """The options in grpc's own words. Times there are in milliseconds."""
        return [
            # Without it a second server would share the port, and callers, with no error.
            ("grpc.so_reuseport", int(self.reuse_port)),
            ("grpc.max_receive_message_length", self.message_limit),
            ("grpc.max_concurrent_streams", self.connection_streams),
            ("grpc.max_metadata_size", 8 * 1024),
            ("grpc.absolute_max_metadata_size", 16 * 1024),
            # Windows of 64 KiB, not of 4 MiB: what a slow peer makes us hold is small.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 64 * 1024),
            ("grpc.server_handshake_timeout_ms", 10_000),
            ("grpc.max_connection_idle_ms", 300_000),
            ("grpc.max_connection_age_ms", 1_800_000),
            ("grpc.max_connection_age_grace_ms", 600_000),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
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
) -> AsyncIterator[Server]:
    """Serves `services`, with health and reflection.

    `proof` recognises gateways; without it they are callers like others. `register` may add servicers to
    the grpc.aio server before it starts, and gives their full names. Leaving drains: health is NOT_SERVING,
    no new call is taken, running ones may end within the grace and are then cancelled; it returns when their
    handlers have cleaned up.

    Raises:
        OSError: an address can't be listened on, or a TLS file can't be read.
    """
    running = Running(proof)
    server = grpc.aio.server(options=options.channel_args(), maximum_concurrent_rpcs=options.calls)
    add_TaskServiceServicer_to_server(TaskServicer(services.tasks, running), server)
    add_ModelServiceServicer_to_server(ModelServicer(services.models, running), server)
    add_MediaServiceServicer_to_server(MediaServicer(services.media, running), server)
    add_AccountServiceServicer_to_server(AccountServicer(services.accounts, running), server)
    names = [
        _name(task_service_pb2, "TaskService"),
        _name(model_service_pb2, "ModelService"),
        _name(media_service_pb2, "MediaService"),
        _name(account_service_pb2, "AccountService"),
        *(register(server) if register else ()),
    ]
    healthy = health.HealthServicer(names)
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection([*names, health.SERVICE, reflection.SERVICE_NAME], server)
    credentials = options.credentials()
    given = (options.address,) if isinstance(options.address, str) else options.address
    addresses = tuple([_bind(server, address, credentials) for address in given])
    await server.start()
    try:
        yield Server(addresses, running, healthy)
    finally:
        healthy.drain()
        await server.stop(options.grace)
        try:
            async with asyncio.timeout(_AFTER_GRACE):
                await running.idle()
        except TimeoutError:
            log.error("%d calls did not end within %s s of being cancelled", running.count, _AFTER_GRACE)


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
