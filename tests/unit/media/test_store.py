"""Media: who may have them, until when, and that nothing else is left on the disk."""

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
from pomelo.media.quota import MediaLimits
from pomelo.media.store import LocalMedia, MediaStore, sniff
from pomelo.turns import Turns

log = logging.getLogger(__name__)

PNG = b"\x89PNG\r\n\x1a\n" + b"\x00" * 64


class Clock:
    """Unix time that a test moves; begins at the real one, since files bear that."""

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
    """Stores a medium and gives its id."""
    with store.writer(account, "image/png") as writer:
        writer.write(data)
        return writer.commit().media_id


def files(store: MediaStore) -> list[str]:
    """The names of all stored files."""
    return sorted(path.name for path in store.folder.iterdir())


def refusal(error: pytest.ExceptionInfo[PomeloError]) -> str:
    """The code of a raised error."""
    return error.value.code


def test_a_medium_is_found_by_its_owner_alone(store: MediaStore) -> None:
    media_id = put(store)
    path, media = store.find(media_id, "ann")
    assert path.read_bytes() == PNG
    assert (media.content_type, media.size_bytes) == ("image/png", len(PNG))
    for other in ("bob", "", "ann "):
        with pytest.raises(PomeloError) as error:
            store.find(media_id, other)
        assert refusal(error) == "not_found"


def test_a_link_needs_no_owner_and_no_other_medium_takes_it(store: MediaStore) -> None:
    media_id, other = put(store), put(store)
    url = store.find(media_id, "ann")[1].url
    path, _, query = url.removeprefix("https://pomelo.test").partition("?")
    assert path == f"/media/{media_id}"
    store.check(media_id, query)
    for wrong in (other, media_id.replace(".png", ".jpg")):
        with pytest.raises(PomeloError):
            store.check(wrong, query)
    for bent in (
        query.replace("exp=", "exp=9"),
        query[:-1] + ("A" if query[-1] != "A" else "B"),
        query + "&x=1",
        "",
        "exp=1&sig=",
    ):
        with pytest.raises(PomeloError):
            store.check(media_id, bent)


async def test_media_and_its_link_expire_together_and_are_swept(store: MediaStore, clock: Clock) -> None:
    media_id = put(store)
    query = store.find(media_id, "ann")[1].url.partition("?")[2]
    clock.ahead = 58
    store.check(media_id, query)
    assert await store.refresh() == 0
    clock.ahead = 61
    for gone in (lambda: store.find(media_id, "ann"), lambda: store.check(media_id, query)):
        with pytest.raises(PomeloError) as error:
            gone()
        assert refusal(error) == "not_found"
    assert await store.refresh() == 1
    assert list(store.folder.iterdir()) == []


