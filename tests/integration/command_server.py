"""Runs commands of `pomelo` in forks of one process that has imported them, in a twentieth of the time of a start.

Each command is a process with its own environment, folder, arguments, stdin, stdout and stderr, which ends as
any other. `start_command` and the tests of the documentation start the interpreter anew.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

FDS = 3
"""How many files a request passes: stdin, stdout and stderr."""


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

    async def run(
        self, folder: Path, arguments: tuple[str, ...], environment: Mapping[str, str], stdin: bytes
    ) -> tuple[int, bytes, bytes]:
        """Runs a command in `folder`; returns its exit status, and what it wrote to stdout and stderr."""
        request = {"cwd": str(folder), "arguments": arguments, "environment": dict(environment)}
        with (
            socket.socket(socket.AF_UNIX) as connection,
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as error,
        ):
            given.write(stdin)
            given.seek(0)
            connection.connect(self._path)
            socket.send_fds(connection, [b"\n"], [given.fileno(), out.fileno(), error.fileno()])
            connection.sendall(json.dumps(request).encode())
            connection.shutdown(socket.SHUT_WR)
            connection.setblocking(False)
            status = await asyncio.get_running_loop().sock_recv(connection, 16)
            assert status, "the process that runs commands has ended"
            out.seek(0)
            error.seek(0)
            return int(status), out.read(), error.read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        shutil.rmtree(self._folder)


@cache
def command_server() -> CommandServer:
    """The server of this test process."""
    server = CommandServer()
    atexit.register(server.close)
    return server


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
    _, files, _, _ = socket.recv_fds(connection, 1, FDS)
    with connection.makefile("rb") as sent:
        request: dict[str, Any] = json.load(sent)
    if command := os.fork():
        for file in files:
            os.close(file)
        _, status = os.waitpid(command, 0)
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    connection.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    return request


def main() -> None:
    """Serves requests; in each fork, runs its command to the end of the process."""
    os.environ["GRPC_VERBOSITY"] = "NONE"
    import pomelo.app
    import pomelo.cli
    import pomelo.cli.client
    import pomelo.cli.operator
    import pomelo.cli.server_checks

    assert threading.active_count() == 1, "a fork would not have the other threads"
    gc.freeze()
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]
    sys.argv = ["pomelo", *request["arguments"]]
    pomelo.cli.main()


if __name__ == "__main__":
    main()
