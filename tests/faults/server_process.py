"""Server processes on one data folder: start one, kill it, start the next."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pomelo.accounts.keys import Keyring
from pomelo.configuration import store_of
from pomelo.settings import load
from pomelo.stores.accounts import Grant
from pomelo.testing import FaultUpstream
from tests.faults.books import LIVE, Books, state
from tests.faults.drivers import GrpcDriver, RestDriver, open_drivers
from tests.integration.commands import environment
from tests.load.process_usage import queued_seconds
from tests.waiting import first

REPOSITORY = Path(__file__).parents[2]
DYING = ("tests.faults.crashing_server",)
"""A server that kills itself at a given point."""
SERVE = ("pomelo.cli", "serve")

BUDGET = f"{10**15}/total"
"""Counts what all tasks of a key cost, and refuses none."""

RESOLVED_WITHIN = 35.0
"""Seconds from a restart until no reservation is left."""


@dataclass
class ServerProcess:
    """A running server, and a key for it; `started` is monotonic time."""

    process: asyncio.subprocess.Process
    rest: str
    grpc: str
    key: str
    started: float

    async def send(self, *words: object) -> Any:
        """Sends a command to the process and returns its reply."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)).encode() + b"\n")
        return await _read_json_line(self.process)

    async def books(self, since: float = 0.0) -> Books:
        """Asks the server for its store's state, with the usage records from a time on."""
        return Books(await self.send("state", since))

    async def settled_books(self, since: float = 0.0) -> Books:
        """Returns the books as soon as no reservation is open."""
        await first(lambda: self.books(since), lambda books: not books.held, 2 * RESOLVED_WITHIN)
        return await self.books(since)  # a task may have been settled after its records were read

    def drivers(self, concurrency: int = 100) -> AbstractAsyncContextManager[tuple[RestDriver, GrpcDriver]]:
        return open_drivers(self.rest, self.grpc, self.key, concurrency)

    def age(self) -> float:
        """Seconds since its start, without those for which it has waited for a processor."""
        return time.monotonic() - self.started - queued_seconds(self.process.pid)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)

    async def wait(self) -> int:
        """Waits until the process has ended; returns its exit status."""
        async with asyncio.timeout(60):
            return await self.process.wait()


class Deployment:
    """A data folder, and at most one server process on it, which runs the module and arguments `program`


    As a context manager, kills the server on exit. `variables` are additional environment variables.
    """

    def __init__(self, folder: Path, upstream: FaultUpstream, *program: str, **variables: str) -> None:
        self._folder = folder
        self._program = program or DYING
        self.data = folder / "data"
        self.errors = folder / "errors"
        self.key = ""
        self.command_prefix: tuple[str, ...] = ()
        """A command that runs the server, if the data folder is in a separate mount namespace."""
        self._variables = {
            "POMELO_DATA": str(self.data),
            "POMELO_REST": "127.0.0.1:0",
            "POMELO_GRPC": "127.0.0.1:0",
            "POMELO_ADMIN": "",
            "OPENAI_API_KEY": "sk-test-upstream",
            "OPENAI_BASE_URL": upstream.openai_base_url,
            "ELEVENLABS_API_KEY": "elevenlabs-upstream",
            "ELEVENLABS_BASE_URL": upstream.elevenlabs_base_url,
        } | variables
        self._running: ServerProcess | None = None

    async def prepare(self, micros: int, plan: str = "unlimited") -> Self:
        """Creates a live key of an account with this plan and balance. No server may be running. The budget of
        the key, which no test can spend, counts all its tasks."""
        settings = load(None, self._variables)
        secret = settings.root_secret()
        async with store_of(settings) as store:
            _, self.key = await Keyring(store, secret).create("default", live=True, budget=BUDGET)
            await store.set_plan("default", plan)
            await store.grant(Grant(f"first {time.time()}", LIVE, micros, time.time()))
        return self

    async def start(
        self, *, expect_exit: bool = False, stderr: int | None = None, **variables: str
    ) -> ServerProcess:
        """Starts the server and waits until it listens, or with `expect_exit` until it has ended. Its stderr
        is written to a file, or to `stderr`."""
        started = time.monotonic()
        arguments = (*self.command_prefix, sys.executable, "-m", *self._program)
        with self.errors.open("ab") as sink:
            process = await asyncio.create_subprocess_exec(
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=sink if stderr is None else stderr,
                env=environment(self._folder, **(self._variables | variables)),
                cwd=REPOSITORY,
                limit=64 * 1024 * 1024,
            )
        self._running = ServerProcess(process, "", "", self.key, started)
        if expect_exit:
            await self._running.wait()
            return self._running
        read_addresses = _read_json_line if self._program == DYING else _read_banner
        try:
            addresses = await read_addresses(process)
        except AssertionError as error:
            error.add_note(self.errors.read_text())
            raise
        self._running.rest, self._running.grpc = addresses["REST"], addresses["gRPC"]
        return self._running

    async def books(self) -> Books:
        """Reads the store's state. No server may be running."""
        async with store_of(load(None, self._variables)) as store:
            return Books(await state(store))

    async def ensure_running(self) -> ServerProcess:
        if self._running is not None and self._running.process.returncode is None:
            return self._running
        return await self.start()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._running is not None and self._running.process.returncode is None:
            self._running.kill()
            await self._running.wait()


async def _read_banner(process: asyncio.subprocess.Process) -> dict[str, str]:
    """The addresses that `pomelo serve` prints when it starts."""
    assert process.stdout is not None
    addresses: dict[str, str] = {}
    async with asyncio.timeout(60):
        while not addresses.keys() >= {"REST", "gRPC"}:
            line = (await process.stdout.readline()).decode()
            assert line, f"the server ended with {await process.wait()}"
            name, _, address = line.strip().partition("  ")
            addresses[name] = address.strip()
    return addresses


async def _read_json_line(process: asyncio.subprocess.Process) -> Any:
    assert process.stdout is not None
    async with asyncio.timeout(60):
        line = await process.stdout.readline()
    assert line, f"the server ended with {await process.wait()}"
    return json.loads(line)
