"""Runs the commands of docs/maintenance.md and the reload of docs/operations.md, with only the folders replaced."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import ssl
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.certificates import make_certificate
from tests.integration.commands import RunningCommand, free_addresses, pomelo, start_command
from tests.ports import free_port
from tests.redis_server import RedisServer
from tests.tasks import text_body

DOCS = Path(__file__).parents[2] / "docs"
PAGES = "\n".join((DOCS / name).read_text() for name in ("maintenance.md", "operations.md"))

needs = {
    name: pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not on this machine")
    for name in ("sqlite3", "redis-cli", "redis-server", "openssl")
}


def blocks(heading: str) -> list[str]:
    """Returns the commands under a heading of the pages, up to the next heading."""
    _, _, rest = PAGES.partition(f"\n{heading}\n")
    section = re.split(r"^#+ ", rest, maxsplit=1, flags=re.MULTILINE)[0]
    found = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    assert found, heading
    return found


class Machine:
    """A folder in which an operator works, and the variables of the shell. The data folder is `.pomelo`."""

    def __init__(self, folder: Path, **variables: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.backups = folder.parent / "backups"
        self.backups.mkdir(exist_ok=True)
        self.variables = {"POMELO_DATA": ".pomelo", "POMELO_ADMIN": "", **free_addresses(), **variables}

    @property
    def url(self) -> str:
        return f"http://{self.variables['POMELO_REST']}"

    @property
    def key(self) -> str:
        """The development key."""
        return (self.folder / ".pomelo" / "test-key").read_text().strip()

    async def run(self, commands: str) -> str:
        """Runs a block of the page, which may change the variables; returns its output."""
        commands = commands.replace("/backups/", f"{self.backups}/").replace("/new/", f"{self.folder}/new/")
        process = await asyncio.create_subprocess_exec(
            *("bash", "-euo", "pipefail", "-c", f"{commands}\nenv -0 > {self.folder}/variables"),
            cwd=self.folder,
            env={
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "HOME": str(self.folder),
                **self.variables,
            },
            stdout=PIPE,
            stderr=PIPE,
        )
        async with asyncio.timeout(120):
            out, error = await process.communicate()
        assert process.returncode == 0, (commands, out.decode(), error.decode())
        after = dict(
            line.split("=", 1) for line in (self.folder / "variables").read_text().split("\0") if line
        )
        self.variables = {
            name: value for name, value in after.items() if name in self.variables or "POMELO" in name
        }
        return out.decode()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[RunningCommand]:
        """Runs the server, and ends it with SIGTERM."""
        async with start_command(self.folder, "serve", **self.variables) as server:
            await server.read_until("No provider has a key")
            yield server
            server.process.send_signal(signal.SIGTERM)
            assert await server.wait() == 0

    async def task(self, http: aiohttp.ClientSession, key: str) -> int:
        """Runs a task, and returns the status. Tries again while the store is too slow, on a busy machine."""
        headers = {"Authorization": f"Bearer {key}"}
        async with asyncio.timeout(60):
            while True:
                async with http.post(f"{self.url}/api/v1/task", json=text_body(), headers=headers) as answer:
                    if "store_unavailable" not in await answer.text():
                        return answer.status

    async def get(self, http: aiohttp.ClientSession, path: str, key: str = "") -> tuple[int, Any]:
        """Gets a path of REST, and returns the status and the body."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with http.get(self.url + path, headers=headers) as answer:
            is_json = answer.content_type == "application/json"
            return answer.status, await (answer.json() if is_json else answer.read())

    async def link(self, http: aiohttp.ClientSession) -> str:
        """Makes an image, and returns the path and query of its link."""
        body = {"model": "flux-1-pro", "prompt": "A kite", "width": 64, "height": 64}
        headers = {"Authorization": f"Bearer {self.key}"}
        async with http.post(f"{self.url}/api/v1/task", json=body, headers=headers) as answer:
            url: str = (await answer.json())["data"][0]["url"]
        return url.removeprefix(self.url)

    async def command(self, *arguments: str) -> str:
        """Runs a command that is not a block of the page, without a shell; returns its output."""
        result = await pomelo(self.folder, *arguments, **self.variables)
        assert result.status == 0, (arguments, result.out, result.error)
        return result.out

    async def create_key(self) -> str:
        return (await self.command("keys", "create")).split()[-1]


