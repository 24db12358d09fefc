"""The options of the gRPC server."""

from __future__ import annotations

from pomelo.server.connection_limits import ConnectionLimits
from pomelo.server.server import ServerOptions


def test_grpc_itself_limits_the_connections_to_the_hard_limit() -> None:
    options = ServerOptions(connections=ConnectionLimits(connections=5, hard_connections=7))
    assert dict(options.channel_args())["grpc.max_allowed_incoming_connections"] == 7