@given(st.text(max_size=80))
def test_no_text_is_an_id_that_leads_out_of_the_folder(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    store = MediaStore(tmp_path_factory.getbasetemp() / "none", b"s" * 32)
    for media_id in (text, f"../{text}", f"media_{text}.png"):
        with pytest.raises(PomeloError):
            store.find(media_id, None)


def test_what_was_not_committed_leaves_nothing(store: MediaStore) -> None:
    def half() -> None:
        with store.writer("ann", "audio/mpeg") as writer:
            writer.write(b"ID3" * 100_000)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert list(store.folder.iterdir()) == []


def test_a_disk_that_fails_is_a_store_that_cannot_be_reached(tmp_path: Path) -> None:
    store = MediaStore(tmp_path / "media", b"s" * 32)
    store.folder.rmdir()
    with store.writer("ann", "audio/mpeg") as writer:
        writer.write(b"x")
        with pytest.raises(PomeloError) as error:
            writer.commit()
    assert refusal(error) == "store_unavailable"


@pytest.mark.parametrize(
    ("named", "head", "kept"),
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
def test_a_medium_is_kept_under_a_type_that_we_know(named: str, head: bytes, kept: str) -> None:
    assert sniff(named, head) == kept


@pytest.mark.parametrize("live", [True, False])
def test_a_mode_of_an_account_reads_nothing_of_the_other(store: MediaStore, live: bool) -> None:
    mine, other = Principal("ann", "k", live), Principal("ann", "k", not live)
    media_id = put(store, mine.owner)
    assert store.find(media_id, mine.owner)
    with pytest.raises(PomeloError) as error:
        store.find(media_id, other.owner)
    assert refusal(error) == "not_found"
    store.delete(media_id, other.owner)
    assert store.find(media_id, mine.owner)
    store.delete(media_id, mine.owner)
    assert files(store) == []


def test_ids_do_not_show_that_they_have_one_owner(store: MediaStore) -> None:
    ids = [put(store) for _ in range(50)]
    sealed = {media_id[32:48] for media_id in ids}
    assert len(sealed) == 50
    assert {store._owner_of(media_id) for media_id in ids} == {store._tag("ann")}


def test_other_users_cannot_read_the_files_or_list_the_folder(store: MediaStore) -> None:
    put(store)
    with store.writer("ann", "audio/mpeg") as writer:
        writer.write(b"ID3" * 100_000)
        modes = [stat.S_IMODE(path.stat().st_mode) for path in store.folder.iterdir()]
    assert modes == [0o600, 0o600]
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700


def test_the_lifetime_of_media_is_extended_and_never_shortened(store: MediaStore, clock: Clock) -> None:
    media_id = put(store)

    def left() -> float:
        return store.find(media_id, "ann")[1].expire_time.seconds - clock()

    store.keep(media_id, 10)
    assert left() == pytest.approx(60, abs=2)
    store.keep(media_id, 1000)
    assert left() == pytest.approx(1000, abs=2)
    for seconds in (500, 60, 1, 0):
        store.keep(media_id, seconds)
        assert left() == pytest.approx(1000, abs=2)
    clock.ahead = 900
    store.keep(media_id, 90)
    assert left() == pytest.approx(100, abs=2)


async def test_media_expire_exactly_when_their_lifetime_is_over(tmp_path: Path) -> None:
    now = 1_900_000_000.0
    store = MediaStore(tmp_path / "media", b"s" * 32, lifetime=60, now=lambda: now)
    media_id = put(store)
    query = store.find(media_id, "ann")[1].url.partition("?")[2]
    now += 59.75
    assert store.find(media_id, "ann")[1].expire_time.seconds == 1_900_000_060
    assert await store.refresh() == 0
    now += 0.25
    store.check(media_id, query)
    with pytest.raises(PomeloError):
        store.find(media_id, "ann")
    now += 0.25
    with pytest.raises(PomeloError):
        store.check(media_id, query)
    now -= 0.25
    assert await store.refresh() == 1


@pytest.mark.parametrize(("asked", "left"), [(None, 60), (1_000, 60), (60, 60), (10, 10), (0, 0)])
def test_a_shorter_lifetime_can_be_asked_for_and_no_longer_one(
    tmp_path: Path, asked: float | None, left: int
) -> None:
    store = MediaStore(tmp_path / "media", b"s" * 32, lifetime=60, now=lambda: 1_900_000_000.0)
    with store.writer("ann", "image/png") as writer:
        writer.write(PNG)
        assert writer.commit(asked).expire_time.seconds == 1_900_000_000 + left


@pytest.mark.parametrize("piece", [1, 3, 16, 100])
def test_the_type_of_a_file_is_that_of_its_first_bytes_however_they_come(
    store: MediaStore, piece: int
) -> None:
    data = b"RIFF\x24\x00\x00\x00WAVEfmt and samples"
    with store.writer("ann", "text/html") as writer:
        for at in range(0, len(data), piece):
            writer.write(data[at : at + piece])
        assert writer.commit().content_type == "audio/wav"


async def _whose(call: Call) -> Principal:
    return Principal("ann", "k", live=False)


async def _three(size: int) -> AsyncIterator[bytes]:
    for _ in range(3):
        yield b"x" * size


def _call() -> Call:
    return Call.from_headers({}.get, wire="rest")


async def test_an_upload_above_the_limit_is_refused_and_leaves_nothing(store: MediaStore) -> None:
    desk = LocalMedia(store, _whose, upload_limit=2_500_000, turns=Turns())
    with pytest.raises(PomeloError) as error:
        await desk.upload_media("audio/mpeg", _three(1_000_000), _call())
    assert refusal(error) == "payload_too_large"
    assert list(store.folder.iterdir()) == []
    with pytest.raises(PomeloError) as error:
        await desk.upload_media("audio/mpeg", _three(833_334), _call())  # two bytes too many
    assert refusal(error) == "payload_too_large"
    exact = LocalMedia(store, _whose, upload_limit=2_400_000, turns=Turns())
    media = await exact.upload_media("audio/mpeg", _three(800_000), _call())
    assert media.size_bytes == 2_400_000
    async with desk.download_media(media.media_id, "", _call()) as (found, pieces):
        assert found.size_bytes == sum([len(piece) async for piece in pieces])


async def test_a_stalled_upload_ends_at_the_deadline(store: MediaStore) -> None:
    desk = LocalMedia(store, _whose, turns=Turns())

    async def stalled() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    call = Call.from_headers({"x-request-timeout": "0.05"}.get, wire="rest")
    with pytest.raises(PomeloError) as error:
        await desk.upload_media("audio/mpeg", stalled(), call)
    assert refusal(error) == "deadline_exceeded"
    assert list(store.folder.iterdir()) == []


async def test_a_rest_upload_ends_with_its_request_and_a_grpc_upload_does_not(tmp_path: Path) -> None:
    store = MediaStore(tmp_path / "media", b"s" * 32)
    for wire, least, most in (("rest", 45, 51), ("grpc", 3590, 3601)):
        call = Call.from_headers({"x-request-timeout": "20"}.get, wire=wire)
        media = await LocalMedia(store, _whose, turns=Turns()).upload_media("audio/mpeg", _three(10), call)
        assert least < media.expire_time.seconds - time.time() + 1 <= most + 1
        path, found = store.find(media.media_id, "ann/test")
        assert found.expire_time.seconds == media.expire_time.seconds
        call.end()
        assert path.exists() == (wire == "grpc")
        call.end()


async def test_a_stalled_download_ends_at_the_deadline(store: MediaStore) -> None:
    desk = LocalMedia(store, _whose, turns=Turns())
    media_id = put(store, "ann/test", PNG * 10_000)
    call = Call.from_headers({"x-request-timeout": "0.05"}.get, wire="grpc")

    async def stalled() -> None:
        async with desk.download_media(media_id, "", call) as (_, pieces):
            async for _ in pieces:
                await asyncio.Event().wait()  # the reader stalls

    with pytest.raises(PomeloError) as error:
        await asyncio.wait_for(stalled(), 10)
    assert refusal(error) == "deadline_exceeded"


# --- how much is stored

KIB, MIB = 1024, 1024 * 1024


def limited(folder: Path, clock: Clock | None = None, **limits: int) -> MediaStore:
    """A store with such limits, without a reserve on the disk unless one is given."""
    return MediaStore(
        folder / "media",
        b"s" * 32,
        lifetime=60,
        limits=MediaLimits(**{"reserve": 0, **limits}),
        now=clock or time.time,
    )


def spool(store: MediaStore, owner: str, size: int, piece: int = 10_000) -> str:
    """Stores a media file of `size` bytes, piece by piece."""
    with store.writer(owner, "audio/mpeg") as writer:
        for at in range(0, size, piece):
            writer.write(b"x" * min(piece, size - at))
        return writer.commit().media_id


def on_disk(store: MediaStore) -> int:
    """The total size of all files in bytes."""
    return sum(path.stat().st_size for path in store.folder.iterdir())


@pytest.mark.parametrize("piece", [1_000, 65_536, 300_000])
def test_an_owner_stores_up_to_its_limit_and_not_a_byte_more(tmp_path: Path, piece: int) -> None:
    store = limited(tmp_path, account=MIB)
    for _ in range(4):
        spool(store, "ann", MIB // 4, piece)
    with pytest.raises(PomeloError) as error:
        spool(store, "ann", 1, piece)
    assert refusal(error) == "payload_too_large"
    assert "1,048,576" in error.value.message
    assert on_disk(store) == MIB
    assert spool(store, "bob", MIB, piece)


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
    assert spool(store, "ann", MIB)  # refused bytes do not count


def test_bytes_being_written_count(tmp_path: Path) -> None:
    store = limited(tmp_path, account=MIB)
    with store.writer("ann", "audio/mpeg") as writer:
        writer.write(b"x" * (MIB - 4 * KIB))
        with pytest.raises(PomeloError):
            spool(store, "ann", 4 * KIB + 1)
        assert spool(store, "ann", 4 * KIB)


def test_many_small_files_count_as_what_they_take_on_the_disk(tmp_path: Path) -> None:
    store = limited(tmp_path, account=40 * KIB)
    for _ in range(10):
        spool(store, "ann", 1)
    with pytest.raises(PomeloError):
        spool(store, "ann", 1)


def test_all_owners_together_store_up_to_the_total_and_the_caller_may_try_again(tmp_path: Path) -> None:
    store = limited(tmp_path, total=MIB, account=MIB)
    spool(store, "ann", 700 * KIB)
    with pytest.raises(PomeloError) as error:
        spool(store, "bob", 400 * KIB)
    assert refusal(error) == "store_unavailable"
    assert error.value.retry_after is not None
    assert spool(store, "bob", 324 * KIB)


async def test_stored_bytes_are_counted_again_after_a_restart(tmp_path: Path) -> None:
    store = limited(tmp_path, account=MIB)
    spool(store, "ann", 600 * KIB)
    spool(store, "bob", 100 * KIB)
    with store.writer("ann", "audio/mpeg") as left:
        left.write(b"x" * 200 * KIB)
        again = limited(tmp_path, account=MIB)  # the first process died while it wrote a part
        await again.refresh()
        assert again.quota.stored(again._tag("ann")) == 800 * KIB
        assert again.quota.stored(again._tag("bob")) == 100 * KIB
        with pytest.raises(PomeloError):
            spool(again, "ann", 225 * KIB)
        assert spool(again, "ann", 224 * KIB)


async def test_a_scan_counts_what_is_being_written(tmp_path: Path) -> None:
    store = limited(tmp_path, account=MIB)
    with store.writer("ann", "audio/mpeg") as writer:
        for size in (10_000, 300_000, 300_000):  # in the buffer, and on the disk
            writer.write(b"x" * size)
            await store.refresh()
            assert store.quota.stored(store._tag("ann")) == -(-writer.size // 4096) * 4096
    assert store.quota.stored(store._tag("ann")) == 0


async def test_expired_and_deleted_files_free_their_bytes(tmp_path: Path) -> None:
    clock = Clock()
    store = limited(tmp_path, clock, account=MIB)
    media_id = spool(store, "ann", MIB)
    store.delete(media_id, "ann")
    assert files(store) == []
    spool(store, "ann", MIB)
    clock.ahead = 61
    assert await store.refresh() == 1
    assert spool(store, "ann", MIB)
    for path in store.folder.iterdir():  # by hand
        path.unlink()
    await store.refresh()
    assert spool(store, "ann", MIB)


async def test_a_scan_counts_right_what_is_stored_and_deleted_meanwhile(tmp_path: Path) -> None:
    store = limited(tmp_path, account=100 * MIB)
    kept = [spool(store, "ann", 20 * KIB) for _ in range(200)]
    stop = threading.Event()
    turns = 0

    async def scan() -> None:
        nonlocal turns
        while not stop.is_set():
            await store.refresh()
            turns += 1

    scanning = asyncio.create_task(scan())
    for number in range(300):
        with store.writer("ann", "audio/mpeg") as writer:
            writer.write(b"x" * 100_000)
            await asyncio.sleep(0)
            kept.append(writer.commit().media_id)
        store.delete(kept.pop(number % len(kept)), "ann")
        await asyncio.sleep(0)
    stop.set()
    await scanning
    assert turns > 3
    expected = sum(-(-path.stat().st_size // 4096) * 4096 for path in store.folder.iterdir())
    assert store.quota.stored(store._tag("ann")) == expected


async def test_parts_are_deleted_once_their_writer_must_be_gone(tmp_path: Path) -> None:
    clock = Clock()
    store = limited(tmp_path, clock)
    (store.folder / f".part_{'0' * 42}").write_bytes(b"left by a process that died")
    (store.folder / "somebody else's").write_bytes(b"")
    clock.ahead = 890
    assert await store.refresh() == 0
    with store.writer("ann", "audio/mpeg") as writer:
        writer.write(b"x" * 100_000)
        clock.ahead = 10_000
        assert await store.refresh() == 1
        assert writer.commit().media_id in files(store)


async def test_a_file_that_cannot_be_deleted_does_not_stop_the_sweep(tmp_path: Path) -> None:
    clock = Clock()
    store = limited(tmp_path, clock)
    stuck = store.folder / f"media_{'0' * 42}.png"
    stuck.mkdir()  # unlink cannot delete a folder
    ids = [spool(store, "ann", 1) for _ in range(20)]
    clock.ahead = 61
    assert await store.refresh() == len(ids)
    assert files(store) == [stuck.name]


def test_a_reserve_of_the_disk_stays_free(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    store = limited(tmp_path, reserve=disk.f_bavail * disk.f_frsize + 1024 * MIB)
    for size in (1, 100_000):
        with pytest.raises(PomeloError) as error:
            spool(store, "ann", size)
        assert refusal(error) == "store_unavailable"
    assert files(store) == []
    with pytest.raises(PomeloError) as error:
        store.check_answer("ann", 1)
    assert refusal(error) == "store_unavailable"


@contextmanager
def no_file_grows(most: int) -> Iterator[None]:
    """Limits how large any file of this process may be, that of the test's own report too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("most", [0, 70_000, 200_000])
def test_a_full_disk_is_the_stores_failure_and_leaves_nothing(tmp_path: Path, most: int) -> None:
    store = limited(tmp_path, account=MIB)
    for piece in (1_000, 60_000, 100_000, 300_000):
        with pytest.raises(PomeloError) as error, no_file_grows(most):
            spool(store, "ann", 300_000, piece)
        assert refusal(error) == "store_unavailable"
        assert isinstance(error.value.__cause__, OSError)
        assert error.value.__cause__.errno == errno.EFBIG
        assert files(store) == []
    assert store.quota.stored(store._tag("ann")) == 0


@pytest.mark.parametrize("most", [0, 70_000, 200_000])
def test_media_stored_before_the_disk_was_full_can_be_read(tmp_path: Path, most: int) -> None:
    store = limited(tmp_path)
    for piece in (1_000, 60_000, 100_000):
        pieces = [bytes([number % 251]) * piece for number in range(300)]
        taken = 0
        with store.writer("ann", "audio/mpeg") as writer:
            with suppress(PomeloError), no_file_grows(most):
                for data in pieces:
                    writer.write(data)
                    taken += 1
            assert taken < 300
            assert writer.contents() == b"".join(pieces[:taken])


async def test_a_hundred_thousand_files_are_swept_quickly_and_off_the_loop(tmp_path: Path) -> None:
    clock = Clock()
    store = limited(tmp_path, clock)
    count = 100_000 if os.environ.get("LOAD_CALLS") else 2_000
    for _ in range(count):
        stem, _tag = store.new_stem("ann")
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
