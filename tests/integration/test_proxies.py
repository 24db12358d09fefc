"""Pomelo behind nginx and Envoy with the configurations of deploy: REST and gRPC on one TLS port."""

from __future__ import annotations

import asyncio
import shutil
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import aclosing
from ipaddress import ip_address
from pathlib import Path

import aiohttp
import grpc
import pytest
from aiohttp import web
from grpc_health.v1 import health_pb2

from pomelo.errors import TABLE
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.network.origin import FORWARDED_KEY
from pomelo.testing import FaultUpstream, Received
from tests.calls import bearer, failure, reason_of, upload_messages
from tests.driver import TaskRequest
from tests.integration.commands import live_key
from tests.integration.envoy import PROGRAM, open_envoy
from tests.integration.nginx import open_nginx
from tests.integration.proxy import WORDS, Client, Proxy, Upstream, serve_behind, wait
from tests.ports import free_port
from tests.rest_driver import RestDriver
from tests.serving import Served
from tests.tasks import text_body, text_task
from tests.wav import PCM, wav_file
from tests.web_server import serve_application

PROTOCOL = pytest.mark.parametrize("protocol", ["rest", "grpc"])
STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
OPEN = {"nginx": open_nginx, "envoy": open_envoy}
AUDIO = wav_file(PCM, 44_100, 2, bytes(20 * 1024 * 1024))


@pytest.fixture(scope="module")
async def vendor() -> AsyncIterator[FaultUpstream]:
    async with FaultUpstream() as upstream:
        yield upstream


@pytest.fixture(scope="module", params=OPEN)
def program(request: pytest.FixtureRequest) -> str:
    """The name of the proxy."""
    name: str = request.param
    if name == "nginx" and shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    if name == "envoy" and not PROGRAM.exists():
        pytest.skip("Envoy is not installed")
    return name


@pytest.fixture(scope="module")
def port(program: str) -> int:
    """The port of the proxy."""
    return free_port()


@pytest.fixture(scope="module")
async def served(
    vendor: FaultUpstream, port: int, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Served]:
    async with serve_behind(port, vendor, tmp_path_factory.mktemp("served")) as process:
        yield process


@pytest.fixture(scope="module")
async def proxy(
    program: str, served: Served, port: int, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Proxy]:
    folder = tmp_path_factory.mktemp(program)
    async with OPEN[program](folder, port, Upstream(served.port, served.grpc_port)) as running:
        yield running


@pytest.fixture(scope="module")
async def key(served: Served) -> str:
    """A live key without limits."""
    return await live_key(served.data.parent)


@pytest.fixture
async def client(proxy: Proxy, key: str) -> AsyncIterator[Client]:
    async with proxy.client(key) as opened:
        yield opened


def received(vendor: FaultUpstream, prompt: str) -> Received:
    """Returns the one request with a prompt that reached the vendor."""
    (request,) = [request for request in vendor.requests if prompt in request.prompt]
    return request


@PROTOCOL
@STREAM
async def test_a_task_passes_with_its_headers(client: Client, protocol: str, stream: bool) -> None:
    outcome = await client.run(protocol, f"a task over {protocol}", stream=stream)
    assert outcome.code == "ok"
    assert outcome.content
    assert "x-credits-remaining" in outcome.metadata
    assert outcome.metadata["x-request-id"] == f"a-task-over-{protocol}"
    assert protocol == "grpc" or outcome.headers["strict-transport-security"] == "max-age=31536000"


@PROTOCOL
async def test_words_arrive_while_the_vendor_still_answers(
    client: Client, vendor: FaultUpstream, protocol: str, program: str
) -> None:
    prompt = f"word by word over {protocol}, {program}"
    gate = wait(vendor, prompt)
    async with asyncio.timeout(20), aclosing(client.words(protocol, prompt)) as words:
        first = [await anext(words) for _ in range(3)]
        gate.open()
        assert "".join(first + [word async for word in words]) == WORDS


@PROTOCOL
async def test_a_caller_who_leaves_ends_the_call_to_the_vendor(
    client: Client, vendor: FaultUpstream, protocol: str, program: str
) -> None:
    prompt = f"a caller who leaves over {protocol}, {program}"
    gate = wait(vendor, prompt)
    # nginx sometimes notices only when it sends the next comment, which a silent stream has every 15 s.
    async with asyncio.timeout(40):
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


async def test_a_wrong_key_is_refused_before_the_body_has_arrived(proxy: Proxy) -> None:
    reader, writer = await asyncio.open_connection("localhost", proxy.port, ssl=proxy.tls)
    head = "POST /api/v1/task HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer wrong\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n".encode())
    async with asyncio.timeout(20):
        assert b" 401 " in await reader.readline()
    writer.close()


