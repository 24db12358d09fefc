"""Uploads and downloads: their limits, their deadlines and their lifetimes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from pomelo.call import Call, Principal
from pomelo.errors import PomeloError
from pomelo.media.local import LocalMedia
from pomelo.media.reader import FileReader
from pomelo.media.store import MediaStore
from pomelo.runtime.turns import Turns
from tests.calls import call_of
from tests.unit.media.files import PNG, Access, names, put
from tests.unit.refusals import refused


def service(store: MediaStore, upload_limit: int = 10**6) -> LocalMedia:
    return LocalMedia(store, Access(), upload_limit, turns=Turns())


def hurried(protocol: str = "rest") -> Call:
    """A call with a deadline after 0.05 s."""
    return Call.from_headers({"x-request-timeout": "0.05"}.get, protocol=protocol)


async def three_chunks(size: int) -> AsyncIterator[bytes]:
    for _ in range(3):
        yield b"x" * size


async def test_an_upload_above_the_limit_is_refused_and_deleted(store: MediaStore) -> None:
    media_service = service(store, 2_500_000)
    for size in (1_000_000, 833_334):  # the latter are two bytes too many
        with refused("payload_too_large"):
            await media_service.upload_media("audio/mpeg", three_chunks(size), call_of(None))
        assert names(store) == []
    media = await service(store, 2_400_000).upload_media("audio/mpeg", three_chunks(800_000), call_of(None))
    assert media.size_bytes == 2_400_000
    async with media_service.download_media(media.id, "", call_of(None)) as (found, chunks):
        assert found.size_bytes == sum([len(chunk) async for chunk in chunks])


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
async def test_an_empty_upload_is_refused_and_deleted(store: MediaStore, protocol: str) -> None:
    call = call_of(None)
    call.protocol = protocol
    with refused("invalid_parameter", "audio", "must be a file of at least one byte"):
        await service(store).upload_media("audio/mpeg", three_chunks(0), call)
    assert names(store) == []


async def test_an_upload_that_is_not_shared_by_its_deadline_is_refused_and_deleted(store: MediaStore) -> None:
    async def stalled(media_id: str, owner: str, lifetime: float | None = None) -> None:
        await asyncio.Event().wait()

    store.share = stalled  # type: ignore[method-assign]
    with refused("deadline_exceeded"):
        await asyncio.wait_for(
            service(store).upload_media("audio/mpeg", three_chunks(1), hurried("grpc")), 20
        )
    assert names(store) == []


@pytest.mark.parametrize(("protocol", "checked"), [("grpc", True), ("rest", False)])
async def test_the_key_of_a_grpc_upload_is_checked_again_at_its_end_and_that_of_rest_by_its_task(
    store: MediaStore, protocol: str, checked: bool
) -> None:
    class Revoked(Access):
        async def authenticate(self, call: Call) -> Principal:
            raise PomeloError("invalid_api_key")

    call = call_of(None)
    call.protocol = protocol
    uploading = LocalMedia(store, Revoked(), turns=Turns()).upload_media("", three_chunks(1), call)
    with refused("invalid_api_key") if checked else nullcontext():
        await uploading
    assert bool(names(store)) is not checked


async def test_media_are_downloaded_by_their_owner_or_with_a_link(store: MediaStore) -> None:
    mine, other = put(store, "ann/test", b"0123456789"), put(store, "bob/test")
    signature = store.find(other, None)[1].url.partition("?")[2]
    async with service(store).download_media(other, signature, call_of(None)) as (found, chunks):
        assert (found.id, b"".join([chunk async for chunk in chunks])) == (other, PNG)
    wrong = "The link is wrong or has expired"
    for media_id, query, message in (
        (other, "", None),
        (mine, signature, wrong),
        (other, f"{signature}0", wrong),
    ):
        with refused("not_found", match=message):
            async with service(store).download_media(media_id, query, call_of(None)):
                pass
    for offset, rest in (
        (5, b"56789"),
        (10, b""),
        (2**62, b""),
        (-1, b"9"),
        (-10, b"0123456789"),
        (-(2**63), b"0123456789"),
    ):
        async with service(store).download_media(mine, "", call_of(None), offset) as (found, chunks):
            assert found.size_bytes == 10
            assert b"".join([chunk async for chunk in chunks]) == rest


async def test_a_download_names_its_file_takes_turns_and_closes_the_file(store: MediaStore) -> None:
    turns = Turns()
    media_service = LocalMedia(store, Access(), turns=turns)
    with refused("missing_parameter", "id"):
        async with media_service.download_media("", "", call_of(None)):
            pass
    media_id = put(store, "ann/test", b"x" * 10**6)
    path = os.fspath(store.folder / media_id)
    async with media_service.download_media(media_id, "", call_of(None)) as (_, chunks):
        waits = 0
        async for _ in chunks:
            waits += turns.iteration  # it grows only if streams wait for turns
            await asyncio.sleep(0.01)  # longer than a turn
        assert waits
        assert path in open_paths()
    assert path not in open_paths()


def open_paths() -> list[str]:
    """The paths of the files that this process has open."""
    found = []
    for each in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the descriptor by which they are listed
            found.append(str(each.readlink()))
    return found


async def test_a_stalled_upload_ends_at_the_deadline(store: MediaStore) -> None:
    async def stalled() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    with refused("deadline_exceeded"):
        await asyncio.wait_for(service(store).upload_media("audio/mpeg", stalled(), hurried()), 20)
    assert names(store) == []


@pytest.mark.parametrize(("protocol", "min_seconds", "max_seconds"), [("rest", 45, 51), ("grpc", 3590, 3601)])
async def test_a_rest_upload_ends_with_its_request_and_a_grpc_upload_does_not(
    tmp_path: Path, protocol: str, min_seconds: int, max_seconds: int
) -> None:
    store = MediaStore(tmp_path / "media", b"s" * 32)
    call = Call.from_headers({"x-request-timeout": "20"}.get, protocol=protocol)
    media = await service(store).upload_media("audio/mpeg", three_chunks(10), call)
    assert min_seconds < media.expire_time.seconds - time.time() + 1 <= max_seconds + 1
    path, found = store.find(media.id, "ann/test")
    assert found.expire_time.seconds == media.expire_time.seconds
    call.end()
    assert path.exists() == (protocol == "grpc")
    call.end()


async def test_a_stalled_download_ends_at_the_deadline(store: MediaStore) -> None:
    media_id = put(store, "ann/test", PNG * 10_000)

    async def stalled() -> None:
        async with service(store).download_media(media_id, "", hurried("grpc")) as (_, chunks):
            async for _ in chunks:
                await asyncio.Event().wait()  # the reader stalls

    with refused("deadline_exceeded"):
        await asyncio.wait_for(stalled(), 20)


async def test_a_file_that_can_not_be_read_is_store_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123")
    with FileReader(path) as reader:
        with refused("store_unavailable"):
            reader.skip(-1)
        reader.skip(1)
        assert (await reader.read(2), await reader.read(2), await reader.read(2)) == (b"12", b"3", b"")
    with FileReader(Path("/proc/self/mem")) as reader, refused("store_unavailable"):
        await reader.read(1)  # nothing is at its beginning
