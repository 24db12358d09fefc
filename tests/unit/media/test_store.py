"""Media are stored, found by their owner, counted, and deleted when they expire."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import stat
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomelo.call import Call, Principal
from pomelo.errors import PomeloError
from pomelo.media.content_types import sniff
from pomelo.media.local import LocalMedia
from pomelo.media.quota import MediaLimits
from pomelo.media.store import MediaStore
from pomelo.turns import Turns
from tests.calls import call_of

log = logging.getLogger(__name__)

PNG = b"\x89PNG\r\n\x1a\n" + b"\x00" * 64


class Clock:
    """Unix time that a test can move ahead; it begins at the real time, as files have that."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self._time = time.time

    def __call__(self) -> float:
        return self._time() + self.ahead


@pytest.fixture
def clock() -> Clock:
    """A clock to move."""
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> MediaStore:
    """An empty store."""
    return MediaStore(tmp_path / "media", b"s" * 32, public_url="https://pomelo.test", lifetime=60, now=clock)


def put(store: MediaStore, account: str = "ann", data: bytes = PNG) -> str:
    """Stores a media file and returns its id."""
    with store.writer(account, "image/png") as writer:
        writer.write(data)
        return writer.commit().media_id


def files(store: MediaStore) -> list[str]:
    """The names of all stored files."""
    return sorted(path.name for path in store.folder.iterdir())


def error_code(error: pytest.ExceptionInfo[PomeloError]) -> str:
    """The code of a raised error."""
    return error.value.code


def test_a_media_file_is_found_by_its_owner_alone(store: MediaStore) -> None:
    media_id = put(store)
    path, media = store.find(media_id, "ann")
    assert path.read_bytes() == PNG
    assert (media.content_type, media.size_bytes) == ("image/png", len(PNG))
    for other in ("bob", "", "ann "):
        with pytest.raises(PomeloError) as error:
            store.find(media_id, other)
        assert error_code(error) == "not_found"


def test_a_link_needs_no_owner_and_is_valid_for_one_file(store: MediaStore) -> None:
    media_id, other = put(store), put(store)
    url = store.find(media_id, "ann")[1].url
    path, _, query = url.removeprefix("https://pomelo.test").partition("?")
    assert path == f"/media/{media_id}"
    store.check_link(media_id, query)
    for wrong in (other, media_id.replace(".png", ".jpg")):
        with pytest.raises(PomeloError):
            store.check_link(wrong, query)
    for forged in (
        query.replace("exp=", "exp=9"),
        query[:-1] + ("A" if query[-1] != "A" else "B"),
        query + "&x=1",
        "",
        "exp=1&sig=",
    ):
        with pytest.raises(PomeloError):
            store.check_link(media_id, forged)


async def test_a_file_and_its_link_expire_together_and_the_file_is_deleted(
    store: MediaStore, clock: Clock
) -> None:
    media_id = put(store)
    query = store.find(media_id, "ann")[1].url.partition("?")[2]
    clock.ahead = 58
    store.check_link(media_id, query)
    assert await store.refresh() == 0
    clock.ahead = 61
    for use in (lambda: store.find(media_id, "ann"), lambda: store.check_link(media_id, query)):
        with pytest.raises(PomeloError) as error:
            use()
        assert error_code(error) == "not_found"
    assert await store.refresh() == 1
    assert list(store.folder.iterdir()) == []


