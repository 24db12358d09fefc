"""The version before: its data opens in this version, and both can serve one store during a rolling upgrade."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import signal
import subprocess
import sys
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.integration.commands import (
    RunningCommand,
    environment,
    free_addresses,
    pomelo,
    pomelo_json,
    start_command,
)
from tests.redis_server import RedisServer
from tests.tasks import text_body

ROOT = Path(__file__).parents[2]

BEFORE = "646a370"
"""A commit of the version before. Data and servers of it must work with those of this version."""


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the code of the version before."""
    folder = tmp_path_factory.mktemp("before")
    archive = folder / "archive.zip"
    found = subprocess.run(
        ["git", "archive", "--output", str(archive), BEFORE, "pomelo", "gateway"],
        cwd=ROOT,
        check=False,
        capture_output=True,
    )
    if found.returncode:
        pytest.skip(f"the history of the project does not have {BEFORE} here")
    shutil.unpack_archive(archive, folder)
    return folder


async def run_before(before: Path, folder: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    """Runs a command of the version before; returns its status and its output on both streams."""
    async with start_before(before, folder, *arguments, **variables) as command:
        status = await command.wait()
    return status, "".join(command.lines)


@asynccontextmanager
async def start_before(
    before: Path, folder: Path, *arguments: str, **variables: str
) -> AsyncIterator[RunningCommand]:
    """Starts a command of the version before; kills it on leaving if it still runs."""
    # -P and PYTHONPATH: its code, not that of the working directory or of the environment.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-c", "from pomelo.cli import main; main()", *arguments),
        cwd=folder,
        env={
            name: value
            for name, value in environment(folder, PYTHONPATH=str(before), **variables).items()
            if name != "POMELO_ADMIN"  # which it does not know
        },
        stdout=PIPE,
        stderr=STDOUT,
    )
    try:
        yield RunningCommand(process)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
            await process.wait()


async def ask(http: aiohttp.ClientSession, rest: str, key: str, **headers: str) -> tuple[int, Any]:
    """Runs a task; returns the status and the answer."""
    sent = {"Authorization": f"Bearer {key}", **headers}
    async with http.post(f"http://{rest}/api/v1/task", json=text_body(), headers=sent) as answer:
        return answer.status, await answer.json()


async def end(server: RunningCommand) -> None:
    server.process.send_signal(signal.SIGTERM)
    assert await server.wait() == 0


async def test_the_code_of_the_version_before_is_what_runs(before: Path, tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-c", "import pomelo; print(pomelo.__file__)"),
        cwd=tmp_path,
        env=environment(tmp_path, PYTHONPATH=str(before)),
        stdout=PIPE,
    )
    out, _ = await process.communicate()
    assert out.decode().startswith(str(before))


async def test_sqlite_data_of_the_version_before_is_intact_and_there_is_no_way_back(
    before: Path, tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    addresses = free_addresses()
    rest = addresses["POMELO_REST"]
    async with start_before(before, tmp_path, "serve", **addresses) as old:
        await old.read_until("curl ")
        key = (tmp_path / "data" / "test-key").read_text().strip()
        repeated = {"Idempotency-Key": "order-7"}
        _, first = await ask(http, rest, key, **repeated)
        for _ in range(5):
            assert (await ask(http, rest, key))[0] == 200
        await run_before(before, tmp_path, "accounts", "create", "acme", "--credits", "12.5")
        await end(old)
    database = tmp_path / "data" / "pomelo.db"
    shutil.copy(database, tmp_path / "backup.db")
    assert (await pomelo(tmp_path, "serve", "--check", **addresses)).status == 0
    async with start_command(tmp_path, "serve", **addresses) as new:
        await new.read_until("curl ")
        assert (await ask(http, rest, key, **repeated)) == (200, first)
        assert (await ask(http, rest, key))[0] == 200
        assert "Difference: none" in (await pomelo(tmp_path, "audit")).out
        assert len(await pomelo_json(tmp_path, "usage")) == 7
        accounts = await pomelo_json(tmp_path, "accounts", "list")
        assert [account["id"] for account in accounts] == ["acme", "default"]
        await end(new)
    status, printed = await run_before(before, tmp_path, "serve", **addresses)
    assert status == 1
    assert "was written by a newer Pomelo" in printed
    assert printed.count("\n") == 1
    shutil.copy(tmp_path / "backup.db", database)
    async with start_before(before, tmp_path, "serve", **addresses) as old:
        await old.read_until("curl ")
        assert (await ask(http, rest, key, **repeated)) == (200, first)
        await end(old)


@pytest.mark.timeout(300)
async def test_both_versions_serve_one_redis_store_under_load_and_bill_right(
    before: Path, tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    folders = [tmp_path / "old", tmp_path / "new"]
    for folder in folders:
        folder.mkdir()
    addresses = [free_addresses(), free_addresses()]
    with RedisServer() as redis:
        shared = {
            "POMELO_STORE": redis.url,
            "POMELO_ARCHIVE": f"sqlite:{tmp_path / 'usage.db'}",
            "POMELO_SECRET": "s" * 40,
        }
        async with AsyncExitStack() as stack:
            old = await stack.enter_async_context(
                start_before(before, folders[0], "serve", **addresses[0], **shared)
            )
            await old.read_until("curl ")
            new = await stack.enter_async_context(
                start_command(folders[1], "serve", **addresses[1], **shared)
            )
            await new.read_until("No provider has a key")
            first = (folders[0] / "data" / "test-key").read_text().strip()
            plan = await pomelo(folders[1], "accounts", "plan", "default", "unlimited", **shared)
            assert plan.status == 0, plan.error
            created = await pomelo(folders[1], "keys", "create", **shared)
            _, printed = await run_before(before, folders[0], "keys", "create", **shared)
            keys = [first, created.out.split()[-1], printed.split()[-1]]
            rests = [each["POMELO_REST"] for each in addresses]
            for key, rest in itertools.product(keys, rests):
                assert (await ask(http, rest, key))[0] == 200
            repeated = {"Idempotency-Key": "order-7"}
            _, answer = await ask(http, rests[0], first, **repeated)
            assert await ask(http, rests[1], first, **repeated) == (200, answer)
            load = [
                asyncio.create_task(ask(http, rest, key))
                for _ in range(30)
                for key, rest in itertools.product(keys, rests)
            ]
            assert {status for status, _ in await asyncio.gather(*load)} == {200}
            for audited in (
                (await pomelo(folders[1], "audit", **shared)).out,
                (await run_before(before, folders[0], "audit", **shared))[1],
            ):
                assert "Difference: none" in audited
            await end(old)
            assert (await ask(http, rests[1], first))[0] == 200
            usage = await pomelo_json(folders[1], "usage", **shared)
            assert len(usage) == 6 + 1 + len(load) + 1
            assert "Difference: none" in (await pomelo(folders[1], "audit", **shared)).out
            await end(new)
