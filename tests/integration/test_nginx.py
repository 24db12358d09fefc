"""What nginx alone does with the configuration of deploy/nginx: it reloads, takes servers out, and refuses bodies."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from pomelo.errors import TABLE
from pomelo.testing import FaultUpstream
from tests.integration.commands import live_key
from tests.integration.nginx import Nginx, open_nginx, write_configuration, write_upstreams
from tests.integration.proxy import WORDS, Client, Upstream, serve_behind, wait
from tests.integration.rolling import RollingServers
from tests.ports import free_port

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")


@pytest.fixture
async def vendor() -> AsyncIterator[FaultUpstream]:
    async with FaultUpstream() as upstream:
        yield upstream


@pytest.fixture
async def nginx(vendor: FaultUpstream, folder: Path) -> AsyncIterator[Nginx]:
    port = free_port()
    async with (
        serve_behind(port, vendor, folder) as served,
        open_nginx(folder, port, Upstream(served.port, served.grpc_port)) as running,
    ):
        yield running


@pytest.fixture
async def client(nginx: Nginx, folder: Path) -> AsyncIterator[Client]:
    async with nginx.client(await live_key(folder)) as opened:
        yield opened


def test_nginx_accepts_the_configuration(folder: Path) -> None:
    main = write_configuration(folder, free_port(), Upstream(free_port(), free_port()))
    found = subprocess.run(["nginx", "-t", "-p", folder, "-c", main], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


async def test_a_reload_of_nginx_cuts_nothing(nginx: Nginx, client: Client, vendor: FaultUpstream) -> None:
    prompts = {protocol: f"over {protocol} while nginx reloads" for protocol in ("rest", "grpc")}
    gates = [wait(vendor, prompt) for prompt in prompts.values()]
    stop = asyncio.Event()

    async def read(protocol: str) -> str:
        return "".join([word async for word in client.words(protocol, prompts[protocol])])

    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        calls = [
            tasks.create_task(client.keep_calling(protocol, stop)) for protocol in prompts for _ in range(3)
        ]
        streams = [tasks.create_task(read(protocol)) for protocol in prompts]
        for gate in gates:
            await gate.reached.wait()
        for _ in range(3):
            await nginx.reload()
        for gate in gates:
            gate.open()
        await asyncio.wait(streams)
        stop.set()
    assert [stream.result() for stream in streams] == [WORDS, WORDS]
    assert {code for call in calls for code in call.result()} == {"ok"}


async def test_a_body_that_is_too_large_for_nginx_gets_pomelos_error(nginx: Nginx, client: Client) -> None:
    row = TABLE["payload_too_large"]
    async with client.session.post(f"{nginx.url}/api/v1/task", data=bytes(65 * 1024 * 1024)) as answer:
        assert answer.status == row.http
        assert await answer.json() == {"error": {"message": row.message, "type": row.type, "code": row.code}}


async def test_servers_that_are_taken_out_first_restart_without_a_failed_call(folder: Path) -> None:
    async with (
        RollingServers(folder) as servers,
        open_nginx(folder, free_port(), *servers.upstreams) as nginx,
    ):

        async def restart(number: int) -> None:
            others = [replace(one, down=n == number) for n, one in enumerate(servers.upstreams)]
            write_upstreams(folder, *others)
            await nginx.reload()
            await nginx.drained()
            await servers.restart(number)
            write_upstreams(folder, *servers.upstreams)
            await nginx.reload()

        codes = await servers.codes_during_restarts(nginx, restart)
        assert len(codes) > 50
        assert set(codes) == {"ok"}
        await servers.audit()
