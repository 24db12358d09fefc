"""Uploads and answers above the storage limits, per account and in total, on every protocol."""

from __future__ import annotations

import base64
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from pomelo.gen.v1.media_service_pb2 import UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.testing import Speech
from tests.integration.asking import bearer, reason_of
from tests.integration.house import KINDS, WAYS, Caller, House, open_house

KIB, MIB = 1024, 1024 * 1024
EACH_PROTOCOL = pytest.mark.parametrize("protocol", WAYS)
SPEECH = {"model": "eleven-labs-tts", "text": "Hi.", "voice": "adam"}
URL, B64 = {"response_format": "url"}, {"response_format": "b64_json"}
IMAGE = {**KINDS["image"], "model": "flux-1-schnell"}


@pytest.fixture(scope="module", name="server")
async def _server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    limits = {"media_account_limit": 2 * MIB, "media_limit": 200 * MIB, "disk_reserve": 0}
    async with open_house(tmp_path_factory.mktemp("limits"), settings=limits) as server:
        yield server


async def upload(server: House, key: str, size: int) -> str:
    """Uploads `size` bytes over gRPC; returns the status and reason of an error, else an empty string."""
    chunks = [UploadMediaRequest(content_type="audio/mpeg")]
    chunks += [UploadMediaRequest(chunk=b"x" * min(100 * KIB, size - at)) for at in range(0, size, 100 * KIB)]
    try:
        await MediaServiceStub(server.channel).UploadMedia(iter(chunks), metadata=bearer(key))
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name} {reason_of(error)}"
    return ""


def media_of(server: House) -> set[Path]:
    """All files in the media folder."""
    return set((server.app.settings.data / "media").iterdir())


async def assert_idle(server: House, caller: Caller) -> None:
    """Asserts that the account has no reservation and no running task."""
    for live in (False, True):
        assert (await server.balance(caller, live=live)).held == 0
        assert await server.slots(caller, live=live) == 0


async def test_uploads_are_refused_at_the_limit_of_an_account_and_mode(server: House) -> None:
    caller, other = await server.caller(), await server.caller()
    for _ in range(4):
        assert await upload(server, caller.live, 512 * KIB) == ""
    before = media_of(server)
    assert await upload(server, caller.live, 1) == "RESOURCE_EXHAUSTED payload_too_large"
    form = {"model": "eleven-labs-stt", "audio": base64.b64encode(b"x" * 300 * KIB).decode()}
    for protocol in ("rest", "remote"):
        response = await server.ask(protocol, caller.live, form, form=True)
        assert (response.status, response.code) == (413, "payload_too_large")
        assert "2,097,152 bytes" in response.message
    assert media_of(server) == before
    assert await upload(server, caller.test, 2 * MIB) == ""
    assert await upload(server, other.live, 2 * MIB) == ""


@EACH_PROTOCOL
@pytest.mark.parametrize("body", [SPEECH, IMAGE], ids=["speech", "image"])
async def test_a_link_without_space_is_refused_without_a_request_to_the_provider(
    protocol: str, body: dict[str, Any], server: House
) -> None:
    caller = await server.caller()
    assert await upload(server, caller.live, 2 * MIB) == ""
    server.upstream.reset()
    before = media_of(server)
    for stream in (False, True):
        for headers in ({}, {"Idempotency-Key": "once"}):
            body_with_format = {**body, **(B64 if headers else URL)}
            response = await server.ask(
                protocol, caller.live, body_with_format, stream=stream, headers=headers
            )
            assert response.code == "payload_too_large"
            if protocol != "grpc":
                assert response.status == 413
    assert server.upstream.requests == []
    assert await server.records(caller) == []
    await assert_idle(server, caller)
    assert media_of(server) == before


@EACH_PROTOCOL
@pytest.mark.parametrize("body", [SPEECH, IMAGE], ids=["speech", "image"])
async def test_an_answer_that_need_not_be_stored_is_returned_inline(
    protocol: str, body: dict[str, Any], server: House
) -> None:
    caller, rich = await server.caller(), await server.caller()
    assert await upload(server, caller.live, 2 * MIB) == ""
    before = media_of(server)
    for body_with_format in (body, {**body, **B64}):
        response = await server.ask(protocol, caller.live, body_with_format)
        assert (response.code, response.links) == ("ok", ())
        assert response.content
    if body is SPEECH:
        response = await server.ask(protocol, caller.live, body, stream=True)
        assert response.done
        assert (response.code, response.links) == ("ok", ())
        assert response.content == (await server.ask(protocol, rich.live, body, stream=True)).content
        assert len(media_of(server) - before) == 1  # the other account's
    else:
        assert media_of(server) == before
    assert len(await server.records(caller, live=True)) == (3 if body is SPEECH else 2)
    assert all(record.cost > 0 for record in await server.records(caller))
    await assert_idle(server, caller)


