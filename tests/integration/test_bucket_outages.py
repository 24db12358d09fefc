"""Tasks while the bucket of media can't be reached: what is refused, what is delivered, and what it costs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from tests.app import Account, RunningApp, run_app
from tests.calls import bearer, failure, reason_of, upload_messages
from tests.driver import PROTOCOL, PROTOCOL_AND_STREAM
from tests.faults.tcp_proxy import TcpProxy
from tests.s3_server import any_server
from tests.tasks import TASK_BODIES, text_body

URL = {"response_format": "url"}
SPEECH = {"model": "eleven-labs-tts", "text": "Hi.", "voice": "adam"}
IMAGE = {**TASK_BODIES["image"], "model": "flux-1-schnell"}
BODY = pytest.mark.parametrize("body", [SPEECH, IMAGE], ids=["speech", "image"])


@pytest.fixture(name="way")
async def _way(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TcpProxy]:
    """The only way to the server of buckets. When it is closed, connections are refused, as without the server."""
    server = any_server()
    async with TcpProxy(server.port) as proxy:
        variables = {**server.variables, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture(name="app")
async def _app(way: TcpProxy, tmp_path: Path) -> AsyncIterator[RunningApp]:
    async with run_app(tmp_path, settings={"media": any_server().new_bucket()}) as app:
        yield app


async def assert_idle(app: RunningApp, caller: Account) -> None:
    """Asserts that nothing is reserved, and that the disk has no file."""
    await app.idle(caller, live=True)
    await app.assert_audit_clean()
    assert app.media() == set()


@PROTOCOL
@BODY
async def test_answers_have_links_while_the_bucket_works(
    app: RunningApp, protocol: str, body: dict[str, Any]
) -> None:
    caller = await app.account()
    for stream in (False, True):
        headers = {"Idempotency-Key": f"once-{stream}"}
        first = await app.ask(protocol, caller.live, {**body, **URL}, stream=stream, headers=headers)
        again = await app.ask(protocol, caller.live, {**body, **URL}, stream=not stream, headers=headers)
        assert (first.code, again.code) == ("ok", "ok")
        assert len(first.links) == len(again.links) == 1
    assert len(await app.records(caller, live=True)) == 2
    await assert_idle(app, caller)


@PROTOCOL_AND_STREAM
@BODY
async def test_an_answer_that_can_not_be_stored_is_delivered_without_a_link(
    app: RunningApp, way: TcpProxy, protocol: str, stream: bool, body: dict[str, Any]
) -> None:
    caller = await app.account()
    usual = await app.ask(protocol, caller.live, body, stream=stream)
    await way.close()
    response = await app.ask(protocol, caller.live, {**body, **URL}, stream=stream)
    assert (response.code, response.links) == ("ok", ())
    assert response.content == usual.content
    assert len(await app.records(caller, live=True)) == 2
    await assert_idle(app, caller)


@PROTOCOL
@BODY
async def test_an_answer_that_must_be_stored_costs_nothing_and_the_next_one_is_refused_before_the_provider(
    app: RunningApp, way: TcpProxy, protocol: str, body: dict[str, Any]
) -> None:
    caller = await app.account()
    await way.close()
    app.upstream.reset()
    headers = {"Idempotency-Key": "once"}
    response = await app.ask(protocol, caller.live, body, headers=headers)
    assert response.code == "store_unavailable"
    asked = len(app.upstream.requests)
    assert asked > 0
    for more in ({**body, **URL}, body):
        response = await app.ask(protocol, caller.live, more, headers=headers)
        assert response.code == "store_unavailable"
    assert len(app.upstream.requests) == asked
    assert (await app.ask(protocol, caller.live, text_body())).code == "ok"  # which stores nothing
    (record,) = await app.records(caller, live=True)
    assert record.task_type == "text"
    await assert_idle(app, caller)


async def test_uploads_are_refused_and_leave_nothing(app: RunningApp, way: TcpProxy) -> None:
    caller = await app.account()
    await way.close()
    messages = upload_messages(b"x" * 300_000, "audio/mpeg")
    error = await failure(
        MediaServiceStub(app.channel).UploadMedia(iter(messages), metadata=bearer(caller.live))
    )
    assert reason_of(error) == "store_unavailable"
    await assert_idle(app, caller)
