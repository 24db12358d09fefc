"""Runs commands of `pomelo` in forks of one process that has imported them, in a twentieth of the time of a start.

Each command is a process with its own environment, folder, arguments, stdin, stdout and stderr, which ends as
any other, a server too. `start_interpreter` and the tests of the documentation start the interpreter anew.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

FDS = 3
"""How many files a request passes: stdin, stdout and stderr."""

MAX_REQUEST = 1 << 20
"""Bytes of a request that are read in one step."""

IMPORTS = (
    "pomelo.app",
    "pomelo.cli.client",
    "pomelo.cli.commands",
    "pomelo.cli.operator",
    "pomelo.cli.operator_page",
    "pomelo.cli.server_checks",
    "pomelo.cli.workers",
    "pomelo.providers.sandbox.provider",
    "pomelo.stores.redis",
    "pomelo.stores.sqlite",
    "pomelo.telemetry.admin",
    "pomelo.telemetry.exposition",
    "pomelo.telemetry.tracing",
    "uvloop",
)
"""What commands import when they run, and a server as a fork need not."""


class ForkedCommand:
    """A running command, with those attributes and methods of `asyncio.subprocess.Process` that tests use."""

    def __init__(
        self,
        pid: int,
        status: asyncio.Task[int],
        stdout: asyncio.StreamReader | None,
        stderr: asyncio.StreamReader | None,
    ) -> None:
        self.pid = pid
        self._status = status
        self.stdin = None
        self.stdout = stdout
        """Its output, if PIPE was given for it."""
        self.stderr = stderr

    @property
    def returncode(self) -> int | None:
        """The exit status, or minus the number of the signal that has ended it. None while it runs."""
        return self._status.result() if self._status.done() else None

    async def wait(self) -> int:
        """Waits for the end and returns the exit status."""
        return await asyncio.shield(self._status)

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the command has ended."""
        if self.returncode is None:
            with suppress(ProcessLookupError):  # its exit status is on the way
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Sends SIGTERM, unless the command has ended."""
        self.send_signal(signal.SIGTERM)


class CommandServer:
    """The process that forks. It ends with this one."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="pomelo-commands-"))
        self._path = str(self._folder / "socket")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(self._path)
            listening.listen(64)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.command_server", str(listening.fileno())],
                cwd=Path(__file__).parents[2],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[listening.fileno()],
            )

    async def start(
        self,
        folder: Path,
        arguments: tuple[str, ...],
        environment: Mapping[str, str],
        *,
        stdin: int = DEVNULL,
        stdout: int = PIPE,
        stderr: int = PIPE,
    ) -> ForkedCommand:
        """Starts a command in `folder`. Its files are descriptors, or as those of a subprocess DEVNULL for stdin,
        PIPE for stdout and stderr, and STDOUT for stderr."""
        request = {"cwd": str(folder), "arguments": arguments, "environment": dict(environment)}
        with ExitStack() as stack:
            if stdin == DEVNULL:
                stdin = os.open(os.devnull, os.O_RDONLY)
                stack.callback(os.close, stdin)
            out = await _open_pipe(stack) if stdout == PIPE else None
            error = await _open_pipe(stack) if stderr == PIPE else None
            stdout = out.write if out else stdout
            stderr = error.write if error else stdout if stderr == STDOUT else stderr
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(self._path)
            socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [stdin, stdout, stderr])
            reader, writer = await asyncio.open_unix_connection(sock=connection)

            async def read_number() -> int:
                line = await reader.readline()
                assert line, "the process that runs commands has ended"
                return int(line)

            async def read_status() -> int:
                try:
                    return await read_number()
                finally:
                    writer.close()

            pid = await read_number()
            status = asyncio.create_task(read_status())
            return ForkedCommand(pid, status, out and out.reader, error and error.reader)

    async def run(
        self, folder: Path, arguments: tuple[str, ...], environment: Mapping[str, str], stdin: bytes
    ) -> tuple[int, bytes, bytes]:
        """Runs a command in `folder`; returns its exit status, and what it wrote to stdout and stderr."""
        with (
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as error,
        ):
            given.write(stdin)
            given.seek(0)
            command = await self.start(
                *(folder, arguments, environment),
                stdin=given.fileno(),
                stdout=out.fileno(),
                stderr=error.fileno(),
            )
            status = await command.wait()
            out.seek(0)
            error.seek(0)
            return status, out.read(), error.read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        shutil.rmtree(self._folder)


class _Pipe(NamedTuple):
    reader: asyncio.StreamReader
    write: int


async def _open_pipe(stack: ExitStack) -> _Pipe:
    """Opens a pipe, the end for writing until the stack is closed."""
    read, write = os.pipe()
    stack.callback(os.close, write)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read, "rb", 0)
    )
    return _Pipe(reader, write)


@cache
def command_server() -> CommandServer:
    """The server of this test process."""
    server = CommandServer()
    atexit.register(server.close)
    return server


def is_for_interpreter(variables: Mapping[str, str]) -> bool:
    """Whether the interpreter reads one of these variables when it starts, so that a fork would ignore it."""
    return any(name.startswith("PYTHON") for name in variables)


def _serve(listening: socket.socket) -> dict[str, Any]:
    """Forks once for each request; returns the request in the fork that runs its command."""
    # Every connection gets a process that waits for its command; these need no wait themselves.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listening.fileno(), 0], [], [])
        if 0 in ready:  # the test process has ended
            os._exit(0)
        connection, _ = listening.accept()
        with connection:
            if os.fork() == 0:
                listening.close()
                return _fork(connection)


def _fork(connection: socket.socket) -> dict[str, Any]:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sent, files, _, _ = socket.recv_fds(connection, MAX_REQUEST, FDS)
    while not sent.endswith(b"\n"):
        more = connection.recv(MAX_REQUEST)
        if not more:  # the test process has ended
            os._exit(1)
        sent += more
    request: dict[str, Any] = json.loads(sent)
    if command := os.fork():
        for file in files:
            os.close(file)
        connection.sendall(b"%d\n" % command)
        _, status = os.waitpid(command, 0)
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    connection.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    return request


def main() -> None:
    """Serves requests; in each fork, runs its command to the end of the process."""
    os.environ["GRPC_VERBOSITY"] = "NONE"
    for name in IMPORTS:
        import_module(name)
    from pomelo.providers.registry import read_registry

    read_registry()
    assert threading.active_count() == 1, "a fork would not have the other threads"
    gc.freeze()
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]
    sys.argv = ["pomelo", *request["arguments"]]
    # Workers import the main module of their parent.
    try:
        runpy.run_module("pomelo.cli", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if isinstance(ended.code, int):
            _exit(ended.code)
        raise


def _exit(status: int) -> None:
    """Ends the process as the interpreter does, but leaves its memory to the kernel: to free all modules, the
    interpreter would copy their pages from the parent, in half of the time of a short command.

    Returns if the output cannot be written, which the interpreter reports.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    gc.collect()  # what is still open warns of it
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
