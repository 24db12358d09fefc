"""A gRPC server with an app's services, and the remote services in front of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from pomelo.network.origin import GatewayProof
from pomelo.server.remote import open_remote
from pomelo.server.server import Server, ServerOptions, open_server
from pomelo.service import Services


@asynccontextmanager
async def both_ends(
    services: Services, address: str = "127.0.0.1:0", proof: GatewayProof | None = None, **options: Any
) -> AsyncIterator[tuple[Server, Services]]:
    """Opens both ends, for at most 30 seconds; `options` are those of the server."""
    async with (
        asyncio.timeout(30),
        open_server(services, ServerOptions(address, **options), proof=proof) as server,
        open_remote(server.address, proof=proof) as remote,
    ):
        yield server, remote
