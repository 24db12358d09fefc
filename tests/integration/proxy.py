"""A proxy with one TLS port for both protocols, in front of servers on loopback, and a client of it."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import grpc

from pomelo.gen.v1.task_service_pb2 import StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.testing import Answer, FaultUpstream, Gate
from tests.calls import bearer
from tests.certificates import make_certificate
from tests.driver import Outcome, TaskRequest
from tests.grpc_driver import GrpcDriver
from tests.rest_driver import RestDriver
from tests.serving import Served, serve
from tests.tasks import text_body, text_task

WORDS = "one two three four five six"


@dataclass(frozen=True)
class Upstream:
    """The ports of a server behind a proxy. `down`: it gets no new calls."""

    rest: int
    grpc: int
    down: bool = False


def write_certificate(folder: Path) -> None:
    """Writes a certificate for localhost to a folder, as tls.pem and tls.key."""
    make_certificate(folder, "tls", "localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")


@dataclass
class Proxy:
    """A running proxy. `folder` has its configuration and its certificate."""

    folder: Path
    port: int
    process: asyncio.subprocess.Process

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    @property
    def tls(self) -> ssl.SSLContext:
        """Trusts its certificate."""
        return ssl.create_default_context(cafile=str(self.folder / "tls.pem"))

    def channel(self) -> grpc.aio.Channel:
        """Returns a new channel to it."""
        credentials = grpc.ssl_channel_credentials((self.folder / "tls.pem").read_bytes())
        options = [("grpc.use_local_subchannel_pool", 1)]
        return grpc.aio.secure_channel(f"localhost:{self.port}", credentials, options)

    @asynccontextmanager
    async def client(self, key: str) -> AsyncIterator[Client]:
        """Opens a client."""
        # A connection for each request: a proxy that reloads closes kept ones, perhaps while a request is being sent.
        connector = aiohttp.TCPConnector(ssl=self.tls, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session, self.channel() as channel:
            yield Client(self, session, channel, key)


class Client:
    """A client of both protocols of one proxy."""

    def __init__(
        self, proxy: Proxy, session: aiohttp.ClientSession, channel: grpc.aio.Channel, key: str
    ) -> None:
        self.url, self.session, self.channel, self.key = proxy.url, session, channel, key
        self._drivers: Mapping[str, RestDriver | GrpcDriver] = {
            "rest": RestDriver(session, proxy.url),
            "grpc": GrpcDriver(channel),
        }

    async def run(self, protocol: str, prompt: str, *, stream: bool = False) -> Outcome:
        """Runs a text task to its end, with its prompt as the id of the request."""
        task = TaskRequest(text_body(prompt), self.key, stream, request_id=prompt.replace(" ", "-"))
        return await self._drivers[protocol](task)

    async def words(self, protocol: str, prompt: str) -> AsyncGenerator[str, None]:
        """Runs a streamed text task, and yields its pieces of text as they arrive."""
        if protocol == "grpc":
            request = StreamTaskRequest(spec=text_task(prompt))
            call = TaskServiceStub(self.channel).StreamTask(request, metadata=bearer(self.key))
            try:
                async for message in call:
                    if text := message.event.text_delta.text:
                        yield text
            finally:
                call.cancel()
            return
        headers = {"Authorization": f"Bearer {self.key}"}
        body = text_body(prompt, stream=True)
        async with self.session.post(f"{self.url}/api/v1/task", json=body, headers=headers) as answer:
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    (choice,) = json.loads(line[6:])["choices"]
                    if text := choice["delta"].get("content"):
                        yield text

    async def keep_calling(
        self, protocol: str, stop: asyncio.Event, pause: float = 0, enough: int = 0
    ) -> list[str]:
        """Runs one task after the other until `stop` is set and `enough` have ended, with a pause of seconds between
        them, and returns their codes."""
        codes: list[str] = []
        while not stop.is_set() or len(codes) < enough:
            codes.append((await self.run(protocol, "more")).code)
            await asyncio.sleep(pause)
        return codes


@asynccontextmanager
async def serve_behind(port: int, vendor: FaultUpstream, folder: Path) -> AsyncIterator[Served]:
    """Starts a server with a vendor, which is called through a proxy on a port."""
    variables = {
        "OPENAI_API_KEY": "openai-upstream",
        "OPENAI_BASE_URL": vendor.openai_base_url,
        "POMELO_TRUSTED_PROXIES": "127.0.0.1",
        "POMELO_PUBLIC_URL": f"https://localhost:{port}",
    }
    async with serve(folder, **variables) as process:
        yield process


def wait(vendor: FaultUpstream, prompt: str) -> Gate:
    """Makes the vendor wait after three words of its answer to a prompt."""
    gate = Gate()
    vendor.when(prompt, Answer(WORDS, at={3: gate}))
    return gate
