"""Media are stored, found by their owner, and deleted when they expire."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomelo.call import Principal
from pomelo.media.quota import BLOCK, MediaLimits, Quota
from pomelo.media.store import MediaStore
from tests.unit.media.files import PNG, Clock, names, put
from tests.unit.refusals import refused


def test_a_media_file_is_found_by_its_owner_alone(store: MediaStore) -> None:
    media_id = put(store)
    path, media = store.find(media_id, "ann")
    assert path.read_bytes() == PNG
    assert (media.content_type, media.size_bytes) == ("image/png", len(PNG))
    for other in ("bob", "", "ann "):
        with refused("not_found"):
            store.find(media_id, other)


def test_a_link_needs_no_owner_and_is_valid_for_one_file(store: MediaStore) -> None:
    media_id, other = put(store), put(store)
    url = store.find(media_id, "ann")[1].url
    path, _, query = url.removeprefix("https://pomelo.test").partition("?")
    assert path == f"/media/{media_id}"
    store.check_link(media_id, query)
    for wrong in (other, media_id.replace(".png", ".jpg")):
        with refused("not_found"):
            store.check_link(wrong, query)
    for forged in (
        query.replace("exp=", "exp=9"),
        query[:-1] + ("A" if query[-1] != "A" else "B"),
        query + "&x=1",
        "",
        "exp=1&sig=",
    ):
        with refused("not_found"):
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
    with refused("not_found"):
        store.find(media_id, "ann")
    with refused("not_found"):
        store.check_link(media_id, query)
    assert await store.refresh() == 1
    assert names(store) == []


async def test_expired_files_are_deleted_among_files_of_others(store: MediaStore, clock: Clock) -> None:
    for number in range(10):
        put(store)
        (store.folder / f"notes{number}").touch()
    clock.ahead = 61
    assert await store.refresh() == 10
    assert names(store) == [f"notes{number}" for number in range(10)]


@given(st.text(max_size=80))
def test_no_id_leads_out_of_the_folder(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    store = MediaStore(tmp_path_factory.getbasetemp() / "none", b"s" * 32)
    for media_id in (text, f"../{text}", f"media_{text}.png"):
        with refused("not_found"):
            store.find(media_id, None)


def test_an_uncommitted_file_is_deleted(store: MediaStore) -> None:
    writer = store.writer("ann", "audio/mpeg")
    writer.write(b"ID3" * 100_000)
    with pytest.raises(RuntimeError), writer:
        raise RuntimeError
    assert names(store) == []


def test_a_disk_failure_is_reported_as_store_unavailable(tmp_path: Path) -> None:
    store = MediaStore(tmp_path / "media", b"s" * 32)
    store.folder.rmdir()
    with store.writer("ann", "audio/mpeg") as writer:
        writer.write(b"x")
        with refused("store_unavailable"):
            writer.commit()


@pytest.mark.parametrize("live", [True, False])
def test_a_mode_of_an_account_cannot_read_media_of_the_other(store: MediaStore, live: bool) -> None:
    mine, other = Principal("ann", "k", live), Principal("ann", "k", not live)
    media_id = put(store, mine.owner)
    assert store.find(media_id, mine.owner)
    with refused("not_found"):
        store.find(media_id, other.owner)
    store.delete(media_id, other.owner)
    assert store.find(media_id, mine.owner)
    store.delete(media_id, mine.owner)
    assert names(store) == []


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
    with refused("not_found"):
        store.find(media_id, "ann")
    now += 0.25
    with refused("not_found"):
        store.check_link(media_id, query)
    now -= 0.25
    assert await store.refresh() == 1


def test_another_process_deletes_no_file_that_is_being_completed(tmp_path: Path) -> None:
    other = MediaStore(tmp_path, b"s" * 32)

    class Scanned(MediaStore):
        def publish(self, partial: Path, media_id: str, owner_tag: bytes, size: int) -> None:
            other._scan_folder()
            super().publish(partial, media_id, owner_tag, size)

    store = Scanned(tmp_path, b"s" * 32)
    with store.writer("ann", "image/png") as writer:
        writer.write(PNG)
        media = writer.commit(lifetime=60)
    other._scan_folder()
    assert store.find(media.id, "ann")[0].read_bytes() == PNG


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


async def test_files_and_links_of_the_previous_secret_stay_valid(tmp_path: Path) -> None:
    old = MediaStore(tmp_path / "media", b"o" * 32)
    media_id = put(old)
    query = old.find(media_id, "ann")[1].url.partition("?")[2]
    with refused("not_found"):
        MediaStore(tmp_path / "media", b"n" * 32).find(media_id, "ann")
    new = MediaStore(tmp_path / "media", b"n" * 32, previous_secrets=[b"x" * 32, b"o" * 32])
    new.check_link(media_id, query)
    assert new.find(media_id, "ann")[1].url.partition("?")[2] != query
    with refused("not_found"):
        new.find(media_id, "bob")
    await new.refresh()
    new.delete(media_id, "ann")
    assert names(new) == []
    assert new.quota.stored(new.ids.tag_of(media_id)) == 0


def test_a_file_that_is_gone_is_not_found_and_can_not_be_kept(store: MediaStore) -> None:
    media_id = put(store)
    (store.folder / media_id).unlink()
    with refused("not_found"):
        store.find(media_id, "ann")
    with refused("store_unavailable"):
        store.keep(media_id, 10)


def test_what_was_written_can_be_read_before_it_is_complete(store: MediaStore) -> None:
    with store.writer("ann", "audio/mpeg") as writer:
        for data in (b"ID3" * 30_000, b"the end"):
            writer.write(data)
        assert writer.contents() == b"ID3" * 30_000 + b"the end"
        own = writer._descriptor
        with open("/proc/self/mem", "rb") as unreadable:  # noqa: PTH123
            writer._descriptor = unreadable.fileno()
            with refused("store_unavailable"):
                writer.contents()
            writer._descriptor = own
        assert own is not None
        os.truncate(own, 1_000)
        with refused("store_unavailable"):
            writer.contents()


async def test_a_folder_that_was_deleted_is_reported_once_and_created_by_the_next_refresh(
    store: MediaStore, caplog: pytest.LogCaptureFixture
) -> None:
    put(store)
    shutil.rmtree(store.folder)
    for _ in range(2):
        with refused("store_unavailable"):
            put(store)
    reason = f"{store.folder} can't be read: No such file or directory"
    assert caplog.messages == [f"Refused to store media: {reason}"]
    assert await store.refresh() == 0
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert store.find(put(store), "ann")[0].read_bytes() == PNG
    assert store.quota.total == BLOCK
    assert caplog.messages[1:] == ["Media can be stored again"]


def test_the_log_says_why_a_file_can_not_be_written(
    store: MediaStore, caplog: pytest.LogCaptureFixture
) -> None:
    with store.writer("ann", "image/png") as writer:
        writer.write(PNG)
        store.folder.rename(store.folder.with_name("aside"))
        store.folder.write_bytes(b"")
        with refused("store_unavailable"):
            writer.commit()
    reason = f"a file in {store.folder} can't be written: Not a directory"
    assert caplog.messages == [f"Refused to store media: {reason}"]


def test_a_file_that_is_discarded_twice_is_subtracted_once(store: MediaStore) -> None:
    put(store)
    before = store.quota.total
    for closings in (1, 2, 3):
        writer = store.writer("ann", "image/png")
        writer.write(b"x" * 10_000)
        assert store.quota.total == before + 12_288
        for _ in range(closings):
            writer.close()
        assert store.quota.total == before


def test_counts_are_never_negative(tmp_path: Path) -> None:
    quota = Quota(tmp_path, MediaLimits(total=100, account=100, reserve=0))
    quota.add(b"ann", 10)
    quota.remove(b"ann", 50)
    assert (quota.stored(b"ann"), quota.total) == (0, 0)
    quota.add(b"ann", 100)
    assert (quota.stored(b"ann"), quota.total) == (100, 100)


async def test_changes_are_noted_only_during_a_scan(store: MediaStore) -> None:
    await store.refresh()
    put(store)
    assert store._changes is None
    store.folder.rename(store.folder.with_name("gone"))
    store.folder.touch()
    with pytest.raises(FileExistsError):
        await store.refresh()
    assert store._changes is None


async def test_an_unknown_file_type_or_a_file_that_expires_as_it_is_opened_is_not_found(
    store: MediaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    media_id = put(store)
    with refused("not_found"):
        store.find(media_id.replace(".png", ".exe"), "ann")
    found = store.find(media_id, "ann")
    monkeypatch.setattr(store, "find", lambda media_id, owner: found)
    found[0].unlink()
    with refused("not_found"):
        await store.open(media_id, "ann")
    found[0].mkdir()  # nothing that can be read
    with refused("store_unavailable"):
        await store.open(media_id, "ann")


def test_a_folder_that_can_not_be_read_is_no_missing_file(store: MediaStore) -> None:
    media_id = put(store)
    store.folder.rename(store.folder.parent / "moved")
    store.folder.touch()
    with refused("store_unavailable"):
        store.find(media_id, "ann")


def test_a_file_and_its_link_end_in_the_same_second(store: MediaStore) -> None:
    for now in (1_000_000.1, 1_000_000.9):
        media = store.describe(put(store), "image/png", 1, now)
        assert f"?exp={media.expire_time.seconds}&" in media.url
        assert media.expire_time.seconds == 1_000_000


def test_a_refusal_has_what_its_own_owner_stores(tmp_path: Path) -> None:
    store = MediaStore(tmp_path / "media", b"s" * 32, limits=MediaLimits(account=2 * BLOCK, reserve=0))
    for owner in ("ann", "bob"):
        put(store, owner)
    with refused("payload_too_large") as error:
        put(store, "ann", bytes(BLOCK + 1))
    assert error.value.values == {"usedBytes": "4096", "maxBytes": "8192"}
