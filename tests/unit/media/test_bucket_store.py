"""Media in a bucket, which several machines share. The bucket is on a real S3 server."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pomelo.media.bucket import Bucket, MissingFileError, StoredFile
from pomelo.media.bucket_store import BucketStore
from tests.calls import call_of
from tests.s3_server import S3Server
from tests.unit.media.buckets import MIB, chunks_of, grpc_call, keys, service, upload
from tests.unit.media.files import PNG, Clock, names, put
from tests.unit.refusals import refused
from tests.waiting import cancel, until

LARGE = os.urandom(MIB) * 12
"""More than a part of an upload, and more than what one request reads."""


async def download(store: BucketStore, media_id: str, query: str = "", skip: int = 0) -> bytes:
    async with service(store).download_media(media_id, query, call_of(None), skip) as (_, chunks):
        return b"".join([chunk async for chunk in chunks])


@pytest.mark.parametrize("data", [PNG, LARGE], ids=["small", "in_parts"])
async def test_an_upload_on_one_machine_is_read_on_another(
    machine: Callable[..., BucketStore], data: bytes
) -> None:
    first, second = machine("a"), machine("b")
    media_id = await upload(first, data)
    assert names(first) == []
    async with service(second).download_media(media_id, "", call_of(None)) as (media, chunks):
        assert (media.id, media.content_type, media.size_bytes) == (media_id, "image/png", len(data))
        received = [chunk async for chunk in chunks]
    assert b"".join(received) == data
    assert max(map(len, received)) <= 256 * 1024
    assert names(second) == []


@pytest.mark.parametrize("start", [1, 512 * 1024 - 1, 512 * 1024, 5 * MIB + 7, len(LARGE) - 1, len(LARGE)])
async def test_a_range_is_read_without_what_is_before_it(
    machine: Callable[..., BucketStore], start: int
) -> None:
    media_id = await upload(machine("a"), LARGE)
    assert await download(machine("b"), media_id, skip=start) == LARGE[start:]


async def test_a_link_of_one_machine_is_valid_on_another_with_the_same_secret(
    machine: Callable[..., BucketStore],
) -> None:
    first, second, unknown = machine("a"), machine("b"), machine("c", secret=b"t" * 32)
    media = await service(first).upload_media("image/png", chunks_of(PNG), grpc_call())
    query = media.url.partition("?")[2]
    assert media.url.startswith("https://pomelo.test/media/")
    assert await download(second, media.id, query) == PNG
    with refused("not_found"):
        await download(unknown, media.id, query)


async def test_media_of_another_owner_are_not_found_on_any_machine(
    machine: Callable[..., BucketStore],
) -> None:
    first, second = machine("a"), machine("b")
    media_id = put(first, "bob/test")
    await first.share(media_id, "bob/test")
    call = grpc_call()
    for store in (first, second):
        with refused("not_found"):
            await download(store, media_id)
        await store.fetch(media_id, "ann/test", call)
        with refused("not_found"):
            store.find(media_id, "ann/test")
    assert call.at_end == []


async def test_a_file_that_a_task_reads_is_on_the_disk_until_the_last_call_that_uses_it_ends(
    machine: Callable[..., BucketStore],
) -> None:
    media_id = await upload(machine("a"), LARGE)
    store, calls = machine("b"), [grpc_call() for _ in range(3)]
    await asyncio.gather(*[store.fetch(media_id, "ann/test", call) for call in calls])
    path, media = store.find(media_id, "ann/test")
    assert path.read_bytes() == LARGE
    assert media.size_bytes == len(LARGE)
    assert names(store) == [path.name]
    with refused("not_found"):
        store.find(media_id, "bob/test")
    for call in calls:
        assert path.exists()
        call.end()
    assert names(store) == []
    with refused("not_found"):
        store.find(media_id, "ann/test")


async def test_calls_that_need_a_file_at_the_same_time_share_one_copy(
    machine: Callable[..., BucketStore], url: str
) -> None:
    class Counting(Bucket):
        begun = 0

        async def begin(self, key: str, size: int) -> tuple[StoredFile, bytes]:
            self.begun += 1
            return await super().begin(key, size)

    media_id, bucket = await upload(machine("a")), Counting(url)
    store, calls = machine("b"), [grpc_call() for _ in range(3)]
    store._bucket = bucket
    await asyncio.gather(*[store.fetch(media_id, "ann/test", call) for call in calls])
    assert bucket.begun == 1
    for call in calls:
        call.end()


async def test_a_copy_stays_while_calls_use_it_however_long_the_first_one_has_ended(
    machine: Callable[..., BucketStore], clock: Clock
) -> None:
    media_id = await upload(machine("a"))
    store, last = machine("b"), grpc_call()
    await store.fetch(media_id, "ann/test", last)
    for _ in range(5):
        clock.ahead += 500
        call = grpc_call()
        await store.fetch(media_id, "ann/test", call)
        last.end()
        last = call
        await store.refresh()
        assert store.find(media_id, "ann/test")[0].read_bytes() == PNG
    last.end()
    assert names(store) == []


async def test_a_call_that_waits_for_a_copy_in_vain_releases_it(machine: Callable[..., BucketStore]) -> None:
    store, calls = machine("a"), [grpc_call(), call_of(None, timeout=-1.0)]
    media_id = await upload(store)
    await store.fetch(media_id, "ann/test", calls[0])
    async with store._copies[media_id].lock:  # as while a call makes the copy again
        with refused("deadline_exceeded"):
            await store.fetch(media_id, "ann/test", calls[1])
    for call in calls:
        call.end()
    assert (names(store), store._copies) == ([], {})


async def test_a_copy_leaves_the_disk_reserve_free(machine: Callable[..., BucketStore]) -> None:
    media_id = await upload(machine("a"))
    store, call = machine("b", reserve=2**62), grpc_call()
    with refused("store_unavailable"):
        await store.fetch(media_id, "ann/test", call)
    call.end()
    assert names(store) == []


async def test_a_file_in_the_bucket_and_on_the_disk_counts_once(machine: Callable[..., BucketStore]) -> None:
    store = machine("a")
    media_id = await upload(store)
    (store.folder / media_id).write_bytes(PNG)  # as while it is sent
    await store.refresh()
    assert store.quota.total == 4096


async def test_media_expire_on_all_machines_and_any_machine_deletes_them(
    machine: Callable[..., BucketStore], url: str, clock: Clock
) -> None:
    first, second = machine("a"), machine("b")
    short, kept = await upload(first), put(first, "ann/test")
    await first.share(kept, "ann/test", 3600)
    clock.ahead = 61
    with refused("not_found"):
        await download(second, short)
    assert await download(second, kept) == PNG
    clock.ahead = 600  # an id is made up to a call's maximum duration before its file is complete
    assert await second.refresh() == 0
    clock.ahead = 661
    assert await second.refresh() == 1
    assert [key.partition("/")[0] for key in keys(url)] == ["day"]
    assert await download(second, kept) == PNG
    clock.ahead = 3601
    with refused("not_found"):
        await download(second, kept)
    clock.ahead = 26 * 3600
    assert sorted(await asyncio.gather(first.refresh(), second.refresh()))[-1] == 1
    assert keys(url) == []


async def test_a_shared_file_expires_when_its_lifetime_on_the_disk_would_end(
    machine: Callable[..., BucketStore], clock: Clock
) -> None:
    first, second = machine("a"), machine("b")
    media_id, stored = put(first, "ann/test"), clock() - 30
    os.utime(first.folder / media_id, (stored, stored))
    await first.share(media_id, "ann/test")
    media, _ = await second.open(media_id, "ann/test")
    assert media.expire_time.ToSeconds() == pytest.approx(stored + 60, abs=1)


async def test_an_owner_can_store_exactly_its_limit_on_one_machine(
    machine: Callable[..., BucketStore],
) -> None:
    store = machine("a", account=3 * MIB)
    for _ in range(3):
        await upload(store, bytes(MIB))
    with refused("payload_too_large"):
        await upload(store, b"x")


async def test_an_answer_is_refused_if_its_own_account_has_no_space(
    machine: Callable[..., BucketStore],
) -> None:
    store = machine("a", account=MIB)
    await upload(store, bytes(MIB))
    with refused("payload_too_large"):
        store.check_answer("ann/test", 1)
    store.check_answer("bob/test", MIB)


async def test_the_bytes_that_other_machines_stored_count_after_a_refresh(
    machine: Callable[..., BucketStore], clock: Clock
) -> None:
    first, second = machine("a", account=3 * MIB), machine("b", account=3 * MIB)
    for _ in range(3):
        await upload(first, bytes(MIB))
    await second.refresh()
    with refused("payload_too_large"):
        await upload(second, b"x")
    clock.ahead = 661
    await second.refresh()
    assert await upload(second, bytes(3 * MIB))


async def test_the_upload_of_a_request_of_this_process_stays_on_its_disk(
    machine: Callable[..., BucketStore], url: str
) -> None:
    store, call = machine("a"), grpc_call(protocol="rest")
    media_id = await upload(store, PNG, call)
    assert (names(store), keys(url)) == ([media_id], [])
    await store.fetch(media_id, "ann/test", call)
    assert store.find(media_id, "ann/test")[0].read_bytes() == PNG
    call.end()
    assert names(store) == []


async def test_the_upload_of_a_request_to_a_gateway_is_read_and_deleted_on_any_machine(
    machine: Callable[..., BucketStore], url: str
) -> None:
    first, second = machine("a"), machine("b")
    media_id = await upload(first, PNG, grpc_call(protocol="rest", relayed=True))
    call = grpc_call(protocol="rest", relayed=True)
    await second.fetch(media_id, "ann/test", call)
    assert second.find(media_id, "ann/test")[0].read_bytes() == PNG
    second.delete(media_id, "ann/test")
    call.end()
    await second.aclose()
    assert keys(url) == []
    assert names(first) == names(second) == []


async def test_copying_a_file_ends_at_the_deadline_of_its_call(own_server: S3Server, tmp_path: Path) -> None:
    store = BucketStore(Bucket(own_server.new_bucket()), tmp_path / "media", b"s" * 32)
    media_id = await upload(store)
    own_server.stop()
    call = call_of(None, timeout=0.2)
    with refused("deadline_exceeded"):
        await store.fetch(media_id, "ann/test", call)
    call.end()
    assert names(store) == []


async def test_a_file_that_is_not_shared_is_deleted_from_the_disk_by_its_owner(
    machine: Callable[..., BucketStore],
) -> None:
    store = machine("a")
    media_id = put(store, "ann/test")
    store.delete(media_id, "bob/test")
    assert names(store) == [media_id]
    store.delete(media_id, "ann/test")
    assert (names(store), store.quota.total, store._deletions) == ([], 0, set())


async def test_a_refused_upload_leaves_nothing(machine: Callable[..., BucketStore], url: str) -> None:
    store = machine("a", account=MIB)
    with refused("payload_too_large"):
        await upload(store, LARGE)
    assert names(store) == keys(url) == []


async def test_a_file_that_took_long_to_write_is_found_until_it_expires(
    machine: Callable[..., BucketStore], clock: Clock
) -> None:
    first, second = machine("a"), machine("b")
    with first.writer("ann/test", "image/png") as writer:
        writer.write(PNG)
        clock.ahead = 50  # its lifetime is 60 s from now on
        media_id = writer.commit().id
    await first.share(media_id, "ann/test")
    clock.ahead = 108
    assert await download(second, media_id) == PNG


async def test_a_task_reads_a_file_of_this_disk_without_a_copy(machine: Callable[..., BucketStore]) -> None:
    store, call = machine("a"), grpc_call()
    media_id = put(store, "ann/test")
    await store.fetch(media_id, "ann/test", call)
    assert names(store) == [media_id]
    call.end()
    assert names(store) == [media_id]


async def test_a_scan_goes_on_if_another_machine_has_deleted_what_expired(
    machine: Callable[..., BucketStore], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some vendors report a missing file when it is deleted."""
    store = machine("a")
    media_id = await upload(store)

    async def missing(keys: list[str]) -> None:
        raise MissingFileError

    monkeypatch.setattr(store._bucket, "delete", missing)
    clock.ahead = 3_600
    assert await store.refresh() == 1
    assert store.quota.total == 0
    with refused("not_found"):
        await download(store, media_id)