async def test_headers_that_are_too_large_are_refused_and_cut_no_other_call(
    client: Client, vendor: FaultUpstream, program: str
) -> None:
    prompt = f"a call beside one with too large headers, {program}"
    gate = wait(vendor, prompt)
    async with asyncio.timeout(20), aclosing(client.words("grpc", prompt)) as words:
        first = await anext(words)
        # nginx uses this call's connection for the next one. On a new one, gRPC does not limit the first headers.
        assert (await client.run("grpc", "a call before it")).code == "ok"
        metadata = bearer(client.key, x_large="x" * 20_000)
        stub = TaskServiceStub(client.channel)
        error = await failure(stub.RunTask(RunTaskRequest(spec=text_task()), metadata=metadata))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        gate.open()
        assert first + "".join([word async for word in words]) == WORDS
    headers = dict(bearer(client.key, x_large="x" * 20_000))
    async with client.session.get(f"{client.url}/api/v1/models", headers=headers) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (400, "invalid_body")


async def test_a_link_to_media_leads_through_the_proxy(client: Client, served: Served) -> None:
    body = {"model": "flux-1-pro", "prompt": "a kite", "width": 256, "height": 256, "response_format": "url"}
    driver = RestDriver(client.session, client.url)
    outcome = await driver(TaskRequest(body, served.key))
    assert outcome.code == "ok"
    assert outcome.links[0].startswith(f"{client.url}/media/")


async def test_without_a_server_the_proxy_answers_as_a_gateway_does(folder: Path, program: str) -> None:
    async with (
        OPEN[program](folder, free_port(), Upstream(free_port(), free_port())) as proxy,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=proxy.tls)) as session,
        proxy.channel() as channel,
        session.post(f"{proxy.url}/api/v1/task", json=text_body()) as answer,
    ):
        row = TABLE["server_unavailable"]
        assert (answer.status, answer.headers["Retry-After"]) == (row.http, "1")
        assert await answer.json() == {"error": {"message": row.message, "type": row.type, "code": row.code}}
        error = await failure(TaskServiceStub(channel).RunTask(RunTaskRequest(spec=text_task())))
        assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, row.message)
        head = (await raw_head(proxy, "/pomelo.v1.TaskService/RunTask")).lower()
    # Clients in Go and Java take any other response for an unknown error, and do not retry it.
    assert head.startswith("http/2 200")
    assert "\ncontent-type: application/grpc\r" in head
    assert "\ngrpc-status: 14\r" in head


async def raw_head(proxy: Proxy, path: str) -> str:
    """Returns the head of the response to a gRPC call without a message."""
    command = ["curl", "--silent", "--http2", "--cacert", f"{proxy.folder}/tls.pem", "--dump-header", "-"]
    command += ["--header", "Content-Type: application/grpc", "--header", "TE: trailers", "--data", ""]
    process = await asyncio.create_subprocess_exec(*command, proxy.url + path, stdout=PIPE)
    out, _ = await process.communicate()
    return out.decode()


async def test_an_upload_that_is_too_large_is_refused_over_grpc(client: Client) -> None:
    chunks = upload_messages(bytes(60 * 1024 * 1024), "audio/wav", size=1024 * 1024)
    upload = MediaServiceStub(client.channel).UploadMedia(iter(chunks), metadata=bearer(client.key))
    assert reason_of(await failure(upload)) == "payload_too_large"


class ForwardedRecorder(grpc.GenericRpcHandler):  # type: ignore[misc]
    """A server of both protocols that is healthy and records the X-Forwarded-For of each request with one."""

    def __init__(self) -> None:
        self.addresses: list[str] = []

    async def get(self, request: web.Request) -> web.Response:
        self.addresses += request.headers.getall("X-Forwarded-For", [])
        return web.Response()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        self.addresses += [str(value) for name, value in details.invocation_metadata if name == FORWARDED_KEY]
        status = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        healthy: bytes = status.SerializeToString()

        async def respond(request: bytes, context: object) -> bytes:
            return healthy

        return grpc.unary_unary_rpc_method_handler(respond)


@pytest.mark.parametrize("claimed", [{}, {FORWARDED_KEY: "203.0.113.7"}], ids=["none", "a false one"])
async def test_the_proxy_adds_the_caller_s_address_to_those_that_the_caller_claims(
    folder: Path, program: str, claimed: dict[str, str]
) -> None:
    recorder, server, app = ForwardedRecorder(), grpc.aio.server(), web.Application()
    server.add_generic_rpc_handlers([recorder])
    grpc_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    app.router.add_get("/{path:.*}", recorder.get)
    async with serve_application(app) as url:
        upstream = Upstream(int(url.rpartition(":")[2]), grpc_port)
        async with (
            OPEN[program](folder, free_port(), upstream) as proxy,
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=proxy.tls)) as session,
            proxy.channel() as channel,
        ):
            async with session.get(f"{proxy.url}/api/v1/models", headers=claimed) as answer:
                assert answer.status == 200
            await channel.unary_unary("/pomelo.v1.ModelService/ListModels")(
                b"", metadata=list(claimed.items())
            )
    await server.stop(None)
    addresses = recorder.addresses[-2:]
    assert len(addresses) == 2, "of REST and of gRPC"
    for address in addresses:
        *before, last = [item.strip() for item in address.split(",")]
        assert before == [*claimed.values()]
        # Envoy replaces loopback by an address of its machine.
        assert last == "127.0.0.1" if program == "nginx" else ip_address(last)
