"""The server under load, and clients with a live key."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc

from tests.calls import bearer
from tests.integration.commands import live_key
from tests.serving import Served, serve_interpreter


@dataclass(frozen=True)
class Server:
    served: Served
    key: str
    session: aiohttp.ClientSession
    channels: list[grpc.aio.Channel]

    @property
    def metadata(self) -> list[tuple[str, str]]:
        return bearer(self.key)

    def post(
        self,
        body: Mapping[str, Any] | None = None,
        *,
        url: str | None = None,
        data: Any = None,
        **headers: str,
    ) -> Any:
        """Posts a task to the server, or to a gateway; `_` in the name of a header stands for `-`."""
        return self.session.post(
            f"{url or self.served.url}/api/v1/task",
            json=body,
            data=data,
            headers=dict(bearer(self.key, **headers)),
        )


@asynccontextmanager
async def open_server(folder: Path, channels: int, **variables: str) -> AsyncIterator[Server]:
    """Starts a server with these environment variables, and opens the clients."""
    async with AsyncExitStack() as stack:
        served = await stack.enter_async_context(serve_interpreter(folder, **variables))
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            read_bufsize=256 * 1024,
            timeout=aiohttp.ClientTimeout(total=None),
        )
        await stack.enter_async_context(session)
        address, options = f"{served.host}:{served.grpc_port}", [("grpc.use_local_subchannel_pool", 1)]
        opened = [
            await stack.enter_async_context(grpc.aio.insecure_channel(address, options))
            for _ in range(channels)
        ]
        yield Server(served, await live_key(folder), session, opened)
