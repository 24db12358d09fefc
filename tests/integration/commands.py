"""The command line as processes of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.ports import free_port


@dataclass(frozen=True)
class Ended:
    """What a command left."""

    status: int
    raw: bytes
    error: str

    @property
    def out(self) -> str:
        """What it printed, as text."""
        return self.raw.decode()


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Variables of a command whose data folder is in `folder`, and nothing of the machine's own."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("POMELO_") and not k.endswith(("_API_KEY", "_BASE_URL"))
    }
    return kept | {"POMELO_DATA": str(folder / "data")} | variables


async def pomelo(folder: Path, *arguments: str, stdin: bytes = b"", **variables: str) -> Ended:
    """Runs a command to its end, in `folder`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "pomelo.cli",
        *arguments,
        cwd=folder,
        env=environment(folder, **variables),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, error = await process.communicate(stdin)
    assert process.returncode is not None
    assert b"Traceback" not in error, error.decode()
    return Ended(process.returncode, out, error.decode())


async def live_key(folder: Path, **variables: str) -> str:
    """A live key of the account default, which is freed of limits and gets more than any test can spend."""
    for arguments in (("plan", "default", "unlimited"), ("grant", "default", "1000000")):
        ended = await pomelo(folder, "accounts", *arguments, **variables)
        assert ended.status == 0, ended.error
    return (await pomelo(folder, "keys", "create", "--live", **variables)).out.split()[-1]


class Running:
    """A command that stays, and the lines that it prints."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []

    async def until(self, words: str) -> str:
        """The next line that has `words` in it."""
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            while line := (await self.process.stdout.readline()).decode():
                self.lines.append(line)
                if words in line:
                    return line.strip()
        raise AssertionError(f"ended without {words!r}: {self.lines}")

    async def ends(self) -> int:
        """Its status, once it has ended."""
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            self.lines.append((await self.process.stdout.read()).decode())
            return await self.process.wait()


@asynccontextmanager
async def staying(folder: Path, *arguments: str, **variables: str) -> AsyncIterator[Running]:
    """Starts a command that serves; kills it on leaving if it is still there."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "pomelo.cli",
        *arguments,
        cwd=folder,
        env=environment(folder, **variables),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield Running(process)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
            await process.wait()


def addresses() -> dict[str, str]:
    """Free ports for both doors."""
    return {"POMELO_REST": f"127.0.0.1:{free_port()}", "POMELO_GRPC": f"127.0.0.1:{free_port()}"}
