"""A data folder and the server processes that live on it one after another, whatever ends them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pomelo.accounts.keys import Keyring
from pomelo.app import store_of
from pomelo.settings import load
from pomelo.stores.accounts import Grant
from pomelo.testing import FaultUpstream
from tests.faults.books import LIVE, Books, state

REPOSITORY = Path(__file__).parents[2]
DYING = ("tests.faults.crashing_server",)
"""The server that dies where it is told to."""
SERVE = ("pomelo.cli", "serve")
"""The server as users start it."""

RESOLVED_WITHIN = 35.0
"""Seconds from a restart until nothing is held any more."""


@dataclass
class Process:
    """A server that runs. `started` is monotonic, as is `answered`, when it said that it listens."""

    process: asyncio.subprocess.Process
    rest: str
    grpc: str
    started: float
    answered: float

    async def ask(self, *words: object) -> Any:
        """What the process says to a line on its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)).encode() + b"\n")
        return await _line(self.process)

    def kill(self) -> None:
        """Ends it as `kill -9` does."""
        self.process.send_signal(signal.SIGKILL)

    async def ended(self) -> int:
        """Its exit status, once it has ended."""
        async with asyncio.timeout(60):
            return await self.process.wait()


class House:
    """A data folder, and the server on it: the module `program` with its arguments, under these variables.

    On leaving, the server is killed.
    """

    def __init__(
        self,
        folder: Path,
        upstream: FaultUpstream,
        program: tuple[str, ...] = DYING,
        **variables: str,
    ) -> None:
        self._program = program
        self.data = folder / "data"
        self.errors = folder / "errors"
        self.key = ""
        self.inside: tuple[str, ...] = ()
        """The command that starts programs where the house is, if it is not on the system's own disks."""
        self._variables = {
            "POMELO_DATA": str(self.data),
            "POMELO_REST": "127.0.0.1:0",
            "POMELO_GRPC": "127.0.0.1:0",
            "OPENAI_API_KEY": "sk-test-upstream",
            "OPENAI_BASE_URL": upstream.openai_base_url,
            "ELEVENLABS_API_KEY": "elevenlabs-upstream",
            "ELEVENLABS_BASE_URL": upstream.elevenlabs_base_url,
        } | variables
        self._running: Process | None = None

    async def prepare(self, micros: int, plan: str = "unlimited") -> Self:
        """Makes a live key and gives its account so much; no server runs meanwhile."""
        settings = load(None, self._variables)
        secret = settings.root_secret()
        async with store_of(settings) as store:
            _, self.key = await Keyring(store, secret).create("default", live=True)
            await store.set_plan("default", plan)
            await store.grant(Grant(f"first {time.time()}", LIVE, micros, time.time()))
        return self

    async def start(self, *, fails: bool = False, errors: int | None = None, **variables: str) -> Process:
        """Starts the server and waits until it listens; one that `fails` until it has ended. Its stderr goes
        to a file, or where `errors` says."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("POMELO_") and not name.endswith(("_API_KEY", "_BASE_URL"))
        }
        started = time.monotonic()
        with self.errors.open("ab") as sink:
            process = await asyncio.create_subprocess_exec(
                *self.inside,
                sys.executable,
                "-m",
                *self._program,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=sink if errors is None else errors,
                env=environment | self._variables | variables,
                cwd=REPOSITORY,
                limit=64 * 1024 * 1024,
            )
        self._running = Process(process, "", "", started, started)
        if fails:
            await self._running.ended()
            return self._running
        if self._program == DYING:
            told = await _line(process)
        else:
            told = await _greeting(process)
        self._running = Process(process, told["rest"], told["grpc"], started, time.monotonic())
        return self._running

    async def books(self) -> Books:
        """What the store holds; no server runs meanwhile."""
        async with store_of(load(None, self._variables)) as store:
            return Books(await state(store))

    async def running(self) -> Process:
        """The server that runs; a new one where the last has ended."""
        if self._running is not None and self._running.process.returncode is None:
            return self._running
        return await self.start()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._running is not None and self._running.process.returncode is None:
            self._running.kill()
            await self._running.ended()


async def _greeting(process: asyncio.subprocess.Process) -> dict[str, str]:
    """The addresses in what `pomelo serve` says at its start."""
    assert process.stdout is not None
    found: dict[str, str] = {}
    async with asyncio.timeout(60):
        while len(found) < 2:
            line = (await process.stdout.readline()).decode()
            assert line, f"the server ended with {await process.wait()}"
            name, _, address = line.strip().partition("  ")
            if name in ("REST", "gRPC"):
                found[name.lower()] = address.strip()
    return found


async def _line(process: asyncio.subprocess.Process) -> Any:
    assert process.stdout is not None
    async with asyncio.timeout(60):
        line = await process.stdout.readline()
    assert line, f"the server ended with {await process.wait()}"
    return json.loads(line)


async def read_books(process: Process, since: float = 0.0) -> Books:
    """The books, with the records from a time on."""
    return Books(await process.ask("state", since))
