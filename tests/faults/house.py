"""A data folder and the server processes that live on it one after another, whatever ends them; and its books.

`Books` are what must add up at any time: of the store as a whole, and of what callers were told.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pomelo.admission.keys import Keyring
from pomelo.settings import Settings
from pomelo.stores import open_store
from pomelo.stores.ledger import Grant, Wallet
from pomelo.testing import FaultUpstream

REPOSITORY = Path(__file__).parents[2]
LIVE = Wallet("default", True)
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
    """A data folder, and the server on it. On leaving, the server is killed."""

    def __init__(self, folder: Path, upstream: FaultUpstream, **variables: str) -> None:
        self.data = folder / "data"
        self.errors = folder / "errors"
        self.key = ""
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
        settings = Settings(data=self.data)
        secret = settings.root_secret()
        async with open_store(settings.store_url()) as store:
            _, self.key = await Keyring(store, secret).create("default", live=True)
            await store.set_plan("default", plan)
            await store.grant(Grant(f"first {time.time()}", LIVE, micros, time.time()))
        return self

    async def start(self, *, fails: bool = False, **variables: str) -> Process:
        """Starts the server and waits until it listens; one that `fails` until it has ended."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("POMELO_") and not name.endswith(("_API_KEY", "_BASE_URL"))
        }
        started = time.monotonic()
        with self.errors.open("ab") as sink:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.faults.dying",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=sink,
                env=environment | self._variables | variables,
                cwd=REPOSITORY,
                limit=64 * 1024 * 1024,
            )
        self._running = Process(process, "", "", started, started)
        if fails:
            await self._running.ended()
            return self._running
        told = await _line(process)
        self._running = Process(process, told["rest"], told["grpc"], started, time.monotonic())
        return self._running

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


async def _line(process: asyncio.subprocess.Process) -> Any:
    assert process.stdout is not None
    async with asyncio.timeout(60):
        line = await process.stdout.readline()
    assert line, f"the server ended with {await process.wait()}"
    return json.loads(line)


class Books:
    """What the store holds, as a server's `state` tells it."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.balance: dict[str, int] = state["balance"]
        self.slots: int = state["slots"]
        self.held: list[str] = state["held"]
        self.records: dict[str, list[dict[str, Any]]] = defaultdict(list)
        """By request id."""
        for record in state["records"]:
            self.records[record["request_id"]].append(record)
        self._state = state

    def check(self) -> None:
        """Everything adds up, to the microcredit."""
        audit = self._state["audit"]
        assert audit["findings"] == []
        assert audit["difference"] == 0
        assert self.balance["granted"] == self._state["granted"]
        assert self.balance["spent"] == self._state["spent"]
        left = self.balance["granted"] - self.balance["spent"] - self.balance["held"]
        assert self.balance["available"] == left
        assert min(self.balance.values()) >= 0

    def check_idle(self) -> None:
        """It adds up, and nothing is held by anybody."""
        self.check()
        assert self.held == []
        assert self.balance["held"] == 0
        assert self.slots == 0

    def costs(self, request_ids: Iterable[str]) -> int:
        """What those requests were charged, together."""
        return sum(record["cost"] for name in request_ids for record in self.records.get(name, ()))


async def read_books(process: Process, since: float = 0.0) -> Books:
    """The books, with the records from a time on."""
    return Books(await process.ask("state", since))
