"""Files that were deleted from a bucket no longer count toward the limits, without a scan."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from pomelo.media import bucket_store
from pomelo.media.bucket import Bucket
from pomelo.media.bucket_store import BucketStore
from tests.s3_server import S3Server
from tests.unit.media.buckets import MIB, grpc_call, keys, upload
from tests.unit.media.files import names, put
from tests.waiting import cancel, until


async def test_spent_uploads_to_a_gateway_do_not_count(machine: Callable[..., BucketStore]) -> None:
    store = machine("a", account=2 * MIB + 4096)
    await upload(store)
    for _ in range(5):
        call = grpc_call(protocol="rest", relayed=True)
        media_id = await upload(store, bytes(MIB), call)
        await store.fetch(media_id, "ann/test", call)
        for _ in range(2):
            store.delete(media_id, "ann/test")
        call.end()
    assert store.quota.stored(store.ids.owner_tag("ann/test")) == 4096
    await store.aclose()
    await store.refresh()
    assert await upload(store, bytes(2 * MIB))


async def test_the_upload_of_a_refused_request_to_a_gateway_does_not_count(
    machine: Callable[..., BucketStore], url: str
) -> None:
    store = machine("a", account=2 * MIB)
    for _ in range(3):
        media_id = await upload(store, bytes(2 * MIB), grpc_call(protocol="rest", relayed=True))
        store.delete(media_id, "ann/test")  # no task has fetched it
        await store.aclose()
    assert (keys(url), store.quota.total) == ([], 0)


async def test_nobody_deletes_the_file_of_another_owner(
    machine: Callable[..., BucketStore], url: str
) -> None:
    store = machine("a")
    shared, own = await upload(store), put(store, "ann/test")
    call = grpc_call()
    await store.fetch(shared, "ann/test", call)
    for media_id in (shared, own):
        store.delete(media_id, "ann/live")
    call.end()
    store.delete(shared, "ann/live")
    await store.aclose()
    assert keys(url) == [f"hour/{shared}"]
    assert names(store) == [own]
    assert store.quota.total == 2 * 4096


async def test_an_upload_that_is_deleted_twice_at_a_time_is_subtracted_once(
    machine: Callable[..., BucketStore],
) -> None:
    store = machine("a")
    await upload(store, bytes(2 * MIB))
    for fetched in (True, False):
        call = grpc_call(protocol="rest", relayed=True)
        media_id = await upload(store, bytes(MIB), call)
        if fetched:
            await store.fetch(media_id, "ann/test", call)
        store.delete(media_id, "ann/test")  # the task is refused
        call.end()
        store.delete(media_id, "ann/test")  # and its gateway deletes the upload
        await store.aclose()
        assert store.quota.total == 2 * MIB
    assert store._deleting == set()


async def test_the_copy_that_a_task_reads_does_not_count(machine: Callable[..., BucketStore]) -> None:
    store = machine("a")
    call = grpc_call()
    await store.fetch(await upload(store, bytes(2 * MIB)), "ann/test", call)
    await store.refresh()
    assert store.quota.total == 2 * MIB
    call.end()


async def test_an_answer_that_is_not_wanted_while_it_is_sent_does_not_count(
    own_server: S3Server, tmp_path: Path
) -> None:
    url = own_server.new_bucket()
    store = BucketStore(Bucket(url), tmp_path / "media", b"s" * 32)
    own_server.stop()
    sharing = asyncio.create_task(store.share(put(store, "ann/test"), "ann/test"))
    await asyncio.sleep(0)
    await cancel(sharing)
    own_server.resume()
    await store.aclose()
    assert names(store) == keys(url) == []
    assert store.quota.total == 0


async def test_an_upload_whose_caller_leaves_while_it_is_sent_is_subtracted_once(
    own_server: S3Server, tmp_path: Path
) -> None:
    store = BucketStore(Bucket(own_server.new_bucket()), tmp_path / "media", b"s" * 32)
    put(store, "ann/test", bytes(2 * MIB))
    own_server.stop()
    sending = asyncio.create_task(upload(store, bytes(MIB)))
    await until(lambda: len([name for name in names(store) if name.startswith("media_")]) == 2)
    await asyncio.sleep(0)
    await cancel(sending)
    own_server.resume()
    await store.aclose()
    assert store.quota.total == 2 * MIB


async def test_closing_waits_only_for_a_time_for_deletions(
    machine: Callable[..., BucketStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_store, "_CLOSE_TIMEOUT", 0.01)
    store, answered = machine("a"), asyncio.Event()

    async def hang() -> None:
        await answered.wait()

    store._in_background(hang())
    async with asyncio.timeout(20):
        await store.aclose()
    assert len(store._deletions) == 1
    answered.set()
    await store.aclose()
    assert store._deletions == set()
