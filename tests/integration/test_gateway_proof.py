"""A gateway proves its origin to the server; a gRPC caller can't forge a gateway's metadata."""

from __future__ import annotations

import base64
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from pomelo.app import App, open_gateway
from pomelo.configuration.front_ends import gateway_proof
from pomelo.gen.v1.account_service_pb2 import ListUsageRequest
from pomelo.gen.v1.account_service_pb2_grpc import AccountServiceStub
from pomelo.gen.v1.media_service_pb2 import UploadMediaHeader, UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.settings import Settings
from tests.calls import bearer
from tests.conftest import Keys
from tests.driver import TaskRequest
from tests.rest_driver import RestDriver
from tests.tasks import text_body, text_task

AUDIO = b"OggS" + b"audio that only this file has  " * 3_000
FORGED = {
    "a claim": [("x-pomelo-wire", "rest")],
    "a claim with an invented proof": [
        *(("x-pomelo-wire", "rest"), ("x-pomelo-address", "203.0.113.9"), ("x-pomelo-proof", "0" * 64))
    ],
    "a proof under another secret": gateway_proof(b"another secret" * 4).metadata("rest", "203.0.113.9", ""),
}
forging = pytest.mark.parametrize("claim", FORGED.values(), ids=FORGED)


@pytest.fixture
def protocol_of(channel: grpc.aio.Channel, keys: Keys) -> Callable[[str], Awaitable[str]]:
    """Returns the protocol in the usage record of a request."""

    async def find(request_id: str) -> str:
        usage = AccountServiceStub(channel)
        listed = await usage.ListUsage(ListUsageRequest(page_size=20), metadata=bearer(keys.test))
        (protocol,) = [record.protocol for record in listed.records if record.request_id == request_id]
        return str(protocol)

    return find


@forging
async def test_a_grpc_caller_can_not_forge_the_protocol_of_its_usage_record(
    claim: list[tuple[str, str]], channel: grpc.aio.Channel, keys: Keys, protocol_of: Any
) -> None:
    request_id = f"forged-{len(claim)}-{claim[-1][1][:8]}"
    metadata = [*bearer(keys.test, x_request_id=request_id), *claim]
    await TaskServiceStub(channel).RunTask(RunTaskRequest(spec=text_task()), metadata=metadata)
    assert await protocol_of(request_id) == "grpc"


@forging
async def test_a_grpc_caller_can_not_replace_its_deadline_by_a_header(
    claim: list[tuple[str, str]], channel: grpc.aio.Channel, keys: Keys
) -> None:
    tasks = TaskServiceStub(channel)
    metadata = [*bearer(keys.test, x_request_timeout="0.001"), *claim]
    await tasks.RunTask(RunTaskRequest(spec=text_task("[[delay:0.1]]")), metadata=metadata, timeout=20)


@forging
async def test_a_grpc_caller_can_not_have_an_upload_deleted_with_its_task(
    claim: list[tuple[str, str]], channel: grpc.aio.Channel, keys: Keys
) -> None:
    metadata = [*bearer(keys.test), *claim]
    pieces = [
        UploadMediaRequest(header=UploadMediaHeader(content_type="audio/ogg")),
        UploadMediaRequest(chunk=AUDIO),
    ]
    uploaded = await MediaServiceStub(channel).UploadMedia(iter(pieces), metadata=metadata)
    task = TaskSpec(model="eleven-labs-stt")
    task.speech_to_text.audio.media_id = uploaded.media.id
    for _ in range(2):
        await TaskServiceStub(channel).RunTask(RunTaskRequest(spec=task), metadata=metadata)


async def test_a_gateway_with_the_root_secret_leaves_the_same_records_as_one_process(
    gateway_url: str, http: aiohttp.ClientSession, keys: Keys, protocol_of: Any
) -> None:
    request = TaskRequest(text_body(), keys.test, request_id="through-a-proven-gateway")
    assert (await RestDriver(http, gateway_url)(request)).status == 200
    assert await protocol_of("through-a-proven-gateway") == "rest"


