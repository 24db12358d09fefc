"""Envoy with the configuration of deploy/envoy, in front of servers on loopback."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from tests.integration.proxy import Proxy, Upstream, write_certificate
from tests.ports import free_port

FILE = Path(__file__).parents[2] / "deploy" / "envoy" / "pomelo.yaml"
PROGRAM = Path(sys.executable).with_name("envoy")


def write_configuration(folder: Path, port: int, *servers: Upstream) -> Path:
    """Writes the shipped configuration to a folder, with other addresses and a certificate for localhost. Returns
    the file."""
    write_certificate(folder)
    text = FILE.read_text()
    for old, new in {
        "0.0.0.0, port_value: 443": f"127.0.0.1, port_value: {port}",
        "/etc/ssl/pomelo/tls.crt": f"{folder}/tls.pem",
        "/etc/ssl/pomelo/tls.key": f"{folder}/tls.key",
    }.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    for protocol, default in (("rest", 8080), ("grpc", 50051)):
        line = "              - endpoint: {address: {socket_address: {address: %s, port_value: %d}}}\n"
        shipped = "".join(line % (name, default) for name in ("pomelo-1", "pomelo-2"))
        assert text.count(shipped) == 1, shipped
        text = text.replace(
            shipped, "".join(line % ("127.0.0.1", getattr(server, protocol)) for server in servers)
        )
    target = folder / "envoy.yaml"
    target.write_text(text)
    return target


@dataclass
class Envoy(Proxy):
    """A running Envoy. `admin` is the port of its own interface."""

    admin: int

    async def all_healthy(self) -> None:
        """Returns when all servers are healthy."""
        async with aiohttp.ClientSession() as session, asyncio.timeout(60):
            while True:
                async with session.get(f"http://127.0.0.1:{self.admin}/clusters") as answer:
                    flags = re.findall(r"::health_flags::(\S+)$", await answer.text(), re.MULTILINE)
                if flags and set(flags) == {"healthy"}:
                    return
                await asyncio.sleep(0.1)


@asynccontextmanager
async def open_envoy(folder: Path, port: int, *servers: Upstream) -> AsyncIterator[Envoy]:
    """Starts Envoy on a port, and stops it on leaving."""
    file, admin = write_configuration(folder, port, *servers), free_port()
    with file.open("a") as appended:
        appended.write(
            f"admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {admin}}}}}}}\n"
        )
    options = ("-c", file, "--disable-hot-restart", "--concurrency", "2", "--log-level", "error")
    process = await asyncio.create_subprocess_exec(PROGRAM, *options)
    envoy = Envoy(folder, port, process, admin)

    async def answers() -> bool:
        """Whether it answers, which it does once it has checked the health of its servers."""
        assert process.returncode is None, "Envoy has ended"
        try:
            connector = aiohttp.TCPConnector(ssl=envoy.tls)
            async with (
                aiohttp.ClientSession(connector=connector) as session,
                session.get(f"{envoy.url}/healthz"),
            ):
                return True
        except aiohttp.ClientError:
            return False

    try:
        async with asyncio.timeout(60):
            while not await answers():  # noqa: ASYNC110 (it has no event)
                await asyncio.sleep(0.05)
        yield envoy
    finally:
        process.terminate()
        await process.wait()