AUDIT_IS_CLEAN = "Difference: none"


@needs["sqlite3"]
async def test_a_sqlite_backup_that_was_made_under_load_is_restored(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    back_up, restore, audit = blocks("### SQLite")
    machine = Machine(tmp_path / "one")
    async with machine.serve():
        key = machine.key
        load = [asyncio.create_task(machine.task(http, key)) for _ in range(100)]
        await asyncio.wait(load, return_when=asyncio.FIRST_COMPLETED)
        await machine.run(back_up)
        await asyncio.gather(*load)
    new = Machine(tmp_path / "two")
    await new.run(restore)
    async with new.serve():
        assert AUDIT_IS_CLEAN in await new.run(audit)
        assert await new.task(http, key) == 200
    assert AUDIT_IS_CLEAN in await new.run(audit)


@needs["sqlite3"]
@needs["redis-cli"]
@needs["redis-server"]
async def test_a_redis_backup_is_restored(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    back_up, restore = blocks("### Redis")
    with RedisServer() as redis:
        machine = Machine(tmp_path / "one", POMELO_STORE=redis.url)
        async with machine.serve():
            key = machine.key
            for _ in range(5):
                assert await machine.task(http, key) == 200
            assert (await machine.get(http, "/api/v1/usage", key))[0] == 200  # all records are in the archive
            await machine.run(back_up)
    port, folder = free_port(), tmp_path / "redis"
    folder.mkdir()
    new = Machine(tmp_path / "two", REDIS_PORT=str(port), REDIS_DATA=str(folder))
    await new.run(restore)
    with RedisServer("--dir", str(folder)) as restored:
        new.variables["POMELO_STORE"] = restored.url
        async with new.serve():
            assert AUDIT_IS_CLEAN in await new.command("audit")
            assert await new.task(http, key) == 200
            assert len((await new.get(http, "/api/v1/usage", key))[1]["data"]) == 6


@needs["openssl"]
async def test_a_tls_certificate_is_rotated(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    (rotate,) = blocks("### Rotate a TLS certificate")
    machine = Machine(tmp_path / "one", POMELO_TLS_CERT="tls/cert.pem", POMELO_TLS_KEY="tls/key.pem")
    for name in ("tls", "new"):
        folder = machine.folder / name
        folder.mkdir()
        make_certificate(folder, "cert", "localhost", "-addext", "subjectAltName=IP:127.0.0.1")
        (folder / "cert.key").rename(folder / "key.pem")
    url = machine.url.replace("http:", "https:") + "/healthz"
    async with machine.serve() as server:
        machine.variables["PID"] = str(server.process.pid)
        await machine.run(rotate)
        assert "TLS certificate changed" in await server.read_until("The configuration was")
        trusted = ssl.create_default_context(cafile=machine.folder / "new" / "cert.pem")
        async with http.get(url, ssl=trusted) as answer:
            assert answer.status == 200


async def test_plans_are_reloaded(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    (reload,) = blocks("## Reload")
    machine = Machine(tmp_path / "one")
    async with machine.serve() as server:
        (machine.folder / "pomelo.toml").write_text("[plans.team]\nrequests_per_minute = 5\n")
        machine.variables["PID"] = str(server.process.pid)
        await machine.run(reload)
        assert "plans added: team" in await server.read_until("The configuration was")


async def test_an_api_key_is_rotated(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    (rotate,) = blocks("### Rotate an API key")
    machine = Machine(tmp_path / "one")
    async with machine.serve():
        old = machine.key
        machine.variables["KEY_ID"] = old[9:21]
        new = (await machine.run(rotate)).split()[-1]
        assert await machine.task(http, new) == 200
        assert await machine.task(http, old) == 401


@needs["openssl"]
@pytest.mark.parametrize("stored", ["in the data folder", "in POMELO_SECRET"])
async def test_the_root_secret_is_rotated_without_losing_keys_or_links(
    tmp_path: Path, http: aiohttp.ClientSession, stored: str
) -> None:
    in_folder, in_variable, ask, end = blocks("### Rotate the root secret")
    machine = Machine(tmp_path / "one")
    if stored == "in POMELO_SECRET":
        machine.variables["POMELO_SECRET"] = "s" * 40
    async with machine.serve():
        used, unused, link = machine.key, await machine.create_key(), await machine.link(http)
        for _ in range(2):
            await machine.task(http, used)
        _, page = await machine.get(http, "/api/v1/usage?page_size=1", used)
        await machine.run(in_folder if stored == "in the data folder" else in_variable)
    async with machine.serve():
        assert (await machine.get(http, link))[0] == 200
        assert await machine.task(http, used) == 200
        token = page["next_page_token"]
        assert (await machine.get(http, f"/api/v1/usage?page_token={token}", used))[0] == 200
        said = await machine.run(ask)
        assert said.startswith("warning")
        assert f"1 active key still uses the previous secret: {unused[9:21]}." in said
        assert await machine.task(http, unused) == 200
        new = await machine.create_key()
        async with asyncio.timeout(20):
            while not (said := await machine.run(ask)).startswith("ok"):
                pass
        assert "you may remove it" in said
        await machine.run(end)
    assert "POMELO_SECRET_PREVIOUS" not in machine.variables
    async with machine.serve():
        for key in (used, unused, new):
            assert await machine.task(http, key) == 200
        assert (await machine.get(http, link))[0] == 404
        assert (await machine.get(http, await machine.link(http)))[0] == 200
        assert AUDIT_IS_CLEAN in await machine.command("audit")


@pytest.mark.timeout(300)
async def test_the_root_secret_of_two_servers_is_rotated_one_after_the_other(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    old, new = "o" * 40, "n" * 40
    rounds = [
        {"POMELO_SECRET": old, "POMELO_SECRET_PREVIOUS": new},
        {"POMELO_SECRET": new, "POMELO_SECRET_PREVIOUS": old},
        {"POMELO_SECRET": new, "POMELO_SECRET_PREVIOUS": ""},
    ]
    with RedisServer() as redis:
        shared = {"POMELO_STORE": redis.url, "POMELO_ARCHIVE": f"sqlite:{tmp_path / 'usage.db'}"}
        machines = [Machine(tmp_path / name, **shared, POMELO_SECRET=old) for name in ("one", "two")]
        running = [AsyncExitStack() for _ in machines]
        keys: list[str] = []
        async with running[0], running[1]:
            for machine, stack in zip(machines, running, strict=True):
                await stack.enter_async_context(machine.serve())
            keys.append(machines[0].key)
            for variables in rounds:
                for machine, stack in zip(machines, running, strict=True):
                    await stack.aclose()
                    machine.variables |= variables
                    await stack.enter_async_context(machine.serve())
                    keys.append(await machine.create_key())
                    for key in keys:
                        assert [await each.task(http, key) for each in machines] == [200, 200], variables
                if variables["POMELO_SECRET_PREVIOUS"] == old:
                    async with asyncio.timeout(60):
                        while "you may remove it" not in await machines[0].command("doctor"):
                            pass
            assert AUDIT_IS_CLEAN in await machines[0].command("audit")


def test_the_commands_of_an_upgrade_are_those_that_are_tested() -> None:
    assert blocks("## Upgrade") == ["pomelo serve --check\n", "pomelo doctor\npomelo audit\n"]
