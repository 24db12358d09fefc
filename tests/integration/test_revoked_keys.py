"""A key that is revoked while the body of its request arrives is refused, over both protocols and through a gateway."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator

import aiohttp
import grpc
import pytest

from pomelo.call import RECHECK_KEY_AFTER
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from tests.app import Account, RunningApp, app_fixture
from tests.calls import bearer, details_of
from tests.tasks import AUDIO, text_body, text_task
from tests.waiting import until

app = app_fixture()

PART = b'--B\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
FORM = (
    PART % (b"model", b"", b"eleven-labs-stt")
    + PART % (b"audio", b'; filename="a.mp3"', AUDIO)
    + b"--B--\r\n"
)
JSON = json.dumps(text_body()).encode()
BODIES = {
    "JSON": ("application/json", JSON),
    "a stream": ("application/json", json.dumps(text_body(stream=True)).encode()),
    "a form": ("multipart/form-data; boundary=B", FORM),
    "malformed JSON": ("application/json", JSON[:-1]),
    "a wrong field": ("application/json", json.dumps(text_body(temperature=9)).encode()),
}


async def revoking(app: RunningApp, account: Account, *pieces: bytes) -> AsyncIterator[bytes]:
    """Yields the pieces of a body; before the last one the test key is revoked."""
    *first, last = pieces
    for piece in first:
        yield piece
    began = time.monotonic()
    await until(lambda: time.monotonic() > began + RECHECK_KEY_AFTER)
    await app.server.keyring.revoke(account.test[9:21])
    yield last


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("protocol", ["rest", "remote"])
async def test_a_key_revoked_while_a_body_arrives_is_refused(
    app: RunningApp, protocol: str, name: str
) -> None:
    account = await app.account()
    content_type, body = BODIES[name]
    headers = {"Authorization": f"Bearer {account.test}", "Content-Type": content_type}
    pieces = revoking(app, account, body[:20], body[20:])
    url = f"{app.urls[protocol]}/api/v1/task"
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, data=pieces, headers=headers) as answer,
    ):
        refused = (answer.status, (await answer.json())["error"]["code"])
    assert refused == (401, "invalid_api_key")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert not await app.records(account, failed=True)
    assert not await app.records(account)
    balance = await app.balance(account)
    assert (balance.spent, balance.held) == (0, 0)


@pytest.mark.parametrize("method", ["RunTask", "StreamTask"])
async def test_a_key_revoked_while_a_message_arrives_is_refused(app: RunningApp, method: str) -> None:
    account = await app.account()
    spec = text_task()
    request = StreamTaskRequest(spec=spec) if method == "StreamTask" else RunTaskRequest(spec=spec)
    call = app.channel.stream_stream(f"/pomelo.v1.TaskService/{method}")
    messages = revoking(app, account, request.SerializeToString())
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        _ = [each async for each in call(messages, metadata=bearer(account.test), timeout=20)]
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert details_of(refused.value)["ErrorInfo"].reason == "INVALID_API_KEY"
    assert not await app.records(account)
    assert (await app.balance(account)).spent == 0
