"""The images of a text task that are files: whose they are, how large, and what the provider gets of them."""

from __future__ import annotations

import asyncio
import base64
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pomelo.gen.v1.media_pb2 import MediaSource
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.testing import Answer as Words
from tests.calls import call_of
from tests.tasks import text_task
from tests.unit.engine.apps import PROTOCOL, STREAM, Account, EngineApp

MIB = 1024 * 1024
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(64))
FIELD = "messages[0].content[1].image_url"


async def file(
    engine: EngineApp, account: Account, data: bytes = PNG, content_type: str = "image/png"
) -> str:
    """Stores a file as a gRPC caller does; returns its id."""
    return await engine.upload(account, data, content_type, protocol="grpc")


def path_of(engine: EngineApp, media_id: str) -> Path:
    return engine.app.settings.data / "media" / media_id


def task(*sources: MediaSource) -> TaskSpec:
    """A conversation of one message: a text, then the images."""
    spec = text_task("Which of them?")
    for source in sources:
        spec.text.messages[0].content.add().image.source.CopyFrom(source)
    return spec


@STREAM
@PROTOCOL
async def test_an_image_is_the_same_task_and_the_same_request_to_the_provider_wherever_it_is(
    engine: EngineApp, protocol: str, stream: bool
) -> None:
    account = await engine.account()
    encoded = base64.b64encode(PNG).decode()
    sources = [
        MediaSource(media_id=await file(engine, account)),
        MediaSource(media_id=await file(engine, account, content_type="")),
        MediaSource(data=PNG),
        MediaSource(data=PNG, content_type="audio/mpeg"),
        MediaSource(url=f"data:image/jpeg;base64,{encoded.rstrip('=')}"),
    ]
    answers = [
        await engine.ask(
            account, task(one), stream=stream, protocol=protocol, headers={"idempotency-key": "image"}
        )
        for one in sources
    ]
    assert [answer.code for answer in answers] == ["ok"] * 5
    assert ["Idempotent-Replayed" in answer.call.response_headers for answer in answers] == [False] + [
        True
    ] * 4
    for one in sources:
        assert (await engine.ask(account, task(one), stream=stream, protocol=protocol)).code == "ok"
    assert len(engine.upstream.requests) == 6
    bodies = [request.body for request in engine.upstream.requests]
    assert all(body == bodies[0] for body in bodies)
    assert bodies[0]["messages"][0]["content"][1]["image_url"]["url"] == f"data:image/png;base64,{encoded}"
    mismatch = await engine.ask(
        account,
        task(MediaSource(data=PNG + b"!")),
        stream=stream,
        protocol=protocol,
        headers={"idempotency-key": "image"},
    )
    assert mismatch.code == "idempotency_mismatch"


async def _of_another_account(engine: EngineApp, account: Account) -> str:
    return await file(engine, await engine.account())


async def _of_the_other_mode(engine: EngineApp, account: Account) -> str:
    key = (await engine.app.keyring.create(account.wallet.account, live=False))[1]
    return await file(engine, Account(key, account.wallet))


async def _expired(engine: EngineApp, account: Account) -> str:
    media_id = await file(engine, account)
    path = path_of(engine, media_id)
    os.utime(path, (time.time() - 3601,) * 2)
    return media_id


async def _deleted(engine: EngineApp, account: Account) -> str:
    media_id = await file(engine, account)
    path_of(engine, media_id).unlink()
    return media_id


async def _not_an_image(engine: EngineApp, account: Account) -> str:
    return await file(engine, account, b"OggS" + bytes(100))


async def _never_stored(engine: EngineApp, account: Account) -> str:
    return "media_1"


@STREAM
@PROTOCOL
@pytest.mark.parametrize(
    "make",
    [_of_another_account, _of_the_other_mode, _expired, _deleted, _not_an_image, _never_stored],
    ids=lambda make: make.__name__.strip("_"),
)
async def test_a_file_that_is_not_an_image_of_the_account_is_refused(
    engine: EngineApp, make: Callable[..., object], protocol: str, stream: bool
) -> None:
    account = await engine.account("limited")
    made = make(engine, account)
    assert asyncio.iscoroutine(made)
    spec = task(MediaSource(media_id=await made, content_type="image/png"))
    answer = await engine.ask(account, spec, stream=stream, protocol=protocol)
    assert answer.error is not None
    assert (answer.code, answer.error.field) == ("invalid_parameter", FIELD)
    assert not engine.upstream.requests
    assert (await engine.used(account)).requests == 0