@given(st.text(max_size=80))
def test_no_id_leads_out_of_the_folder(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    store = MediaStore(tmp_path_factory.getbasetemp() / "none", b"s" * 32)
    for media_id in (text, f"../{text}", f"media_{text}.png"):
        with pytest.raises(PomeloError):
            store.find(media_id, None)


def test_an_uncommitted_file_is_deleted(store: MediaStore) -> None:
    def fail_halfway() -> None:
        with store.writer("ann", "audio/mpeg") as writer:
            writer.write(b"ID3" * 100_000)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert list(store.folder.iterdir()) == []


def test_a_disk_failure_is_reported_as_store_unavailable(tmp_path: Path) -> None:
    store = MediaStore(tmp_path / "media", b"s" * 32)
    store.folder.rmdir()
    with store.writer("ann", "audio/mpeg") as writer:
        writer.write(b"x")
        with pytest.raises(PomeloError) as error:
            writer.commit()
    assert error_code(error) == "store_unavailable"


@pytest.mark.parametrize(
    ("declared", "head", "stored"),
    [
        ("image/png", PNG, "image/png"),
        ("text/html", PNG, "image/png"),
        ("text/html", b"<script>", "application/octet-stream"),
        ("image/svg+xml", b"<svg>", "application/octet-stream"),
        ("", b"ID3\x04", "audio/mpeg"),
        ("", b"\xff\xfb\x90\x00", "audio/mpeg"),
        ("audio/pcm;rate=16000", b"\xff\xfb\x90\x00", "audio/pcm;rate=16000"),
        ("audio/pcm; rate=16000", b"\xff\xff\xff\xff", "audio/pcm;rate=16000"),
        ("", b"RIFF\x00\x00\x00\x00WAVE", "audio/wav"),
        ("", b"OggS", "audio/ogg"),
        ("AUDIO/MP3", b"????", "audio/mpeg"),
    ],
)
def test_a_media_file_is_stored_with_a_known_type(declared: str, head: bytes, stored: str) -> None:
    assert sniff(declared, head) == stored


@pytest.mark.parametrize("live", [True, False])
def test_a_mode_of_an_account_cannot_read_media_of_the_other(store: MediaStore, live: bool) -> None:
    mine, other = Principal("ann", "k", live), Principal("ann", "k", not live)
    media_id = put(store, mine.owner)
    assert store.find(media_id, mine.owner)
    with pytest.raises(PomeloError) as error:
        store.find(media_id, other.owner)
    assert error_code(error) == "not_found"
    store.delete(media_id, other.owner)
    assert store.find(media_id, mine.owner)
    store.delete(media_id, mine.owner)
    assert files(store) == []


def test_ids_do_not_reveal_that_they_have_the_same_owner(store: MediaStore) -> None:
    ids = [put(store) for _ in range(50)]
    encrypted_tags = {media_id[32:48] for media_id in ids}
    assert len(encrypted_tags) == 50
    assert {store.ids.tag_of(media_id) for media_id in ids} == {store.ids.owner_tag("ann")}


def test_other_users_cannot_read_the_files_or_list_the_folder(store: MediaStore) -> None:
    put(store)
    with store.writer("ann", "audio/mpeg") as writer:
        writer.write(b"ID3" * 100_000)
        modes = [stat.S_IMODE(path.stat().st_mode) for path in store.folder.iterdir()]
    assert modes == [0o600, 0o600]
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700


def test_the_lifetime_of_media_is_extended_and_never_shortened(store: MediaStore, clock: Clock) -> None:
    media_id = put(store)

    def remaining() -> float:
        return store.find(media_id, "ann")[1].expire_time.seconds - clock()

    store.keep(media_id, 10)
    assert remaining() == pytest.approx(60, abs=2)
    store.keep(media_id, 1000)
    assert remaining() == pytest.approx(1000, abs=2)
    for seconds in (500, 60, 1, 0):
        store.keep(media_id, seconds)
        assert remaining() == pytest.approx(1000, abs=2)
    clock.ahead = 900
    store.keep(media_id, 90)
    assert remaining() == pytest.approx(100, abs=2)


async def test_media_expire_exactly_when_their_lifetime_is_over(tmp_path: Path) -> None:
    now = 1_900_000_000.0
    store = MediaStore(tmp_path / "media", b"s" * 32, lifetime=60, now=lambda: now)
    media_id = put(store)
    query = store.find(media_id, "ann")[1].url.partition("?")[2]
    now += 59.75
    assert store.find(media_id, "ann")[1].expire_time.seconds == 1_900_000_060
    assert await store.refresh() == 0
    now += 0.25
    store.check_link(media_id, query)
    with pytest.raises(PomeloError):
        store.find(media_id, "ann")
    now += 0.25
    with pytest.raises(PomeloError):
        store.check_link(media_id, query)
    now -= 0.25
    assert await store.refresh() == 1


@pytest.mark.parametrize(("asked", "left"), [(None, 60), (1_000, 60), (60, 60), (10, 10), (0, 0)])
def test_a_shorter_lifetime_can_be_requested_but_not_a_longer_one(
    tmp_path: Path, asked: float | None, left: int
) -> None:
    store = MediaStore(tmp_path / "media", b"s" * 32, lifetime=60, now=lambda: 1_900_000_000.0)
    with store.writer("ann", "image/png") as writer:
        writer.write(PNG)
        assert writer.commit(asked).expire_time.seconds == 1_900_000_000 + left


@pytest.mark.parametrize("piece", [1, 3, 16, 100])
def test_the_type_of_a_file_is_detected_from_its_first_bytes_in_any_packets(
    store: MediaStore, piece: int
) -> None:
    data = b"RIFF\x24\x00\x00\x00WAVEfmt and samples"
    with store.writer("ann", "text/html") as writer:
        for at in range(0, len(data), piece):
            writer.write(data[at : at + piece])
        assert writer.commit().content_type == "audio/wav"


class _Access:
    async def identify(self, call: Call, model: str = "") -> Principal:
        return Principal("ann", "k", live=False)


async def _three_chunks(size: int) -> AsyncIterator[bytes]:
    for _ in range(3):
        yield b"x" * size


async def test_an_upload_above_the_limit_is_refused_and_deleted(store: MediaStore) -> None:
    media_service = LocalMedia(store, _Access(), upload_limit=2_500_000, turns=Turns())
    with pytest.raises(PomeloError) as error:
        await media_service.upload_media("audio/mpeg", _three_chunks(1_000_000), call_of(None))
    assert error_code(error) == "payload_too_large"
    assert list(store.folder.iterdir()) == []
    with pytest.raises(PomeloError) as error:
        await media_service.upload_media(
            "audio/mpeg", _three_chunks(833_334), call_of(None)
        )  # two bytes too many
    assert error_code(error) == "payload_too_large"
    exact = LocalMedia(store, _Access(), upload_limit=2_400_000, turns=Turns())
    media = await exact.upload_media("audio/mpeg", _three_chunks(800_000), call_of(None))
    assert media.size_bytes == 2_400_000
    async with media_service.download_media(media.media_id, "", call_of(None)) as (found, chunks):
        assert found.size_bytes == sum([len(chunk) async for chunk in chunks])


async def test_a_stalled_upload_ends_at_the_deadline(store: MediaStore) -> None:
    media_service = LocalMedia(store, _Access(), turns=Turns())

    async def stalled() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    call = Call.from_headers({"x-request-timeout": "0.05"}.get, protocol="rest")
    with pytest.raises(PomeloError) as error:
        await media_service.upload_media("audio/mpeg", stalled(), call)
    assert error_code(error) == "deadline_exceeded"
    assert list(store.folder.iterdir()) == []


async def test_a_rest_upload_ends_with_its_request_and_a_grpc_upload_does_not(tmp_path: Path) -> None:
    store = MediaStore(tmp_path / "media", b"s" * 32)
    for protocol, min_seconds, max_seconds in (("rest", 45, 51), ("grpc", 3590, 3601)):
        call = Call.from_headers({"x-request-timeout": "20"}.get, protocol=protocol)
        media = await LocalMedia(store, _Access(), turns=Turns()).upload_media(
            "audio/mpeg", _three_chunks(10), call
        )
        assert min_seconds < media.expire_time.seconds - time.time() + 1 <= max_seconds + 1
        path, found = store.find(media.media_id, "ann/test")
        assert found.expire_time.seconds == media.expire_time.seconds
        call.end()
        assert path.exists() == (protocol == "grpc")
        call.end()


async def test_a_stalled_download_ends_at_the_deadline(store: MediaStore) -> None:
    media_service = LocalMedia(store, _Access(), turns=Turns())
    media_id = put(store, "ann/test", PNG * 10_000)
    call = Call.from_headers({"x-request-timeout": "0.05"}.get, protocol="grpc")

    async def stalled() -> None:
        async with media_service.download_media(media_id, "", call) as (_, chunks):
            async for _ in chunks:
                await asyncio.Event().wait()  # the reader stalls

    with pytest.raises(PomeloError) as error:
        await asyncio.wait_for(stalled(), 10)
    assert error_code(error) == "deadline_exceeded"


# --- quotas

KIB, MIB = 1024, 1024 * 1024


def limited(folder: Path, clock: Clock | None = None, **limits: int) -> MediaStore:
    """A store with these limits, without a disk reserve by default."""
    return MediaStore(
        folder / "media",
        b"s" * 32,
        lifetime=60,
        limits=MediaLimits(**{"reserve": 0, **limits}),
        now=clock or time.time,
    )


def store_file(store: MediaStore, owner: str, size: int, chunk: int = 10_000) -> str:
    """Stores a media file of `size` bytes, chunk by chunk."""
    with store.writer(owner, "audio/mpeg") as writer:
        for at in range(0, size, chunk):
            writer.write(b"x" * min(chunk, size - at))
        return writer.commit().media_id


def on_disk(store: MediaStore) -> int:
    """The total size of all files in bytes."""
    return sum(path.stat().st_size for path in store.folder.iterdir())


@pytest.mark.parametrize("chunk", [1_000, 65_536, 300_000])
def test_an_owner_can_store_exactly_its_limit(tmp_path: Path, chunk: int) -> None:
    store = limited(tmp_path, account=MIB)
    for _ in range(4):
        store_file(store, "ann", MIB // 4, chunk)
    with pytest.raises(PomeloError) as error:
        store_file(store, "ann", 1, chunk)
    assert error_code(error) == "payload_too_large"
    assert "1,048,576" in error.value.message
    assert on_disk(store) == MIB
    assert store_file(store, "bob", MIB, chunk)


def test_bytes_are_refused_before_they_are_written(tmp_path: Path) -> None:
    store = limited(tmp_path, account=MIB)

    def fill() -> None:
        with store.writer("ann", "audio/mpeg") as writer:
            while True:
                writer.write(b"x" * 100_000)
                assert on_disk(store) <= MIB

    with pytest.raises(PomeloError):
        fill()
    assert files(store) == []
    assert store_file(store, "ann", MIB)  # refused bytes do not count


def test_bytes_being_written_count_toward_the_limit(tmp_path: Path) -> None:
    store = limited(tmp_path, account=MIB)
    with store.writer("ann", "audio/mpeg") as writer:
        writer.write(b"x" * (MIB - 4 * KIB))
        with pytest.raises(PomeloError):
            store_file(store, "ann", 4 * KIB + 1)
        assert store_file(store, "ann", 4 * KIB)


def test_small_files_count_with_the_disk_space_that_they_occupy(tmp_path: Path) -> None:
    store = limited(tmp_path, account=40 * KIB)
    for _ in range(10):
        store_file(store, "ann", 1)
    with pytest.raises(PomeloError):
        store_file(store, "ann", 1)


def test_all_owners_share_the_total_limit_and_callers_may_retry(tmp_path: Path) -> None:
    store = limited(tmp_path, total=MIB, account=MIB)
    store_file(store, "ann", 700 * KIB)
    with pytest.raises(PomeloError) as error:
        store_file(store, "bob", 400 * KIB)
    assert error_code(error) == "store_unavailable"
    assert error.value.retry_after is not None
    assert store_file(store, "bob", 324 * KIB)


async def test_stored_bytes_are_counted_again_after_a_restart(tmp_path: Path) -> None:
    store = limited(tmp_path, account=MIB)
    store_file(store, "ann", 600 * KIB)
    store_file(store, "bob", 100 * KIB)
    with store.writer("ann", "audio/mpeg") as unfinished:
        unfinished.write(b"x" * 200 * KIB)
        restarted = limited(tmp_path, account=MIB)  # the first process died during a write
        await restarted.refresh()
        assert restarted.quota.stored(restarted.ids.owner_tag("ann")) == 800 * KIB
        assert restarted.quota.stored(restarted.ids.owner_tag("bob")) == 100 * KIB
        with pytest.raises(PomeloError):
            store_file(restarted, "ann", 225 * KIB)
        assert store_file(restarted, "ann", 224 * KIB)


async def test_a_scan_counts_files_that_are_being_written(tmp_path: Path) -> None:
    store = limited(tmp_path, account=MIB)
    with store.writer("ann", "audio/mpeg") as writer:
        for size in (10_000, 300_000, 300_000):  # in the buffer, and on the disk
            writer.write(b"x" * size)
            await store.refresh()
            assert store.quota.stored(store.ids.owner_tag("ann")) == -(-writer.size // 4096) * 4096
    assert store.quota.stored(store.ids.owner_tag("ann")) == 0


async def test_expired_and_deleted_files_free_their_bytes(tmp_path: Path) -> None:
    clock = Clock()
    store = limited(tmp_path, clock, account=MIB)
    media_id = store_file(store, "ann", MIB)
    store.delete(media_id, "ann")
    assert files(store) == []
    store_file(store, "ann", MIB)
    clock.ahead = 61
    assert await store.refresh() == 1
    assert store_file(store, "ann", MIB)
    for path in store.folder.iterdir():  # by hand
        path.unlink()
    await store.refresh()
    assert store_file(store, "ann", MIB)


async def test_a_scan_counts_files_stored_and_deleted_during_the_scan(tmp_path: Path) -> None:
    store = limited(tmp_path, account=100 * MIB)
    media_ids = [store_file(store, "ann", 20 * KIB) for _ in range(200)]
    stop = threading.Event()
    scans = 0

    async def scan() -> None:
        nonlocal scans
        while not stop.is_set():
            await store.refresh()
            scans += 1

    scanning = asyncio.create_task(scan())
    for number in range(300):
        with store.writer("ann", "audio/mpeg") as writer:
            writer.write(b"x" * 100_000)
            await asyncio.sleep(0)
            media_ids.append(writer.commit().media_id)
        store.delete(media_ids.pop(number % len(media_ids)), "ann")
        await asyncio.sleep(0)
    stop.set()
    await scanning
    assert scans > 3
    expected = sum(-(-path.stat().st_size // 4096) * 4096 for path in store.folder.iterdir())
    assert store.quota.stored(store.ids.owner_tag("ann")) == expected


async def test_partial_files_without_a_writer_are_deleted(tmp_path: Path) -> None:
    clock = Clock()
    store = limited(tmp_path, clock)
    (store.folder / f".part_{'0' * 42}").write_bytes(b"left by a process that died")
    (store.folder / "unrelated").write_bytes(b"")
    clock.ahead = 890
    assert await store.refresh() == 0
    with store.writer("ann", "audio/mpeg") as writer:
        writer.write(b"x" * 100_000)
        clock.ahead = 10_000
        assert await store.refresh() == 1
        assert writer.commit().media_id in files(store)


async def test_a_file_that_cannot_be_deleted_does_not_stop_the_scan(tmp_path: Path) -> None:
    clock = Clock()
    store = limited(tmp_path, clock)
    stuck = store.folder / f"media_{'0' * 42}.png"
    stuck.mkdir()  # unlink cannot delete a folder
    ids = [store_file(store, "ann", 1) for _ in range(20)]
    clock.ahead = 61
    assert await store.refresh() == len(ids)
    assert files(store) == [stuck.name]


def test_the_disk_reserve_stays_free(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    store = limited(tmp_path, reserve=disk.f_bavail * disk.f_frsize + 1024 * MIB)
    for size in (1, 100_000):
        with pytest.raises(PomeloError) as error:
            store_file(store, "ann", size)
        assert error_code(error) == "store_unavailable"
    assert files(store) == []
    with pytest.raises(PomeloError) as error:
        store.check_answer("ann", 1)
    assert error_code(error) == "store_unavailable"


@contextmanager
def max_file_size(size: int) -> Iterator[None]:
    """Limits the size of every file that this process writes, including the test report."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 70_000, 200_000])
def test_a_full_disk_is_reported_as_store_unavailable_and_leaves_no_file(tmp_path: Path, size: int) -> None:
    store = limited(tmp_path, account=MIB)
    for chunk in (1_000, 60_000, 100_000, 300_000):
        with pytest.raises(PomeloError) as error, max_file_size(size):
            store_file(store, "ann", 300_000, chunk)
        assert error_code(error) == "store_unavailable"
        assert isinstance(error.value.__cause__, OSError)
        assert error.value.__cause__.errno == errno.EFBIG
        assert files(store) == []
    assert store.quota.stored(store.ids.owner_tag("ann")) == 0


@pytest.mark.parametrize("size", [0, 70_000, 200_000])
def test_media_stored_before_the_disk_was_full_can_be_read(tmp_path: Path, size: int) -> None:
    store = limited(tmp_path)
    for chunk in (1_000, 60_000, 100_000):
        chunks = [bytes([number % 251]) * chunk for number in range(300)]
        written = 0
        with store.writer("ann", "audio/mpeg") as writer:
            with suppress(PomeloError), max_file_size(size):
                for data in chunks:
                    writer.write(data)
                    written += 1
            assert written < 300
            assert writer.contents() == b"".join(chunks[:written])


async def test_a_hundred_thousand_files_are_scanned_quickly_without_blocking_the_loop(tmp_path: Path) -> None:
    clock = Clock()
    store = limited(tmp_path, clock)
    count = 100_000 if os.environ.get("LOAD_CALLS") else 2_000
    for _ in range(count):
        stem = store.ids.new_stem(store.ids.owner_tag("ann"))
        os.close(os.open(store.folder / f"media_{stem}.png", os.O_CREAT | os.O_WRONLY))
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - before)

    watching = asyncio.create_task(watch())
    for ahead, deleted in ((0, 0), (61, count)):
        clock.ahead = ahead
        started = time.monotonic()
        assert await store.refresh() == deleted
        took = time.monotonic() - started
        log.info("%d files, %d deleted: %.2f s, the loop waited %.0f ms", count, deleted, took, longest * 1e3)
        assert took < 1 + count / 2_000
    watching.cancel()
    assert longest < 1.0
