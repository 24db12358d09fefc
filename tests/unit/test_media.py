"""Media: who may have them, until when, and that nothing else is left on the disk."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomelo.call import Call, Principal
from pomelo.errors import PomeloError
from pomelo.media import MediaDesk, MediaStore, sniff
from pomelo.turns import Turns

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


def test_a_medium_and_its_link_expire_together_and_are_swept(store: MediaStore, clock: Clock) -> None:
    media_id = put(store)
    query = store.find(media_id, "ann")[1].url.partition("?")[2]
    clock.ahead = 58
    store.check(media_id, query)
    assert store.sweep() == 0
    clock.ahead = 61
    for gone in (lambda: store.find(media_id, "ann"), lambda: store.check(media_id, query)):
        with pytest.raises(PomeloError) as error:
            gone()
        assert refusal(error) == "not_found"
    assert store.sweep() == 1
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
    with store.writer("ann", "audio/mpeg") as writer, pytest.raises(PomeloError) as error:
        writer.write(b"x")
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


async def _whose(call: Call) -> Principal:
    return Principal("ann", "k", live=False)


async def _three(size: int) -> AsyncIterator[bytes]:
    for _ in range(3):
        yield b"x" * size


def _call() -> Call:
    return Call.from_headers({}.get, wire="rest")


async def test_an_upload_above_the_limit_is_refused_and_leaves_nothing(store: MediaStore) -> None:
    desk = MediaDesk(store, _whose, upload_limit=2_500_000, turns=Turns())
    with pytest.raises(PomeloError) as error:
        await desk.upload_media("audio/mpeg", _three(1_000_000), _call())
    assert refusal(error) == "payload_too_large"
    assert list(store.folder.iterdir()) == []
    media = await desk.upload_media("audio/mpeg", _three(800_000), _call())
    assert media.size_bytes == 2_400_000
    async with desk.download_media(media.media_id, "", _call()) as (found, pieces):
        assert found.size_bytes == sum([len(piece) async for piece in pieces])


async def test_a_stalled_upload_ends_at_the_deadline(store: MediaStore) -> None:
    desk = MediaDesk(store, _whose, turns=Turns())

    async def stalled() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    call = Call.from_headers({"x-request-timeout": "0.05"}.get, wire="rest")
    with pytest.raises(PomeloError) as error:
        await desk.upload_media("audio/mpeg", stalled(), call)
    assert refusal(error) == "deadline_exceeded"
    assert list(store.folder.iterdir()) == []