async def test_the_files_of_a_task_have_up_to_eight_mebibytes_in_all(engine: EngineApp) -> None:
    account = await engine.account(live=False)
    halves = [await file(engine, account, PNG.ljust(4 * MIB, b"\0")) for _ in range(2)]
    small = await file(engine, account)
    inline = MediaSource(data=PNG)
    sources = [MediaSource(media_id=one) for one in halves]
    assert (await engine.ask(account, task(*sources, inline))).code == "ok"
    for more in (small, halves[0]):
        answer = await engine.ask(account, task(*sources, inline, MediaSource(media_id=more)))
        assert answer.error is not None
        assert (answer.code, answer.error.field) == ("payload_too_large", "messages[0].content[4].image_url")
        assert "8,388,608 bytes in all" in answer.error.message


async def test_a_file_is_read_once_for_each_task_however_many_parts_name_it(
    engine: EngineApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = await engine.account()
    media_id = await file(engine, account)
    read: list[Path] = []
    read_bytes = Path.read_bytes

    def noted(path: Path) -> bytes:
        read.append(path)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", noted)
    for times in (1, 2):
        answer = await engine.ask(account, task(*[MediaSource(media_id=media_id)] * 50))
        assert answer.code == "ok"
        assert read == [path_of(engine, media_id)] * times
    parts = engine.upstream.requests[-1].body["messages"][0]["content"]
    assert len({part["image_url"]["url"] for part in parts[1:]}) == 1
    assert len(parts) == 51


async def test_a_file_can_be_used_by_several_tasks_and_stays(engine: EngineApp) -> None:
    account = await engine.account()
    media_id = await file(engine, account)
    for protocol in ("grpc", "rest"):
        answer = await engine.ask(account, task(MediaSource(media_id=media_id)), protocol=protocol)
        assert answer.code == "ok"
    assert media_id in engine.media()


async def test_a_generated_image_can_be_sent_back(engine: EngineApp) -> None:
    account = await engine.account()
    drawn = await engine.ask(account, {"model": "flux-1-pro", "prompt": "A kite", "response_format": "url"})
    (image,) = drawn.events[0].image.images
    engine.upstream.reset()
    engine.upstream.script(Words("A kite"))
    assert (await engine.ask(account, task(MediaSource(media_id=image.media.id)))).code == "ok"
    (request,) = engine.upstream.requests
    sent = request.body["messages"][0]["content"][1]["image_url"]["url"]
    assert base64.b64decode(sent.partition(",")[2]) == path_of(engine, image.media.id).read_bytes()


async def test_a_file_that_can_not_be_read_is_reported_as_store_unavailable(engine: EngineApp) -> None:
    account = await engine.account()
    media_id = await file(engine, account)
    path_of(engine, media_id).unlink()
    path_of(engine, media_id).mkdir()
    try:
        assert (await engine.ask(account, task(MediaSource(media_id=media_id)))).code == "store_unavailable"
    finally:
        path_of(engine, media_id).rmdir()


async def test_other_tasks_run_while_a_file_is_read(engine: EngineApp) -> None:
    account = await engine.account()
    media_id = await file(engine, account)
    path = path_of(engine, media_id)
    path.unlink()
    os.mkfifo(path)  # a file whose reader waits for a writer
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0.01)
            beats += 1

    beating = asyncio.create_task(beat())
    writer = threading.Timer(0.5, path.write_bytes, [PNG])
    writer.start()
    try:
        assert (await engine.ask(account, task(MediaSource(media_id=media_id)))).code == "ok"
    finally:
        beating.cancel()
        writer.join()
        path.unlink()
    assert beats >= 10


async def test_the_files_of_a_refused_task_are_counted(engine: EngineApp) -> None:
    account = await engine.account()
    good = MediaSource(media_id=await file(engine, account))
    answer = await engine.ask(account, task(good, MediaSource(media_id="media_1")))
    assert (answer.code, answer.call.file_bytes) == ("invalid_parameter", len(PNG))


async def test_files_count_as_buffered_by_their_call_as_often_as_they_are_named(engine: EngineApp) -> None:
    account = await engine.account()
    source = MediaSource(media_id=await file(engine, account))
    call = call_of(account.key)
    reserved: list[int] = []
    call.reserve = reserved.append
    await engine.app.services.tasks.run_task(task(source, source), TaskOptions(), call)
    assert reserved == [2 * len(PNG)] == [call.file_bytes]