# --- a bucket that fails


async def test_a_caller_who_leaves_while_the_file_is_sent_leaves_nothing_in_the_bucket(
    own_server: S3Server, tmp_path: Path
) -> None:
    url = own_server.new_bucket()
    store = BucketStore(Bucket(url), tmp_path / "media", b"s" * 32)
    own_server.stop()
    sending = asyncio.create_task(upload(store, LARGE))
    await until(lambda: any(name.startswith("media_") for name in names(store)))
    await asyncio.sleep(0)
    await cancel(sending)
    own_server.resume()
    await store.aclose()
    assert names(store) == keys(url) == []
    assert store.quota.total == 0


async def test_files_whose_sending_was_cancelled_and_fails_are_deleted_from_the_disk(
    own_server: S3Server, tmp_path: Path
) -> None:
    store = BucketStore(Bucket(own_server.new_bucket()), tmp_path / "media", b"s" * 32)
    own_server.stop()
    uploading = asyncio.create_task(upload(store))
    media_id = put(store, "ann/test")
    sharing = asyncio.create_task(store.share(media_id, "ann/test"))
    await until(lambda: len([name for name in names(store) if name.startswith("media_")]) == 2)
    await asyncio.sleep(0)
    await cancel(uploading)
    await cancel(sharing)
    assert names(store) == [media_id]
    own_server.close()
    await until(lambda: names(store) == [])
    assert store.quota.total == 0
    await store.aclose()


async def test_a_bucket_that_cannot_be_reached_is_store_unavailable_and_logged_once_a_minute(
    own_server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pomelo.media")
    url = own_server.new_bucket()
    store = BucketStore(Bucket(url, timeout=1.0), tmp_path / "media", b"s" * 32)
    media_id = await upload(store)
    store.check_answer("ann/test", 1)
    own_server.stop()  # it accepts connections and does not answer
    with refused("store_unavailable"):
        await download(store, media_id)
    own_server.close()
    for work in (
        download(store, media_id),
        upload(store),
        store.fetch(media_id, "ann/test", grpc_call()),
        store.refresh(),
    ):
        with refused("store_unavailable"):
            await work
    assert names(store) == []
    with refused("store_unavailable"):  # before a provider is called
        store.check_answer("ann/test", 1)
    assert caplog.messages == ["The bucket of POMELO_MEDIA can't be used: it does not answer in time"]
    own_server.start()
    own_server.create_bucket(url)
    with refused("not_found"):
        await download(store, media_id)
    store.check_answer("ann/test", 1)
    assert caplog.messages[1:] == ["The bucket of POMELO_MEDIA can be used again"]