@EACH_PROTOCOL
@pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])
@pytest.mark.parametrize("body_with_format", [URL, {}], ids=["url", "no format"])
async def test_audio_that_exceeds_the_storage_limit_is_still_delivered(
    protocol: str, stream: bool, body_with_format: dict[str, str], server: House
) -> None:
    caller = await server.caller()
    assert await upload(server, caller.live, 2 * MIB - 600 * KIB) == ""
    before = media_of(server)
    responses = {}
    for name, response_format in (("link", body_with_format), ("inline", B64)):
        server.upstream.reset()
        server.upstream.script(Speech(size=MIB))
        responses[name] = await server.ask(
            protocol, caller.live, {**SPEECH, **response_format}, stream=stream
        )
    assert (responses["link"].code, responses["link"].links) == ("ok", ())
    assert responses["link"].content == responses["inline"].content
    assert responses["link"].content.startswith(str(MIB)[:4])
    assert len(await server.records(caller, live=True)) == 2
    assert media_of(server) == before
    await assert_idle(server, caller)


@EACH_PROTOCOL
async def test_audio_that_can_neither_be_stored_nor_returned_inline_costs_nothing(
    protocol: str, server: House
) -> None:
    caller = await server.caller()
    assert await upload(server, caller.live, MIB) == ""
    before = media_of(server)
    for body_with_format, code in ((URL, "payload_too_large"), ({}, "payload_too_large"), (B64, "ok")):
        server.upstream.reset()
        server.upstream.script(Speech(size=4 * MIB))
        response = await server.ask(protocol, caller.live, {**SPEECH, **body_with_format})
        assert response.code == code, body_with_format
    assert [record.cost > 0 for record in await server.records(caller)] == [True]
    assert media_of(server) == before
    await assert_idle(server, caller)


@EACH_PROTOCOL
async def test_an_answer_for_an_idempotency_key_that_exceeds_the_storage_limit_costs_nothing(
    protocol: str, server: House
) -> None:
    caller = await server.caller()
    assert await upload(server, caller.live, MIB) == ""
    headers = {"Idempotency-Key": "once"}
    for size, code in ((2 * MIB, "payload_too_large"), (100 * KIB, "ok"), (100 * KIB, "ok")):
        server.upstream.reset()
        server.upstream.script(Speech(size=size))
        response = await server.ask(protocol, caller.live, SPEECH, headers=headers)
        assert response.code == code
    assert len(await server.records(caller)) == 1
    await assert_idle(server, caller)


async def test_answers_count_toward_the_limit_of_their_account_and_mode(server: House) -> None:
    caller = await server.caller()
    assert await upload(server, caller.test, 2 * MIB - 64 * KIB) == ""
    server.upstream.reset()
    before = media_of(server)
    links = 0
    while (response := await server.ask("grpc", caller.test, {**KINDS["image"], **URL})).links:
        links += 1
    assert response.code == "payload_too_large"
    stored = [path.stat().st_size for path in media_of(server) - before]
    assert len(stored) == links > 0
    assert 64 * KIB - 4 * 96 * 64 < sum(-(-size // 4096) * 4096 for size in stored) <= 64 * KIB
    assert (await server.ask("grpc", caller.live, {**IMAGE, **URL})).links


@EACH_PROTOCOL
async def test_without_space_for_media_tasks_that_store_nothing_run(protocol: str, tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    full = disk.f_bavail * disk.f_frsize + 2**40
    for limits in ({"media_limit": 1, "disk_reserve": 0}, {"disk_reserve": full}):
        async with open_house(tmp_path / f"{len(limits)}", settings=limits) as server:
            caller = await server.caller()
            assert await upload(server, caller.live, 100 * KIB) == "UNAVAILABLE store_unavailable"
            form = {"model": "eleven-labs-stt", "audio": base64.b64encode(b"x" * 100 * KIB).decode()}
            if protocol != "grpc":
                response = await server.ask(protocol, caller.live, form, form=True)
                assert (response.status, response.code) == (503, "store_unavailable")
                assert int(response.headers["retry-after"]) > 0
            for body in (SPEECH, IMAGE):
                response = await server.ask(protocol, caller.live, {**body, **URL})
                assert response.code == "store_unavailable"
                assert response.last.get("retry-after") or protocol == "grpc"
            for body in (*KINDS.values(), {**SPEECH, **B64}):
                response = await server.ask(protocol, caller.live, body)
                assert (response.code, response.links) == ("ok", ())
                assert response.content
            assert len(await server.records(caller, live=True)) == len(KINDS) + 1
            assert media_of(server) == set()
            await assert_idle(server, caller)
