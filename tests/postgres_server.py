"""A real Postgres server on loopback, if this machine has one."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tests.ports import free_port
from tests.server_program import TIED


def programs() -> Path | None:
    """The folder with initdb and postgres, or None."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


def user() -> str | None:
    """The user to run Postgres as, or None: it refuses to run as root."""
    if os.getuid() != 0:
        return pwd.getpwuid(os.getuid()).pw_name
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        return None


class PostgresServer:
    """A server in its own folder, in another time zone than UTC."""

    def __init__(self) -> None:
        folder = programs()
        name = user()
        assert folder is not None
        assert name is not None
        self._programs, self._user = folder, name
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="pomelo-postgres-"))
        if os.getuid() == 0:
            shutil.chown(self.folder, name)
        self._run("initdb", "-D", str(self.folder / "data"), "-U", "pomelo", "-A", "trust", "--no-sync")

    @property
    def url(self) -> str:
        return f"postgresql://pomelo@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Starts the server and waits until it accepts connections."""
        command = [
            *TIED,
            *(str(self._programs / "postgres"), "-D", str(self.folder / "data"), "-p", str(self.port)),
            *("-h", "127.0.0.1", "-k", str(self.folder), "-c", "timezone=Asia/Tokyo"),
        ]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, user=self._popen_user, cwd=self.folder
            )
        until = time.monotonic() + 60
        while "accept connections" not in (self.folder / "log").read_text().split("--- started ---")[-1]:
            assert time.monotonic() < until, (self.folder / "log").read_text()
            time.sleep(0.02)

    def stop(self) -> None:
        """Ends the server immediately, like a crash; it recovers at the next start."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait()
        with (self.folder / "log").open("a") as log:
            log.write("--- started ---\n")

    def close(self) -> None:
        if self._process.poll() is None:
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _popen_user(self) -> str | None:
        return self._user if os.getuid() == 0 else None

    def _run(self, name: str, *options: str) -> None:
        subprocess.run(
            [str(self._programs / name), *options],
            check=True,
            capture_output=True,
            user=self._popen_user,
            cwd=self.folder,
        )
