"""Two servers on one Redis that are restarted one after the other, while a proxy sends them calls."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

from tests.integration.commands import RunningCommand, development_key, pomelo, start_command
from tests.integration.proxy import Proxy, Upstream
from tests.ports import free_port
from tests.redis_server import RedisServer


class RollingServers:
    """The servers; a context manager around their lives. `variables` are settings of both."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.upstreams = [Upstream(free_port(), free_port()) for _ in range(2)]
        self._folders = [folder / "first", folder / "second"]
        self._redis = RedisServer()
        self._shared = {
            "POMELO_STORE": self._redis.url,
            "POMELO_ARCHIVE": f"sqlite:{folder}/usage.db",
            "POMELO_SECRET": "s" * 32,
            "POMELO_TRUSTED_PROXIES": "127.0.0.1",
            **variables,
        }
        self._servers: list[RunningCommand] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._stack.enter_context(self._redis)
        for each in self._folders:
            each.mkdir()
        self._servers = [await self._start(0)]
        plan = await pomelo(self._folders[0], "accounts", "plan", "default", "unlimited", **self._shared)
        assert plan.status == 0, plan.out
        self._servers.append(await self._start(1))
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._stack.aclose()

    async def _start(self, number: int) -> RunningCommand:
        addresses = {
            "POMELO_REST": f"127.0.0.1:{self.upstreams[number].rest}",
            "POMELO_GRPC": f"127.0.0.1:{self.upstreams[number].grpc}",
        }
        command = start_command(self._folders[number], "serve", **self._shared, **addresses)
        server = await self._stack.enter_async_context(command)
        await server.read_until("  data  ")
        return server

    async def restart(self, number: int) -> None:
        """Ends a server by SIGTERM, and starts it again on the same ports."""
        self._servers[number].process.terminate()
        assert await self._servers[number].wait() == 0
        self._servers[number] = await self._start(number)

    async def codes_during_restarts(
        self, proxy: Proxy, restart: Callable[[int], Awaitable[None]], pause: float = 0
    ) -> list[str]:
        """Returns the codes of all calls that six clients of the proxy make while `restart` is awaited for one server
        after the other, and until each has made ten, each with a pause of seconds between its calls."""
        stop = asyncio.Event()
        async with (
            proxy.client(development_key(self._folders[0])) as client,
            asyncio.timeout(100),
            asyncio.TaskGroup() as tasks,
        ):
            calls = [
                tasks.create_task(client.keep_calling(protocol, stop, pause, 10))
                for protocol in ("rest", "grpc")
                for _ in range(3)
            ]
            try:
                for number in range(2):
                    await restart(number)
            finally:
                stop.set()
        return [code for call in calls for code in call.result()]

    async def audit(self) -> None:
        """Asserts that every balance and bill is right."""
        audit = await pomelo(self._folders[0], "audit", "--json", **self._shared)
        assert audit.status == 0, audit.out
