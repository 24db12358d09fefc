"""nginx with the configuration of deploy/nginx, in front of a server on loopback."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.integration.proxy import Proxy, Upstream, write_certificate
from tests.waiting import until

DEPLOY = Path(__file__).parents[2] / "deploy" / "nginx"

_MAIN = """
daemon off;
pid {folder}/pid;
error_log {folder}/errors warn;
user root;
worker_processes 2;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/temporary;
    proxy_temp_path {folder}/temporary;
    fastcgi_temp_path {folder}/temporary;
    scgi_temp_path {folder}/temporary;
    uwsgi_temp_path {folder}/temporary;
    include {folder}/upstreams.conf;
    include {folder}/pomelo.conf;
}}
"""


def write_upstreams(folder: Path, *servers: Upstream) -> None:
    """Writes the shipped upstreams.conf with other servers."""
    text = (DEPLOY / "upstreams.conf").read_text()
    for protocol, address in (("rest", "127.0.0.1:8080"), ("grpc", "127.0.0.1:50051")):
        line = f"    server {address};\n"
        assert text.count(line) == 1
        lines = [
            f"    server 127.0.0.1:{getattr(server, protocol)}{' down' if server.down else ''};\n"
            for server in servers
        ]
        text = text.replace(line, "".join(lines))
    (folder / "upstreams.conf").write_text(text)


def write_configuration(folder: Path, port: int, *servers: Upstream) -> Path:
    """Writes the shipped configuration to a folder, with other addresses and a certificate for localhost. Returns
    the main file."""
    write_certificate(folder)
    replaced = {
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        "listen [::]:443 ssl http2;": "",
        "/etc/ssl/pomelo/tls.crt": f"{folder}/tls.pem",
        "/etc/ssl/pomelo/tls.key": f"{folder}/tls.key",
    }
    text = (DEPLOY / "pomelo.conf").read_text()
    for old, new in replaced.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "pomelo.conf").write_text(text)
    write_upstreams(folder, *servers)
    main = folder / "nginx.conf"
    main.write_text(_MAIN.format(folder=folder))
    return main


class Nginx(Proxy):
    """A running nginx."""

    def workers(self) -> set[int]:
        """Returns the ids of its worker processes."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return {int(pid) for pid in children.split()}

    async def reload(self) -> None:
        """Reloads the configuration, and waits until new workers run."""
        before = self.workers()
        self.process.send_signal(signal.SIGHUP)
        await until(lambda: len(self.workers() - before) == 2)

    async def drained(self) -> None:
        """Returns when no worker of an earlier configuration runs."""
        await until(lambda: len(self.workers()) == 2)


@asynccontextmanager
async def open_nginx(folder: Path, port: int, *servers: Upstream) -> AsyncIterator[Nginx]:
    """Starts nginx on a port, and stops it on leaving."""
    main = write_configuration(folder, port, *servers)
    process = await asyncio.create_subprocess_exec("nginx", "-p", str(folder), "-c", str(main))
    nginx = Nginx(folder, port, process)
    try:
        await until(lambda: (folder / "pid").exists() and len(nginx.workers()) == 2)
        yield nginx
    finally:
        process.terminate()
        await process.wait()
