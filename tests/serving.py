"""Runs `pomelo serve` as a process, on free ports and with an empty data folder."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from tests.integration.command_server import ForkedCommand, command_server, is_for_interpreter
from tests.ports import free_port


@dataclass(frozen=True)
class Served:
    host: str
    port: int
    grpc_port: int
    pid: int
    data: Path
    key: str
    output: Path

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def log(self) -> str:
        """Returns the output on stdout and stderr so far."""
        return self.output.read_text()


def serve(folder: Path, **variables: str) -> AbstractAsyncContextManager[Served]:
    """Starts the server in a fork of a process that has imported it, waits until all its workers serve, and ends it
    with SIGTERM."""
    return _serve(folder, variables, fork=not is_for_interpreter(variables))


def serve_interpreter(folder: Path, **variables: str) -> AbstractAsyncContextManager[Served]:
    """As `serve`, but in an interpreter of its own, for tests that measure time or memory."""
    return _serve(folder, variables, fork=False)


@asynccontextmanager
async def _serve(folder: Path, variables: dict[str, str], *, fork: bool) -> AsyncIterator[Served]:
    port, grpc_port = free_port(), free_port()
    environment = {
        **os.environ,
        "POMELO_DATA": str(folder / "data"),
        "POMELO_REST": f"127.0.0.1:{port}",
        "POMELO_GRPC": f"127.0.0.1:{grpc_port}",
        "POMELO_ADMIN": "",
        **variables,
    }
    output = folder / "output"
    process: asyncio.subprocess.Process | ForkedCommand
    with output.open("wb") as sink:
        if fork:
            process = await command_server().start(
                folder, ("serve",), environment, stdout=sink.fileno(), stderr=sink.fileno()
            )
        else:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "pomelo.cli",
                "serve",
                stdout=sink,
                stderr=sink,
                env=environment,
                cwd=folder,
            )
    try:
        async with asyncio.timeout(60), aiohttp.ClientSession() as session:
            while True:
                assert process.returncode is None, output.read_text()
                # The greeting follows the start of the last worker, while the first one responds earlier.
                if "  data  " in output.read_text():
                    async with session.get(f"http://127.0.0.1:{port}/openapi.json") as answer:
                        assert answer.status == 200
                        break
                await asyncio.sleep(0.05)
        key = (folder / "data" / "test-key").read_text().strip()
        yield Served("127.0.0.1", port, grpc_port, process.pid, folder / "data", key, output)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(60):
                await process.wait()
