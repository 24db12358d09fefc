"""Runs commands of the command line as processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from pomelo.configuration import store_of
from pomelo.settings import Settings
from tests.integration.command_server import ForkedCommand, command_server, is_for_interpreter
from tests.ports import free_port

INTERPRETER = (sys.executable, "-m", "pomelo.cli")


@dataclass(frozen=True)
class CommandResult:
    """The exit status and the output of a command."""

    status: int
    raw: bytes
    error: str

    @property
    def out(self) -> str:
        """The output as text."""
        return self.raw.decode()


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Returns the environment of a command with its data folder in `folder` and no settings of this machine."""
    inherited = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("POMELO_") and not k.endswith(("_API_KEY", "_BASE_URL"))
    }
    return inherited | {"POMELO_DATA": str(folder / "data"), "POMELO_ADMIN": ""} | variables


async def _start_program(
    folder: Path, words: tuple[str, ...], variables: dict[str, str], *, stdin: int | None, stderr: int
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *words,
        cwd=folder,
        env=environment(folder, **variables),
        stdin=stdin,
        stdout=PIPE,
        stderr=stderr,
    )


async def pomelo(folder: Path, *arguments: str, stdin: str = "", **variables: str) -> CommandResult:
    """Runs a command in `folder` and returns its result."""
    async with asyncio.timeout(60):
        if is_for_interpreter(variables):
            words = (*INTERPRETER, *arguments)
            process = await _start_program(folder, words, variables, stdin=PIPE, stderr=PIPE)
            out, error = await process.communicate(stdin.encode())
            assert process.returncode is not None
            status = process.returncode
        else:
            given = environment(folder, **variables)
            status, out, error = await command_server().run(folder, arguments, given, stdin.encode())
    assert b"Traceback" not in error, error.decode()
    return CommandResult(status, out, error.decode())


async def output_of(*command: str, **options: Any) -> str:
    """Returns the output of a program, which must succeed; `options` are those of its process."""
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE, **options)
    async with asyncio.timeout(60):
        out, error = await process.communicate()
    assert process.returncode == 0, error.decode()
    return out.decode()


async def pomelo_json(folder: Path, *arguments: str, **variables: str) -> Any:
    """Returns the JSON that a command prints."""
    result = await pomelo(folder, *arguments, "--json", **variables)
    assert (result.status, result.error) == (0, "")
    return json.loads(result.out, parse_float=Decimal)


async def create_data(folder: Path, **variables: Any) -> None:
    """Creates the data folder of `folder` as the first start does, without a key."""
    settings = Settings(data=folder / "data", **variables)
    settings.root_secret()
    async with store_of(settings):
        pass


async def create_key(folder: Path, *arguments: str) -> str:
    """Returns a new key."""
    return (await pomelo(folder, "keys", "create", *arguments)).out.splitlines()[-1]


async def doctor(folder: Path, **variables: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Returns the exit status of `pomelo doctor`, and its findings: name -> state and detail."""
    result = await pomelo(folder, "doctor", "--json", **variables)
    assert result.error == ""
    return result.status, {row["name"]: (row["state"], row["detail"]) for row in json.loads(result.out)}


async def live_key(folder: Path, **variables: str) -> str:
    """Returns a live key of the account default, which gets no limits and more credits than a test can spend."""
    for arguments in (("plan", "default", "unlimited"), ("grant", "default", "1000000")):
        result = await pomelo(folder, "accounts", *arguments, **variables)
        assert result.status == 0, result.error
    return (await pomelo(folder, "keys", "create", "--live", **variables)).out.split()[-1]


class RunningCommand:
    """A running command and the lines that it has printed."""

    def __init__(self, process: asyncio.subprocess.Process | ForkedCommand) -> None:
        self.process = process
        self.lines: list[str] = []

    async def read_until(self, words: str) -> str:
        """Returns the next line that contains `words`."""
        assert self.process.stdout is not None
        async with asyncio.timeout(60):
            while line := (await self.process.stdout.readline()).decode():
                self.lines.append(line)
                if words in line:
                    return line.strip()
        raise AssertionError(f"ended without {words!r}: {self.lines}")

    async def wait(self) -> int:
        """Waits for the end and returns the exit status."""
        assert self.process.stdout is not None
        async with asyncio.timeout(60):
            self.lines.append((await self.process.stdout.read()).decode())
            return await self.process.wait()


@asynccontextmanager
async def start_command(folder: Path, *arguments: str, **variables: str) -> AsyncIterator[RunningCommand]:
    """Starts a command in a fork; kills it on leaving if it still runs."""
    if is_for_interpreter(variables):
        async with start_interpreter(folder, *arguments, **variables) as running:
            yield running
        return
    given = environment(folder, **variables)
    async with _kill_on_leaving(
        await command_server().start(folder, arguments, given, stderr=STDOUT)
    ) as running:
        yield running


def start_interpreter(
    folder: Path, *arguments: str, **variables: str
) -> AbstractAsyncContextManager[RunningCommand]:
    """Starts a command in an interpreter of its own; kills it on leaving if it still runs."""
    return start_program(folder, *INTERPRETER, *arguments, **variables)


@asynccontextmanager
async def start_program(folder: Path, *words: str, **variables: str) -> AsyncIterator[RunningCommand]:
    """Starts a program in the environment of a command; kills it on leaving if it still runs."""
    process = await _start_program(folder, words, variables, stdin=None, stderr=STDOUT)
    async with _kill_on_leaving(process) as running:
        yield running


@asynccontextmanager
async def _kill_on_leaving(
    process: asyncio.subprocess.Process | ForkedCommand,
) -> AsyncIterator[RunningCommand]:
    running = RunningCommand(process)
    try:
        yield running
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
            await running.wait()  # reads what it has printed: until then asyncio does not notice its end


@asynccontextmanager
async def start_server(folder: Path, *options: str, **variables: str) -> AsyncIterator[RunningCommand]:
    """Starts `pomelo serve` in a fork, and waits until it serves."""
    async with start_command(folder, "serve", *options, **variables) as server:
        await server.read_until("curl ")
        yield server


def development_key(folder: Path) -> str:
    """Returns the test key that the first start has created."""
    return (folder / "data" / "test-key").read_text().strip()


def names(folder: Path) -> list[str]:
    """Returns the names of everything in a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def free_addresses() -> dict[str, str]:
    """Returns settings with free ports for REST and gRPC."""
    return {"POMELO_REST": f"127.0.0.1:{free_port()}", "POMELO_GRPC": f"127.0.0.1:{free_port()}"}


def assert_refused(result: CommandResult, message: str) -> None:
    """Asserts that a command has failed with status 1 and one line, which contains `message`."""
    assert (result.status, result.out) == (1, "")
    assert result.error.startswith("pomelo: ")
    assert message in result.error
    assert result.error.count("\n") == 1
