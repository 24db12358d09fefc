"""What an operation of a bucket says about its failure, and how long it may take."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from pathlib import Path

import obstore
import pytest
from obstore.store import from_url

from pomelo.media.bucket import Bucket, MissingFileError
from pomelo.media.bucket_store import BucketStore
from tests.calls import call_of
from tests.s3_server import S3Server
from tests.unit.media.files import PNG, put
from tests.unit.refusals import refused


@pytest.fixture(name="file")
def _file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(PNG)
    return path


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged about media."""
    return [record.getMessage() for record in caplog.records if record.name == "pomelo.media"]


async def test_a_missing_file_is_no_failure_of_the_bucket(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pomelo.media")
    bucket = Bucket(url)
    with pytest.raises(MissingFileError):
        await bucket.begin("hour/none", 1)
    with pytest.raises(MissingFileError):
        await bucket.read("hour/none", 0, 1)
    assert bucket.available
    assert lines(caplog) == []
    bucket._failed_at = time.monotonic()  # as after a failure
    with pytest.raises(MissingFileError):
        await bucket.begin("hour/none", 1)
    assert bucket.available, "it has answered"


async def test_a_file_waits_until_others_are_sent(
    url: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.media.bucket._MAX_SENDS", 0)
    bucket = Bucket(url, timeout=0.05)
    with refused("store_unavailable"):
        await bucket.send("hour/new", file, "image/png", 0.0)
    with pytest.raises(MissingFileError):
        await Bucket(url).begin("hour/new", 1)


async def test_a_missing_bucket_is_a_failure_and_not_a_missing_file(
    url: str, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = Bucket(url.replace("s3://", "s3://no-such-"))
    for work in (
        bucket.begin("hour/none", 1),
        bucket.read("hour/none", 0, 1),
        bucket.send("hour/new", file, "image/png", 0.0),
    ):
        with refused("store_unavailable"):
            await work
    assert not bucket.available
    (line,) = lines(caplog)
    assert "there is no such bucket (status 404, NoSuchBucket)" in line


async def test_a_file_may_be_sent_six_times_as_long_as_other_operations_may_take(
    url: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[float | None] = []
    timeout, task = asyncio.timeout, asyncio.current_task()

    def record(delay: float | None) -> asyncio.Timeout:
        if asyncio.current_task() is task:  # others may run an app meanwhile
            times.append(delay)
        return timeout(delay)

    bucket = Bucket(url, timeout=20.0)
    monkeypatch.setattr(asyncio, "timeout", record)
    await bucket.send("hour/new", file, "image/png", 5.0)
    stored, data = await bucket.begin("hour/new", 4)
    assert (stored.size, stored.expires, data) == (len(PNG), 5.0, PNG[:4])
    await bucket.delete(["hour/new"])
    assert times == [120.0, 20.0, 20.0]


async def test_a_file_that_was_deleted_before_it_is_sent_is_a_failure(url: str, tmp_path: Path) -> None:
    with refused("store_unavailable"):
        await Bucket(url).send("hour/gone", tmp_path / "gone", "image/png", 0.0)


@pytest.mark.usefixtures("server")
async def test_a_bucket_that_does_not_exist_is_refused_at_start() -> None:
    with pytest.raises(ValueError, match=r"there is no such bucket \(status 404, NoSuchBucket\)"):
        await Bucket("s3://no-such-bucket/media").check()


@pytest.mark.parametrize("effect", ["s3:PutObject", "s3:GetObject"])
async def test_denied_access_says_so_without_the_response(
    server: S3Server, tmp_path: Path, effect: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = server.new_bucket()
    bucket = Bucket(url)
    store = BucketStore(bucket, tmp_path / "media", b"s" * 32)
    media_id = put(store)
    await store.share(media_id, "ann")
    await bucket.check()
    call = call_of(None)
    await store.fetch(media_id, "ann", call)
    store.find(media_id, "ann")[0].unlink()
    server.deny(url, effect)
    with refused("store_unavailable") as caught:
        await (store.open(media_id, "ann") if effect == "s3:GetObject" else store.share(put(store), "ann"))
    assert "status" not in "".join(traceback.format_exception(caught.value))
    if effect == "s3:GetObject":
        with refused("store_unavailable"):  # and not "no such media"
            await store.fetch(media_id, "ann", call)
        with refused("not_found"):  # only the name of the copy is left
            store.find(media_id, "ann")
        call.end()
    (line,) = lines(caplog)
    assert line == (
        "The bucket of POMELO_MEDIA can't be used: it denies access (status 403). "
        "Check the credentials and what they may do"
    )
    if effect == "s3:PutObject":
        with pytest.raises(ValueError, match="it denies access"):
            await bucket.check()


async def test_a_file_that_is_deleted_while_it_is_read_is_store_unavailable(url: str, tmp_path: Path) -> None:
    bucket = Bucket(url)
    store = BucketStore(bucket, tmp_path / "media", b"s" * 32)
    media_id = put(store, data=PNG + bytes(600 * 1024))
    await store.share(media_id, "ann")
    _, reader = await store.open(media_id, "ann")
    with reader:
        assert await reader.read(len(PNG)) == PNG
        await bucket.delete([f"hour/{media_id}"])
        reader.skip(512 * 1024 - len(PNG))
        with refused("store_unavailable"):
            await reader.read(100)


async def test_a_bucket_that_stores_a_file_again_is_available_at_that_moment(
    own_server: S3Server, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pomelo.media")
    bucket = Bucket(own_server.new_bucket(), timeout=1.0)
    own_server.stop()
    with refused("store_unavailable"):
        await bucket.begin("hour/file", 1)
    assert not bucket.available
    with pytest.raises(ValueError, match="it does not answer in time"):
        await bucket.check()
    own_server.resume()
    await bucket.send("hour/file", file, "image/png", 0)
    assert bucket.available
    assert caplog.messages[1:] == ["The bucket of POMELO_MEDIA can be used again"]


async def test_a_file_without_the_time_at_which_it_expires_is_not_found(url: str, tmp_path: Path) -> None:
    store = BucketStore(Bucket(url), tmp_path / "media", b"s" * 32)
    media_id = put(store)
    obstore.put(from_url(url), f"hour/{media_id}", PNG)  # as somebody does who copies a bucket
    store.discard(media_id, "ann")
    with refused("not_found"):
        await store.open(media_id, "ann")
