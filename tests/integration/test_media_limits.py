"""Media storage limits, per account and in total: uploads and answers over the limit, by every protocol."""

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
from tests.app import Account, RunningApp, run_app
from tests.calls import bearer, reason_of
from tests.driver import PROTOCOLS
from tests.tasks import TASK_BODIES

KIB, MIB = 1024, 1024 * 1024
WAY = pytest.mark.parametrize("way", PROTOCOLS)
SHORT = {"model": "eleven-labs-tts", "text": "Hi.", "voice": "adam"}
URL, B64 = {"response_format": "url"}, {"response_format": "b64_json"}
PICTURE = {**TASK_BODIES["image"], "model": "flux-1-schnell"}


@pytest.fixture(scope="module", name="house")
async def _house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    limits = {"media_account_limit": 2 * MIB, "media_limit": 200 * MIB, "disk_reserve": 0}
    async with run_app(tmp_path_factory.mktemp("limits"), settings=limits) as opened:
        yield opened


async def upload(house: RunningApp, key: str, size: int) -> str:
    """Uploads so many bytes over gRPC; the error's reason, or nothing."""
    pieces = [UploadMediaRequest(content_type="audio/mpeg")]
    pieces += [UploadMediaRequest(chunk=b"x" * min(100 * KIB, size - at)) for at in range(0, size, 100 * KIB)]
    try:
        await MediaServiceStub(house.channel).UploadMedia(iter(pieces), metadata=bearer(key))
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name} {reason_of(error)}"
    return ""


def media_of(house: RunningApp) -> set[Path]:
    """All files in the media folder."""
    return set((house.server.settings.data / "media").iterdir())


async def free(house: RunningApp, caller: Account) -> None:
    """Asserts that the account has no reservation and no running task."""
    for live in (False, True):
        assert (await house.balance(caller, live=live)).held == 0
        assert await house.concurrency(caller, live=live) == 0


async def test_uploads_end_at_the_limit_of_an_account_and_mode(house: RunningApp) -> None:
    caller, other = await house.account(), await house.account()
    for _ in range(4):
        assert await upload(house, caller.live, 512 * KIB) == ""
    before = media_of(house)
    assert await upload(house, caller.live, 1) == "RESOURCE_EXHAUSTED payload_too_large"
    form = {"model": "eleven-labs-stt", "audio": base64.b64encode(b"x" * 300 * KIB).decode()}
    for way in ("rest", "remote"):
        told = await house.ask(way, caller.live, form, form=True)
        assert (told.status, told.code) == (413, "payload_too_large")
        assert "2,097,152 bytes" in told.message
    assert media_of(house) == before
    assert await upload(house, caller.test, 2 * MIB) == ""
    assert await upload(house, other.live, 2 * MIB) == ""


@WAY
@pytest.mark.parametrize("body", [SHORT, PICTURE], ids=["speech", "image"])
async def test_a_link_that_has_no_room_is_refused_before_the_provider_is_asked(
    way: str, body: dict[str, Any], house: RunningApp
) -> None:
    caller = await house.account()
    assert await upload(house, caller.live, 2 * MIB) == ""
    house.upstream.reset()
    before = media_of(house)
    for stream in (False, True):
        for headers in ({}, {"Idempotency-Key": "once"}):
            asked = {**body, **(B64 if headers else URL)}
            told = await house.ask(way, caller.live, asked, stream=stream, headers=headers)
            assert told.code == "payload_too_large"
            if way != "grpc":
                assert told.status == 413
    assert house.upstream.requests == []
    assert await house.records(caller) == []
    await free(house, caller)
    assert media_of(house) == before


@WAY
@pytest.mark.parametrize("body", [SHORT, PICTURE], ids=["speech", "image"])
async def test_an_answer_that_need_not_be_stored_goes_back_inline(
    way: str, body: dict[str, Any], house: RunningApp
) -> None:
    caller, rich = await house.account(), await house.account()
    assert await upload(house, caller.live, 2 * MIB) == ""
    before = media_of(house)
    for asked in (body, {**body, **B64}):
        told = await house.ask(way, caller.live, asked)
        assert (told.code, told.links) == ("ok", ())
        assert told.content
    if body is SHORT:
        told = await house.ask(way, caller.live, body, stream=True)
        assert told.done
        assert (told.code, told.links) == ("ok", ())
        assert told.content == (await house.ask(way, rich.live, body, stream=True)).content
        assert len(media_of(house) - before) == 1  # the other account's
    else:
        assert media_of(house) == before
    assert len(await house.records(caller, live=True)) == (3 if body is SHORT else 2)
    assert all(record.cost > 0 for record in await house.records(caller))
    await free(house, caller)


