"""The gRPC client: the services of a Pomelo server on the other end of a channel.

It forwards and translates only: the server checks the key, the limits and the task.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from pomelo.network.origin import GatewayProof
from pomelo.runtime.in_flight import InFlight
from pomelo.runtime.turns import Turns
from pomelo.server.remote.channel import Tls
from pomelo.server.remote.media import RemoteMedia
from pomelo.server.remote.pool import ConnectionPool
from pomelo.server.remote.services import RemoteAccess, RemoteAccounts, RemoteModels, RemoteTasks
from pomelo.service import Services
from pomelo.telemetry.readiness import Readiness

__all__ = ["Tls", "open_remote"]


@asynccontextmanager
async def open_remote(
    target: str,
    *,
    tls: Tls | None = None,
    in_flight: InFlight | None = None,
    proof: GatewayProof | None = None,
    readiness: Readiness | None = None,
    options: Mapping[str, Any] | None = None,
) -> AsyncIterator[Services]:
    """Yields the services of the gRPC server at `target`, such as host:port or unix:/path. The server need
    not be up yet. `in_flight` counts and limits the calls of this process. `readiness` follows the health of
    the server. `options` replace grpc's channel arguments of `CHANNEL_OPTIONS`.

    Without a `proof` that the server recognises, every call counts as a gRPC call from this address.

    Raises:
        OSError: a TLS file can't be read.
    """
    async with AsyncExitStack() as stack:
        credentials = tls.credentials() if tls else None
        pool = ConnectionPool(target, credentials, stack, proof or GatewayProof(), options or {})
        turns = Turns()
        if readiness is not None:
            following = readiness.follow(pool.check_health, "server_unavailable", ready=False)
            await stack.enter_async_context(following)
        yield Services(
            tasks=RemoteTasks(pool, turns),
            models=RemoteModels(pool),
            media=RemoteMedia(pool, turns),
            accounts=RemoteAccounts(pool),
            access=RemoteAccess(pool, in_flight or InFlight()),
        )
