"""The media of the remote services: uploads and downloads that end, fail or are cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from pomelo.app import App
from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.runtime.in_flight import InFlightLimits
from pomelo.service import Services
from tests.calls import call_of, error_parts, refusal
from tests.conftest import Keys
from tests.driver import STREAM
from tests.integration.both_ends import both_ends
from tests.waiting import cancel, until

CHUNK = 1024 * 1024


async def _chunks(data: list[bytes]) -> AsyncIterator[bytes]:
    for chunk in data:
        yield chunk


async def _download(services: Services, media_id: str, signature: str, call: Call) -> bytes:
    async with services.media.download_media(media_id, signature, call) as (_, chunks):
        return b"".join([chunk async for chunk in chunks])


async def test_media_are_uploaded_and_downloaded(remote: Services, keys: Keys) -> None:
    data = [b"ID3" + b"x" * 10, b"", b"y" * (3 * CHUNK + 1), b"z"]
    call = call_of(keys.test, x_request_id="mine")
    media = await remote.media.upload_media("audio/mpeg", _chunks(data), call)
    assert call.response_headers.pop("X-Credits-Remaining")
    call.response_headers.pop("X-Credits-Charged", None)
    assert call.response_headers == {"X-Request-Id": "mine", "X-Pomelo-Mode": "test"}
    assert (media.content_type, media.size_bytes) == ("audio/mpeg", sum(map(len, data)))
    call = call_of(keys.test, x_request_id="mine")
    async with remote.media.download_media(media.id, "", call) as (metadata, chunks):
        assert metadata.id == media.id
        assert call.response_headers["X-Request-Id"] == "mine"
        assert b"".join([chunk async for chunk in chunks]) == b"".join(data)
    for offset in (-5, 3 * CHUNK + 10):
        async with remote.media.download_media(media.id, "", call_of(keys.test), offset) as (_, chunks):
            assert [chunk async for chunk in chunks] == [b"".join(data)[offset:]]
    signature = media.url.partition("?")[2]
    assert await _download(remote, media.id, signature, call_of(None)) == b"".join(data)
    assert (await refusal(_download(remote, media.id, "", call_of(None)))).code == "invalid_api_key"
    assert (await refusal(_download(remote, "media_x", "", call_of(keys.test)))).code == "not_found"


async def test_a_signed_link_is_valid_with_an_invalid_header(remote: Services, app: App, keys: Keys) -> None:
    media = await remote.media.upload_media("audio/mpeg", _chunks([b"ID3"]), call_of(keys.test))
    for services in (app.services, remote):
        call = call_of(None, idempotency_key="two words")
        assert call.header_error is not None
        assert await _download(services, media.id, media.url.partition("?")[2], call) == b"ID3"


async def test_a_signed_link_replaces_the_key(remote: Services, app: App, keys: Keys) -> None:
    media = await remote.media.upload_media("audio/mpeg", _chunks([b"ID3"]), call_of(keys.test))
    signature = media.url.partition("?")[2]
    for services in (app.services, remote):
        for key in (keys.test, keys.revoked):
            call = call_of(key, x_request_id="mine")
            assert await _download(services, media.id, signature, call) == b"ID3"
            assert call.response_headers == {"X-Request-Id": "mine"}


async def test_a_download_that_is_closed_early_ends(app: App, keys: Keys) -> None:
    async with both_ends(app.services) as (server, remote):
        media = await remote.media.upload_media("", _chunks([b"x" * (8 * CHUNK)]), call_of(keys.test))
        async with remote.media.download_media(media.id, "", call_of(keys.test)) as (_, chunks):
            assert await anext(chunks)
        await server.running.idle()


class Source:
    """Chunks of an upload that count the reads, and may wait or fail."""

    def __init__(self, *, wait_after: int = 10**9, fail_after: int = 10**9) -> None:
        self.reads = 0
        self.waits = asyncio.Event()
        self._wait_after = wait_after
        self._fail_after = fail_after

    def __aiter__(self) -> Source:
        return self

    async def __anext__(self) -> bytes:
        self.reads += 1
        if self.reads > self._fail_after:
            raise PomeloError("invalid_body", "The body ends too soon")
        if self.reads > self._wait_after:
            self.waits.set()
            await asyncio.Event().wait()
        return b"x" * CHUNK


async def test_an_upload_with_an_invalid_key_reads_no_chunk(remote: Services, keys: Keys) -> None:
    for _ in range(20):
        source = Source()
        error = await refusal(remote.media.upload_media("audio/mpeg", source, call_of(keys.revoked)))
        assert error.code == "invalid_api_key"
        assert source.reads == 0


async def test_an_upload_that_is_too_large_gets_the_server_s_error(
    remote: Services, app: App, keys: Keys
) -> None:
    local_error = await refusal(app.services.media.upload_media("audio/mpeg", Source(), call_of(keys.test)))
    for _ in range(10):
        source = Source()
        error = await refusal(remote.media.upload_media("audio/mpeg", source, call_of(keys.test)))
        assert error_parts(error) == error_parts(local_error)
        assert source.reads < 60


async def test_a_refusal_ends_the_wait_for_the_next_chunk(remote: Services, keys: Keys) -> None:
    source = Source(wait_after=51)
    async with asyncio.timeout(20):
        error = await refusal(remote.media.upload_media("audio/mpeg", source, call_of(keys.test)))
    assert error.code == "payload_too_large"


@pytest.mark.parametrize("fail_after", [0, 1, 5])
async def test_an_error_of_the_chunks_is_raised_and_nothing_is_stored(
    fail_after: int, app: App, keys: Keys
) -> None:
    folder = app.settings.data / "media"
    before = set(folder.iterdir())
    async with both_ends(app.services) as (server, remote):
        source = Source(fail_after=fail_after)
        error = await refusal(remote.media.upload_media("audio/mpeg", source, call_of(keys.test)))
        assert (error.code, error.message) == ("invalid_body", "The body ends too soon")
        await server.running.idle()
    assert set(folder.iterdir()) == before


async def test_a_time_limit_of_the_chunks_is_raised_and_nothing_is_stored(app: App, keys: Keys) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"abc"
        raise TimeoutError("of the disk")

    folder = app.settings.data / "media"
    before = set(folder.iterdir())
    async with both_ends(app.services) as (server, remote):
        with pytest.raises(TimeoutError, match="of the disk"):
            await remote.media.upload_media("audio/mpeg", chunks(), call_of(keys.test))
        await server.running.idle()
    assert set(folder.iterdir()) == before


async def test_a_cancelled_upload_is_cancelled_at_the_server(app: App, keys: Keys) -> None:
    folder = app.settings.data / "media"
    before = set(folder.iterdir())
    async with both_ends(app.services) as (server, remote):
        source = Source(wait_after=3)
        uploading = asyncio.ensure_future(remote.media.upload_media("audio/mpeg", source, call_of(keys.test)))
        await source.waits.wait()
        await cancel(uploading)
        await server.running.idle()
    assert set(folder.iterdir()) == before


@pytest.mark.usefixtures("no_garbage_collection")
async def test_cancelled_uploads_leak_no_stream_of_the_connection(app: App, keys: Keys) -> None:
    async with both_ends(app.services, connection_streams=5) as (_, remote):
        for wait_after in (0, 1, 3) * 5:
            source = Source(wait_after=wait_after)
            upload = remote.media.upload_media("audio/mpeg", source, call_of(keys.test))
            uploading = asyncio.ensure_future(upload)
            await source.waits.wait()
            await cancel(uploading)
        assert await remote.media.upload_media("", _chunks([b"x"]), call_of(keys.test))


async def test_an_upload_s_deadline_applies_while_it_waits_for_chunks(remote: Services, keys: Keys) -> None:
    source = Source(wait_after=1)
    async with asyncio.timeout(20):
        call = call_of(keys.test, 0.3)
        error = await refusal(remote.media.upload_media("audio/mpeg", source, call))
    assert error_parts(error) == error_parts(PomeloError("deadline_exceeded"))


@STREAM
async def test_the_upload_of_a_task_that_the_server_has_not_read_is_deleted(
    remote: Services, app: App, keys: Keys, stream: bool
) -> None:
    call, spec = call_of(keys.test), TaskSpec(model="eleven-labs-stt")
    media = await remote.media.upload_media("audio/mpeg", _chunks([b"ID3"]), call)
    spec.speech_to_text.audio.media_id = media.id
    in_flight = app.services.access._access.in_flight  # type: ignore[attr-defined]
    limits, in_flight.limits = in_flight.limits, InFlightLimits(calls=0)
    if stream:
        error = await refusal(remote.tasks.stream_task(spec, TaskOptions(), call).__aenter__())
    else:
        error = await refusal(remote.tasks.run_task(spec, TaskOptions(), call))
    assert error.code == "overloaded"
    in_flight.limits = limits
    file = app.settings.data / "media" / media.id
    assert file.exists()
    call.end()
    await until(lambda: not file.exists())
