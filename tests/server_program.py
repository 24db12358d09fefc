"""A server of another program on loopback, which tests can kill, pause and restart."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

from tests.ports import free_port

TIED = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()
"""The beginning of a command that ends with this process, even if this process is killed."""


class ServerProgram:
    """One process at a time, on one free port."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def launch(
        self,
        command: Sequence[str],
        ask: Callable[[], object],
        absent: tuple[type[Exception], ...],
        explain: Callable[[], str],
        output: Any = subprocess.DEVNULL,
    ) -> None:
        """Starts a process and waits until `ask` raises none of `absent`. `explain` says why it does not start."""
        self._process = subprocess.Popen([*TIED, *command], stdout=output, stderr=output)
        until = time.monotonic() + 60
        while True:
            try:
                ask()
            except absent:
                assert time.monotonic() < until, explain()
                assert self._process.poll() is None, explain()
                time.sleep(0.02)
            else:
                return

    def kill(self) -> None:
        self._send(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def stop(self) -> None:
        """Pauses the server until `resume`."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """Continues a paused server."""
        self._send(signal.SIGCONT)

    def close(self) -> None:
        """Ends the server, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self.kill()

    def _send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