# --- gateways without a valid proof


@pytest.fixture(params=["without a secret", "with another secret"])
async def unproven(
    request: pytest.FixtureRequest,
    app: App,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    http: aiohttp.ClientSession,
) -> AsyncIterator[RestDriver]:
    """A client of a gateway without a valid proof."""
    secret = "" if request.param == "without a secret" else "x" * 40
    settings = Settings(rest="127.0.0.1:0", data=tmp_path / "none", secret=secret)
    assert app.grpc is not None
    async with open_gateway(settings, app.grpc) as (host, port):
        # The server, which logs here too, warns on its own of a wrong secret.
        warned = [r for r in caplog.records if r.levelno == logging.WARNING and r.name == "pomelo.app"]
        assert ["POMELO_SECRET" in r.getMessage() for r in warned] == ([] if secret else [True])
        yield RestDriver(http, f"http://{host}:{port}")
    assert not (tmp_path / "none").exists()


async def test_an_unproven_gateway_serves_and_its_records_name_grpc(
    unproven: RestDriver, keys: Keys, protocol_of: Any
) -> None:
    request_id = "through-" + unproven.base.rpartition(":")[2]
    outcome = await unproven(TaskRequest(text_body(), keys.test, request_id=request_id))
    assert (outcome.status, outcome.headers["x-pomelo-mode"]) == (200, "test")
    assert await protocol_of(request_id) == "grpc"


async def test_an_unproven_gateway_opens_streams_before_their_first_event(
    unproven: RestDriver, keys: Keys
) -> None:
    outcome = await unproven(TaskRequest(text_body("[[cut]]"), keys.test, stream=True))
    assert (outcome.status, outcome.done) == (200, False)
    assert outcome.headers["content-type"].startswith("text/event-stream")
    assert outcome.code != "ok"


async def test_an_unproven_gateway_keeps_a_caller_s_deadline(unproven: RestDriver, keys: Keys) -> None:
    outcome = await unproven(TaskRequest(text_body("[[delay:30]]"), keys.test, timeout=0.2))
    assert (outcome.status, outcome.code) == (504, "deadline_exceeded")


async def test_an_unproven_gateway_accepts_uploads(unproven: RestDriver, keys: Keys) -> None:
    body = {"model": "eleven-labs-stt", "audio": base64.b64encode(AUDIO).decode()}
    outcome = await unproven(TaskRequest(body, keys.test, form=True))
    assert outcome.status == 200, outcome


JSON = {"Content-Type": "application/json"}
REFUSED = {
    "a broken body": ("POST", "/api/v1/task", b"{"),
    "no object": ("POST", "/api/v1/task", b"[]"),
    "no model": ("POST", "/api/v1/task", b"{}"),
    "an unknown model": ("POST", "/api/v1/task", b'{"model": "none", "unknown": 1}'),
    "an unknown path": ("GET", "/api/v1/unknown", b""),
    "a wrong method": ("POST", "/api/v1/models", b""),
    "an unknown parameter": ("GET", "/api/v1/account?unknown=1", b""),
    **{
        f"an unknown field of {model}": (
            "POST",
            "/api/v1/task",
            b'{"model": "%b", "unknown": 1}' % model.encode(),
        )
        for model in ("gpt-4", "flux-1-dev", "eleven-labs-tts", "eleven-labs-sts", "eleven-labs-stt")
    },
}


@pytest.mark.parametrize(("method", "path", "body"), REFUSED.values(), ids=REFUSED)
async def test_an_unproven_gateway_reports_its_own_refusals(
    unproven: RestDriver,
    rest_url: str,
    http: aiohttp.ClientSession,
    keys: Keys,
    method: str,
    path: str,
    body: bytes,
) -> None:
    async def refusal(base: str) -> tuple[int, Any]:
        headers = JSON | {"Authorization": f"Bearer {keys.test}"}
        async with http.request(method, base + path, headers=headers, data=body or None) as response:
            return response.status, await response.json()

    assert await refusal(unproven.base) == await refusal(rest_url)
