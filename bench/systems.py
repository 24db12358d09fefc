"""The systems under test, by name: each is started when it is first asked for, and ends with the run."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

from bench import peers
from bench.pomelo import serve
from bench.processes import System, module, pinned, start
from pomelo.settings import Settings
from tests.many_accounts import fill_sqlite
from tests.ports import free_port
from tests.redis_server import RedisServer

ACCOUNTS = 100_000
RECORDS = 10
"""Usage records of each account of the filled system."""

SQLITE = "Pomelo, SQLite"
REDIS = "Pomelo, Redis"
WORKERS = "Pomelo, Redis, two workers"
APART = "Pomelo, gateway and server"
FILLED = "Pomelo, filled SQLite"

AIOHTTP = "bare aiohttp proxy"
LINES = "bare aiohttp proxy of lines"
HTTPTOOLS = "bare httptools proxy"
GRPC = "bare grpc.aio server"
HOPS = "bare aiohttp + grpc.aio + aiohttp"
FLOORS = {AIOHTTP: "aiohttp", LINES: "lines", HTTPTOOLS: "httptools", GRPC: "grpc", HOPS: "hops"}
"""The floors and their names in bench/floors.py."""


class Systems:
    """Starts systems on the second core of `cores`, in front of one vendor on the first."""

    def __init__(
        self,
        stack: AsyncExitStack,
        folder: Path,
        cores: tuple[int | None, int | None],
        accounts: int = ACCOUNTS,
    ) -> None:
        self._stack = stack
        self._folder = folder
        self._cores = cores
        self._accounts = accounts
        self._vendor = ""
        self.started: dict[str, System] = {}

    async def get(self, name: str) -> System:
        """Returns the system of that name."""
        if name not in self.started:
            self.started[name] = await self._start(name)
        return self.started[name]

    async def vendor(self) -> str:
        """The URL of the stand-in vendor."""
        if not self._vendor:
            starting = start(
                module("bench.vendor"), self._folder / "vendor", ready="http://", core=self._cores[0]
            )
            self._vendor = (await self._stack.enter_async_context(starting)).url
        return self._vendor

    async def _start(self, name: str) -> System:
        vendor = await self.vendor()
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        if name in FLOORS:
            command = module("bench.floors", FLOORS[name], "--vendor", vendor)
            starting = start(command, folder / "output", ready="http://", core=self._cores[1])
            running = await self._stack.enter_async_context(starting)
            address = running.url.removeprefix("http://")
            return System([running], running.url, address, has_vendor_paths=True)
        if name in peers.NAMES:
            return await self._start_peer(name, folder, vendor)
        store: dict[str, str] = {}
        if name in (REDIS, WORKERS):
            with pinned(self._cores[0]):  # elsewhere it has a machine of its own
                store["POMELO_STORE"] = self._stack.enter_context(RedisServer(parent=folder)).url
            store["POMELO_WORKERS"] = "2" if name == WORKERS else "1"
        if name == FILLED:
            async with serve(folder, vendor):
                pass
            database = Settings(data=folder / "data").database
            await asyncio.to_thread(fill_sqlite, database, self._accounts, RECORDS)
        serving = serve(folder, vendor, core=self._cores[1], gateway=name == APART, store=store)
        return await self._stack.enter_async_context(serving)

    async def _start_peer(self, name: str, folder: Path, vendor: str) -> System:
        port = free_port()
        command = peers.command(name, peers.find()[name], vendor, port, folder)
        starting = start(
            command, folder / "output", ready=peers.READY[name], core=self._cores[1], **peers.VARIABLES
        )
        running = await self._stack.enter_async_context(starting)
        return System(
            [running],
            f"http://127.0.0.1:{port}",
            key=peers.KEY,
            has_vendor_paths=True,
            headers=peers.headers(name, vendor),
        )
