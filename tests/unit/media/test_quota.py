"""The bytes of media are limited by owner and in total, and leave a reserve on the disk."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

import pytest

from pomelo.errors import PomeloError
from pomelo.media.quota import MediaLimits
from pomelo.media.store import MediaStore
from tests.unit.media.files import Clock, names
from tests.unit.refusals import refused

log = logging.getLogger(__name__)

KIB, MIB = 1024, 1024 * 1024


def limited(folder: Path, clock: Clock | None = None, **limits: int) -> MediaStore:
    """A store with these limits, without a disk reserve by default."""
    media_limits = MediaLimits(**{"reserve": 0, **limits})
    return MediaStore(folder / "media", b"s" * 32, lifetime=60, limits=media_limits, now=clock or time.time)


def store_file(store: MediaStore, owner: str, size: int, chunk: int = 10_000) -> str:
    """Stores a media file of `size` bytes, chunk by chunk."""
    with store.writer(owner, "audio/mpeg") as writer:
        for at in range(0, size, chunk):
            writer.write(b"x" * min(chunk, size - at))
        return writer.commit().id


def on_disk(store: MediaStore) -> int:
    return sum(path.stat().st_size for path in store.folder.iterdir())


@pytest.mark.parametrize("chunk", [1_000, 65_536, 300_000])
def test_an_owner_can_store_exactly_its_limit(tmp_path: Path, chunk: int) -> None:
    store = limited(tmp_path, account=MIB)
    for _ in range(4):
        store_file(store, "ann", MIB // 4, chunk)
    with refused("payload_too_large", match="1,048,576") as error:
        store_file(store, "ann", 1, chunk)
    assert error.value.values == {"usedBytes": "1048576", "maxBytes": "1048576"}
    assert on_disk(store) == MIB
    assert store_file(store, "bob", MIB, chunk)


def test_bytes_are_refused_before_they_are_written(tmp_path: Path) -> None:
    store = limited(tmp_path, account=MIB)

    def fill() -> None:
        with store.writer("ann", "audio/mpeg") as writer:
            while True:
                writer.write(b"x" * 100_000)
                assert on_disk(store) <= MIB

    with refused("payload_too_large"):
        fill()
    assert names(store) == []
    assert store_file(store, "ann", MIB)  # refused bytes do not count


def test_bytes_being_written_count_toward_the_limit(tmp_path: Path) -> None:
    store = limited(tmp_path, account=MIB)
    with store.writer("ann", "audio/mpeg") as writer:
        writer.write(b"x" * (MIB - 4 * KIB))
        with refused("payload_too_large"):
            store_file(store, "ann", 4 * KIB + 1)
        assert store_file(store, "ann", 4 * KIB)


def test_small_files_count_with_the_disk_space_that_they_occupy(tmp_path: Path) -> None:
    store = limited(tmp_path, account=40 * KIB)
    for _ in range(10):
        store_file(store, "ann", 1)
    with refused("payload_too_large"):
        store_file(store, "ann", 1)


def test_all_owners_share_the_total_limit_and_callers_may_retry(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = limited(tmp_path, total=MIB, account=MIB)
    store_file(store, "ann", 700 * KIB)
    with refused("store_unavailable") as error:
        store_file(store, "bob", 400 * KIB)
    assert error.value.retry_after is not None
    for size in (300 * KIB, 24 * KIB):
        assert store_file(store, "bob", size)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "Refused to store media",
        "Media can be stored again",
    ]


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
        with refused("payload_too_large"):
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


async def test_expired_and_deleted_files_free_their_bytes(tmp_path: Path, clock: Clock) -> None:
    store = limited(tmp_path, clock, account=MIB)
    media_id = store_file(store, "ann", MIB)
    store.delete(media_id, "ann")
    assert names(store) == []
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
    active, scans = True, 0

    async def scan() -> None:
        nonlocal scans
        while active:
            await store.refresh()
            scans += 1

    scanning = asyncio.create_task(scan())
    for number in range(300):
        with store.writer("ann", "audio/mpeg") as writer:
            writer.write(b"x" * 100_000)
            await asyncio.sleep(0)
            media_ids.append(writer.commit().id)
        store.delete(media_ids.pop(number % len(media_ids)), "ann")
        await asyncio.sleep(0)
    active = False
    await scanning
    assert scans > 3
    expected = sum(-(-path.stat().st_size // 4096) * 4096 for path in store.folder.iterdir())
    assert store.quota.stored(store.ids.owner_tag("ann")) == expected


@pytest.mark.parametrize("listed", [False, True], ids=["before_the_files_are_listed", "after_it"])
async def test_a_file_stored_or_deleted_during_a_scan_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    store = limited(tmp_path, account=MIB)
    deleted, _ = store_file(store, "ann", 20 * KIB), store_file(store, "ann", 40 * KIB)
    paused, resumed = threading.Event(), threading.Event()
    scandir = os.scandir

    def pause() -> Iterator[os.DirEntry[str]]:
        paused.set()
        assert resumed.wait(10)
        yield from ()

    @contextmanager
    def paused_scandir(folder: Path) -> Iterator[Iterator[os.DirEntry[str]]]:
        with scandir(folder) as entries:
            yield chain(entries, pause()) if listed else chain(pause(), entries)

    monkeypatch.setattr(os, "scandir", paused_scandir)
    scanning = asyncio.create_task(store.refresh())
    assert await asyncio.to_thread(paused.wait, 10)
    store.delete(deleted, "ann")
    store_file(store, "ann", 80 * KIB)
    store.delete(store_file(store, "ann", 160 * KIB), "ann")
    resumed.set()
    assert await scanning == 0
    assert store.quota.stored(store.ids.owner_tag("ann")) == (40 + 80) * KIB


async def test_partial_files_without_a_writer_are_deleted(tmp_path: Path, clock: Clock) -> None:
    store = limited(tmp_path, clock)
    (store.folder / f".part_{'0' * 42}").write_bytes(b"left by a process that died")
    (store.folder / "unrelated").write_bytes(b"")
    clock.ahead = 890
    assert await store.refresh() == 0
    with store.writer("ann", "audio/mpeg") as writer:
        writer.write(b"x" * 100_000)
        clock.ahead = 10_000
        assert await store.refresh() == 1
        assert writer.commit().id in names(store)
        assert store.partial == {}


async def test_a_link_to_a_missing_file_is_deleted_when_it_expires(tmp_path: Path, clock: Clock) -> None:
    store = limited(tmp_path, clock)
    (store.folder / f"media_{'0' * 42}.png").symlink_to("missing")
    assert await store.refresh() == 0
    clock.ahead = 61
    assert await store.refresh() == 1
    assert names(store) == []


async def test_a_file_that_cannot_be_deleted_does_not_stop_the_scan(tmp_path: Path, clock: Clock) -> None:
    store = limited(tmp_path, clock)
    stuck = store.folder / f"media_{'0' * 42}.png"
    stuck.mkdir()  # unlink cannot delete a folder
    ids = [store_file(store, "ann", 1) for _ in range(20)]
    clock.ahead = 61
    assert await store.refresh() == len(ids)
    assert names(store) == [stuck.name]


@pytest.mark.parametrize(("account", "total"), [(MIB, 10 * MIB), (10 * MIB, MIB)])
def test_an_answer_needs_its_estimated_size_but_at_most_a_quarter_of_a_limit(
    tmp_path: Path, account: int, total: int
) -> None:
    store = limited(tmp_path, account=account, total=total)
    store.check_answer("ann", 100 * MIB)
    store_file(store, "ann", 3 * MIB // 4)
    store.check_answer("ann", 100 * MIB)
    store_file(store, "ann", 4 * KIB)
    store.check_answer("ann", MIB // 4 - 4 * KIB)
    with refused("payload_too_large" if account < total else "store_unavailable"):
        store.check_answer("ann", MIB // 4 - 4 * KIB + 1)


def test_an_answer_must_leave_the_disk_reserve(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    store = limited(tmp_path, reserve=disk.f_bavail * disk.f_frsize // 2)
    store.check_answer("ann", 1)
    with refused("store_unavailable"):
        store.check_answer("ann", disk.f_bavail * disk.f_frsize)


def test_by_default_a_tenth_of_a_small_disk_stays_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = list(os.statvfs(tmp_path))
    store = MediaStore(tmp_path / "media", b"s" * 32)
    for free, accepted in ((101, True), (100, True), (99, False)):  # of 1,000 blocks of a MiB
        disk[:5] = [MIB, MIB, 1_000, free, free]
        monkeypatch.setattr(os, "statvfs", lambda folder: os.statvfs_result(disk))
        if accepted:
            store.check_answer("ann", 0)
        else:
            with refused("store_unavailable"):
                store.check_answer("ann", 0)


def test_without_a_reserve_a_disk_may_run_out_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = list(os.statvfs(tmp_path))
    disk[:8] = [MIB, MIB, 1_000, 1_000, 1_000, 10_000, 10, 10]  # ten files are left
    monkeypatch.setattr(os, "statvfs", lambda folder: os.statvfs_result(disk))
    limited(tmp_path).check_answer("ann", 0)
    with refused("store_unavailable"):
        limited(tmp_path, reserve=1).check_answer("ann", 0)


def test_missing_space_is_logged_once_a_minute(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = limited(tmp_path, total=4 * KIB)
    for _ in range(3):
        with refused("store_unavailable"):
            store_file(store, "ann", 5 * KIB)
    (line,) = caplog.messages
    assert "POMELO_MEDIA_LIMIT is 4,096" in line


async def test_deleted_files_free_the_total(tmp_path: Path) -> None:
    store = limited(tmp_path, total=8 * KIB)
    for _ in range(3):
        media_ids = [store_file(store, "ann", 4 * KIB) for _ in range(2)]
        with refused("store_unavailable"):
            store_file(store, "bob", 1)
        for media_id in media_ids:
            store.delete(media_id, "ann")


def test_a_discarded_or_committed_file_leaves_no_descriptor_open(tmp_path: Path) -> None:
    store = limited(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        store_file(store, "ann", 100_000)
        with store.writer("ann", "audio/mpeg") as writer:
            writer.write(b"x" * 100_000)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert store.partial == {}


def test_the_disk_reserve_stays_free(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    store = limited(tmp_path, reserve=disk.f_bavail * disk.f_frsize + 1024 * MIB)
    for size in (1, 100_000):
        with refused("store_unavailable"):
            store_file(store, "ann", size)
    assert names(store) == []
    with refused("store_unavailable"):
        store.check_answer("ann", 1)


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
        with refused("store_unavailable") as error, max_file_size(size):
            store_file(store, "ann", 300_000, chunk)
        assert isinstance(error.value.__cause__, OSError)
        assert error.value.__cause__.errno == errno.EFBIG
        assert names(store) == []
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


async def test_a_hundred_thousand_files_are_scanned_quickly_without_blocking_the_loop(
    tmp_path: Path, clock: Clock
) -> None:
    store = limited(tmp_path, clock)
    full = bool(os.environ.get("LOAD_CALLS"))
    count = 100_000 if full else 2_000
    for _ in range(count):
        stem = store.ids.new_stem(store.ids.owner_tag("ann"))
        os.close(os.open(store.folder / f"media_{stem}.png", os.O_CREAT | os.O_WRONLY))
    longest, turns = 0.0, 0

    async def watch() -> None:
        nonlocal longest, turns
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            longest, turns = max(longest, time.monotonic() - before), turns + 1

    watching = asyncio.create_task(watch())
    for ahead, deleted in ((0, 0), (61, count)):
        clock.ahead, turns = ahead, 0
        started = time.monotonic()
        assert await store.refresh() == deleted
        took = time.monotonic() - started
        log.info("%d files, %d deleted: %.2f s, the loop waited %.0f ms", count, deleted, took, longest * 1e3)
        assert turns > 1
        assert not full or took < 1 + count / 2_000
    watching.cancel()
    assert not full or longest < 1.0


def test_what_needs_no_more_space_is_not_refused(tmp_path: Path) -> None:
    quota = limited(tmp_path, account=KIB, total=KIB).quota
    quota.load({b"ann": 2 * KIB})  # as other processes stored it
    quota.add(b"ann", 0)
