"""A key that is revoked while the body of its request arrives is refused, over both protocols and through a gateway."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeVar

import aiohttp
import grpc
import pytest

from pomelo.accounts import failed_keys
from pomelo.call import RECHECK_KEY_AFTER
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from tests.app import Account, RunningApp, app_fixture, run_app
from tests.calls import bearer, details_of, failure, reason_of, upload_messages
from tests.driver import PROTOCOL
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


Piece = TypeVar("Piece")


async def revoke(app: RunningApp, account: Account, protocol: str, calls: int = 1) -> None:
    """Revokes a test key when so many calls of a protocol are old enough for a second check of it."""
    if protocol != "remote":  # a gateway calls its server later, and the key is checked then
        in_flight = app.server.services.access._access.in_flight  # type: ignore[attr-defined]
        await until(lambda: in_flight.calls == calls)
    began = time.monotonic()
    await until(lambda: time.monotonic() > began + RECHECK_KEY_AFTER)
    await app.server.keyring.revoke(account.test[9:21])


async def interrupted(revoked: asyncio.Future[None], *pieces: Piece) -> AsyncIterator[Piece]:
    """Yields the pieces of a body, the last one after the key was revoked."""
    *first, last = pieces
    for piece in first:
        yield piece
    await asyncio.shield(revoked)
    yield last


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("protocol", ["rest", "remote"])
async def test_a_key_revoked_while_a_body_arrives_is_refused(
    app: RunningApp, protocol: str, name: str
) -> None:
    account = await app.account()
    content_type, body = BODIES[name]
    headers = {"Authorization": f"Bearer {account.test}", "Content-Type": content_type}
    revoked = asyncio.ensure_future(revoke(app, account, protocol))
    pieces = interrupted(revoked, body[:20], body[20:])
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
    revoked = asyncio.ensure_future(revoke(app, account, "grpc"))
    messages = interrupted(revoked, request.SerializeToString())
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        _ = [each async for each in call(messages, metadata=bearer(account.test), timeout=20)]
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert details_of(refused.value)["ErrorInfo"].reason == "INVALID_API_KEY"
    assert not await app.records(account)
    assert (await app.balance(account)).spent == 0


async def test_a_key_revoked_while_a_file_arrives_is_refused_and_nothing_is_stored(app: RunningApp) -> None:
    account = await app.account()
    before = app.media()
    revoked = asyncio.ensure_future(revoke(app, account, "grpc"))
    pieces = interrupted(revoked, *upload_messages(AUDIO, "audio/mpeg", size=1_000))
    error = await failure(MediaServiceStub(app.channel).UploadMedia(pieces, metadata=bearer(account.test)))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAUTHENTICATED, "invalid_api_key")
    assert app.media() == before


@PROTOCOL
async def test_a_request_whose_key_is_revoked_counts_as_one_failed_key(tmp_path: Path, protocol: str) -> None:
    async with run_app(tmp_path) as app:
        account, calls = await app.account(), failed_keys.LIMIT
        revoked = asyncio.ensure_future(revoke(app, account, protocol, calls))

        async def code() -> str:
            if protocol == "grpc":
                pieces = interrupted(revoked, *upload_messages(AUDIO, "audio/mpeg"))
                upload = MediaServiceStub(app.channel).UploadMedia(pieces, metadata=bearer(account.test))
                return reason_of(await failure(upload))
            body = interrupted(revoked, FORM[:20], FORM[20:])
            headers = {"Content-Type": BODIES["a form"][0]}
            answer = await app.post(protocol, account.test, data=body, headers=headers)
            return str((await answer.json())["error"]["code"])

        codes = await asyncio.gather(*(code() for _ in range(calls)))
        assert set(codes) == {"invalid_api_key"}
        assert (await app.ask(protocol, account.test, text_body())).code == "rate_limit_exceeded"
