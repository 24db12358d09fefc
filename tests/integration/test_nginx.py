"""Pomelo behind nginx with the configuration of deploy/nginx: REST and gRPC on one TLS port."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from pathlib import Path

import aiohttp
import grpc
import pytest

from pomelo.errors import TABLE
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.testing import Answer, FaultUpstream, Gate, Received
from tests.calls import bearer, failure, reason_of, upload_messages
from tests.driver import GrpcDriver, Outcome, RestDriver, TaskRequest
from tests.integration.commands import (
    RunningCommand,
    development_key,
    live_key,
    pomelo,
    start_command,
)
from tests.integration.nginx import Nginx, Upstream, open_nginx, write_configuration, write_upstreams
from tests.ports import free_port
from tests.redis_server import RedisServer
from tests.serving import Served, serve
from tests.tasks import text_body, text_task
from tests.wav import PCM, wav_file

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
PROTOCOL = pytest.mark.parametrize("protocol", ["rest", "grpc"])
STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])

WORDS = "one two three four five six"
AUDIO = wav_file(PCM, 44_100, 2, bytes(20 * 1024 * 1024))


class Client:
    """A client of both protocols behind one nginx."""

    def __init__(
        self, nginx: Nginx, session: aiohttp.ClientSession, channel: grpc.aio.Channel, key: str
    ) -> None:
        self.url, self.session, self.channel, self.key = nginx.url, session, channel, key
        self._drivers: Mapping[str, RestDriver | GrpcDriver] = {
            "rest": RestDriver(session, nginx.url),
            "grpc": GrpcDriver(channel),
        }

    async def run(self, protocol: str, prompt: str, *, stream: bool = False) -> Outcome:
        """Runs a text task to its end."""
        return await self._drivers[protocol](TaskRequest(text_body(prompt), self.key, stream))

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


@pytest.fixture(scope="module")
async def vendor() -> AsyncIterator[FaultUpstream]:
    async with FaultUpstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def port() -> int:
    """The port of nginx."""
    return free_port()


@pytest.fixture(scope="module")
async def served(
    vendor: FaultUpstream, port: int, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Served]:
    variables = {
        "OPENAI_API_KEY": "openai-upstream",
        "OPENAI_BASE_URL": vendor.openai_base_url,
        "POMELO_TRUSTED_PROXIES": "127.0.0.1",
        "POMELO_PUBLIC_URL": f"https://localhost:{port}",
    }
    async with serve(tmp_path_factory.mktemp("served"), **variables) as process:
        yield process


@pytest.fixture(scope="module")
async def nginx(served: Served, port: int, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Nginx]:
    folder = tmp_path_factory.mktemp("nginx")
    async with open_nginx(folder, port, Upstream(served.port, served.grpc_port)) as running:
        yield running


@pytest.fixture(scope="module")
async def key(served: Served) -> str:
    """A live key without limits."""
    return await live_key(served.data.parent)


@pytest.fixture
async def client(nginx: Nginx, key: str) -> AsyncIterator[Client]:
    # A connection for each request: nginx closes kept ones when it reloads, perhaps while a request is being sent.
    connector = aiohttp.TCPConnector(ssl=nginx.tls, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session, nginx.channel() as channel:
        yield Client(nginx, session, channel, key)


def wait(vendor: FaultUpstream, prompt: str) -> Gate:
    """Makes the vendor wait after three words of its answer to a prompt."""
    gate = Gate()
    vendor.when(prompt, Answer(WORDS, at={3: gate}))
    return gate


def received(vendor: FaultUpstream, prompt: str) -> Received:
    """Returns the one request with a prompt that reached the vendor."""
    (request,) = [request for request in vendor.requests if prompt in request.prompt]
    return request


def test_nginx_accepts_the_configuration(folder: Path) -> None:
    main = write_configuration(folder, free_port(), Upstream(free_port(), free_port()))
    found = subprocess.run(["nginx", "-t", "-p", folder, "-c", main], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


@PROTOCOL
@STREAM
async def test_a_task_passes_with_its_headers(client: Client, protocol: str, stream: bool) -> None:
    outcome = await client.run(protocol, f"a task over {protocol}", stream=stream)
    assert outcome.code == "ok"
    assert outcome.content
    assert "x-credits-remaining" in outcome.metadata
    assert protocol == "grpc" or outcome.headers["strict-transport-security"] == "max-age=31536000"


@PROTOCOL
async def test_words_arrive_while_the_vendor_still_answers(
    client: Client, vendor: FaultUpstream, protocol: str
) -> None:
    prompt = f"word by word over {protocol}"
    gate = wait(vendor, prompt)
    async with asyncio.timeout(20), aclosing(client.words(protocol, prompt)) as words:
        first = [await anext(words) for _ in range(3)]
        gate.open()
        assert "".join(first + [word async for word in words]) == WORDS


@PROTOCOL
async def test_a_caller_who_leaves_ends_the_call_to_the_vendor(
    client: Client, vendor: FaultUpstream, protocol: str
) -> None:
    prompt = f"a caller who leaves over {protocol}"
    gate = wait(vendor, prompt)
    async with asyncio.timeout(20):
        async with aclosing(client.words(protocol, prompt)) as words:
            await anext(words)
            await gate.reached.wait()
        await received(vendor, prompt).left.wait()


async def test_a_form_with_20_mb_passes(client: Client, served: Served) -> None:
    form = aiohttp.FormData({"model": "eleven-labs-stt"})
    form.add_field("audio", AUDIO, filename="a.wav", content_type="audio/wav")
    async with client.session.post(f"{client.url}/api/v1/task", data=form, headers=served.headers) as answer:
        assert answer.status == 200, await answer.text()
        assert (await answer.json())["object"] == "speech.transcription"


async def test_an_upload_of_20_mb_passes_over_grpc(client: Client) -> None:
    messages = upload_messages(AUDIO, "audio/wav", size=1024 * 1024)
    uploaded = await MediaServiceStub(client.channel).UploadMedia(iter(messages), metadata=bearer(client.key))
    assert uploaded.media.size_bytes == len(AUDIO)


async def test_a_wrong_key_is_refused_before_the_body_has_arrived(nginx: Nginx) -> None:
    reader, writer = await asyncio.open_connection("localhost", nginx.port, ssl=nginx.tls)
    head = "POST /api/v1/task HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer wrong\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n".encode())
    async with asyncio.timeout(5):
        assert b" 401 " in await reader.readline()
    writer.close()


async def test_a_link_to_media_leads_through_nginx(client: Client, served: Served) -> None:
    body = {"model": "flux-1-pro", "prompt": "a kite", "width": 256, "height": 256, "response_format": "url"}
    driver = RestDriver(client.session, client.url)
    outcome = await driver(TaskRequest(body, served.key))
    assert outcome.code == "ok"
    assert outcome.links[0].startswith(f"{client.url}/media/")


async def keep_calling(client: Client, protocol: str, stop: asyncio.Event) -> list[str]:
    """Runs one task after the other until `stop` is set, and returns their codes."""
    codes = []
    while not stop.is_set():
        codes.append((await client.run(protocol, "more")).code)
    return codes


async def test_a_reload_of_nginx_cuts_nothing(nginx: Nginx, client: Client, vendor: FaultUpstream) -> None:
    prompts = {protocol: f"over {protocol} while nginx reloads" for protocol in ("rest", "grpc")}
    gates = [wait(vendor, prompt) for prompt in prompts.values()]
    stop = asyncio.Event()

    async def read(protocol: str) -> str:
        return "".join([word async for word in client.words(protocol, prompts[protocol])])

    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        calls = [
            tasks.create_task(keep_calling(client, protocol, stop)) for protocol in prompts for _ in range(3)
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


async def test_without_a_server_nginx_answers_as_a_gateway_does(folder: Path) -> None:
    async with (
        open_nginx(folder, free_port(), Upstream(free_port(), free_port())) as nginx,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=nginx.tls)) as session,
        nginx.channel() as channel,
        session.post(f"{nginx.url}/api/v1/task", json=text_body()) as answer,
    ):
        row = TABLE["server_unavailable"]
        assert (answer.status, answer.headers["Retry-After"]) == (row.http, "1")
        assert await answer.json() == {"error": {"message": row.message, "type": row.type, "code": row.code}}
        error = await failure(TaskServiceStub(channel).RunTask(RunTaskRequest(spec=text_task())))
        assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, row.message)


async def test_a_body_that_is_too_large_for_nginx_gets_pomelos_error(nginx: Nginx, client: Client) -> None:
    row = TABLE["payload_too_large"]
    async with client.session.post(f"{nginx.url}/api/v1/task", data=bytes(65 * 1024 * 1024)) as answer:
        assert answer.status == row.http
        assert await answer.json() == {"error": {"message": row.message, "type": row.type, "code": row.code}}


async def test_an_upload_that_is_too_large_is_refused_over_grpc(client: Client) -> None:
    chunks = upload_messages(bytes(60 * 1024 * 1024), "audio/wav", size=1024 * 1024)
    upload = MediaServiceStub(client.channel).UploadMedia(iter(chunks), metadata=bearer(client.key))
    assert reason_of(await failure(upload)) == "payload_too_large"


async def test_servers_that_are_taken_out_first_restart_without_a_failed_call(folder: Path) -> None:
    ports = [Upstream(free_port(), free_port()) for _ in range(2)]
    folders = [folder / "first", folder / "second"]
    for each in folders:
        each.mkdir()

    with RedisServer() as redis:
        shared = {
            "POMELO_STORE": redis.url,
            "POMELO_ARCHIVE": f"sqlite:{folder}/usage.db",
            "POMELO_SECRET": "s" * 32,
            "POMELO_TRUSTED_PROXIES": "127.0.0.1",
        }

        async def start(number: int) -> RunningCommand:
            addresses = {
                "POMELO_REST": f"127.0.0.1:{ports[number].rest}",
                "POMELO_GRPC": f"127.0.0.1:{ports[number].grpc}",
            }
            server = await stack.enter_async_context(
                start_command(folders[number], "serve", **shared, **addresses)
            )
            await server.read_until("  data  ")
            return server

        async with AsyncExitStack() as stack:
            servers = [await start(0)]
            key = development_key(folders[0])
            assert (
                await pomelo(folders[0], "accounts", "plan", "default", "unlimited", **shared)
            ).status == 0
            servers.append(await start(1))
            nginx = await stack.enter_async_context(open_nginx(folder, free_port(), *ports))
            connector = aiohttp.TCPConnector(ssl=nginx.tls, force_close=True)
            session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
            channel = await stack.enter_async_context(nginx.channel())
            client, stop = Client(nginx, session, channel, key), asyncio.Event()
            async with asyncio.timeout(100), asyncio.TaskGroup() as tasks:
                calls = [
                    tasks.create_task(keep_calling(client, protocol, stop))
                    for protocol in ("rest", "grpc")
                    for _ in range(3)
                ]
                for number, server in enumerate(servers):
                    write_upstreams(folder, *[replace(one, down=n == number) for n, one in enumerate(ports)])
                    await nginx.reload()
                    await nginx.drained()
                    server.process.terminate()
                    assert await server.wait() == 0
                    await start(number)
                    write_upstreams(folder, *ports)
                    await nginx.reload()
                stop.set()
            codes = [code for call in calls for code in call.result()]
            assert len(codes) > 50
            assert set(codes) == {"ok"}
            audit = await pomelo(folders[0], "audit", "--json", **shared)
            assert audit.status == 0, audit.out