@WAY
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("asked", [URL, {}], ids=["url", "unasked"])
async def test_audio_that_outgrows_its_room_is_still_delivered(
    way: str, stream: bool, asked: dict[str, str], house: RunningApp
) -> None:
    caller = await house.account()
    assert await upload(house, caller.live, 2 * MIB - 600 * KIB) == ""
    before = media_of(house)
    told = {}
    for name, wanted in (("link", asked), ("inline", B64)):
        house.upstream.reset()
        house.upstream.script(Speech(size=MIB))
        told[name] = await house.ask(way, caller.live, {**SHORT, **wanted}, stream=stream)
    assert (told["link"].code, told["link"].links) == ("ok", ())
    assert told["link"].content == told["inline"].content
    assert told["link"].content.startswith(str(MIB)[:4])
    assert len(await house.records(caller, live=True)) == 2
    assert media_of(house) == before
    await free(house, caller)


@WAY
async def test_audio_that_can_neither_be_stored_nor_returned_inline_costs_nothing(
    way: str, house: RunningApp
) -> None:
    caller = await house.account()
    assert await upload(house, caller.live, MIB) == ""
    before = media_of(house)
    for asked, code in ((URL, "payload_too_large"), ({}, "payload_too_large"), (B64, "ok")):
        house.upstream.reset()
        house.upstream.script(Speech(size=4 * MIB))
        told = await house.ask(way, caller.live, {**SHORT, **asked})
        assert told.code == code, asked
    assert [record.cost > 0 for record in await house.records(caller)] == [True]
    assert media_of(house) == before
    await free(house, caller)


@WAY
async def test_an_answer_for_an_idempotency_key_that_outgrows_its_room_costs_nothing(
    way: str, house: RunningApp
) -> None:
    caller = await house.account()
    assert await upload(house, caller.live, MIB) == ""
    headers = {"Idempotency-Key": "once"}
    for size, code in ((2 * MIB, "payload_too_large"), (100 * KIB, "ok"), (100 * KIB, "ok")):
        house.upstream.reset()
        house.upstream.script(Speech(size=size))
        told = await house.ask(way, caller.live, SHORT, headers=headers)
        assert told.code == code
    assert len(await house.records(caller)) == 1
    await free(house, caller)


async def test_answers_count_for_the_account_and_mode_that_asked(house: RunningApp) -> None:
    caller = await house.account()
    assert await upload(house, caller.test, 2 * MIB - 64 * KIB) == ""
    house.upstream.reset()
    before = media_of(house)
    links = 0
    while (told := await house.ask("grpc", caller.test, {**TASK_BODIES["image"], **URL})).links:
        links += 1
    assert told.code == "payload_too_large"
    stored = [path.stat().st_size for path in media_of(house) - before]
    assert len(stored) == links > 0
    assert 64 * KIB - 4 * 96 * 64 < sum(-(-size // 4096) * 4096 for size in stored) <= 64 * KIB
    assert (await house.ask("grpc", caller.live, {**PICTURE, **URL})).links


@WAY
async def test_when_all_media_or_the_disk_have_no_room_tasks_that_store_nothing_run(
    way: str, tmp_path: Path
) -> None:
    disk = os.statvfs(tmp_path)
    full = disk.f_bavail * disk.f_frsize + 2**40
    for limits in ({"media_limit": 1, "disk_reserve": 0}, {"disk_reserve": full}):
        async with run_app(tmp_path / f"{len(limits)}", settings=limits) as house:
            caller = await house.account()
            assert await upload(house, caller.live, 100 * KIB) == "UNAVAILABLE store_unavailable"
            form = {"model": "eleven-labs-stt", "audio": base64.b64encode(b"x" * 100 * KIB).decode()}
            if way != "grpc":
                told = await house.ask(way, caller.live, form, form=True)
                assert (told.status, told.code) == (503, "store_unavailable")
                assert int(told.headers["retry-after"]) > 0
            for body in (SHORT, PICTURE):
                told = await house.ask(way, caller.live, {**body, **URL})
                assert told.code == "store_unavailable"
                assert told.metadata.get("retry-after") or way == "grpc"
            for body in (*TASK_BODIES.values(), {**SHORT, **B64}):
                told = await house.ask(way, caller.live, body)
                assert (told.code, told.links) == ("ok", ())
                assert told.content
            assert len(await house.records(caller, live=True)) == len(TASK_BODIES) + 1
            assert media_of(house) == set()
            await free(house, caller)
