"""The answers stored for an Idempotency-Key, and their media."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pomelo.call import Principal
from pomelo.catalog.catalog import Catalog
from pomelo.catalog.pricing import Usage
from pomelo.engine import idempotency
from pomelo.errors import PomeloError
from pomelo.gen.v1.media_pb2 import ResponseFormat
from pomelo.gen.v1.speech_pb2 import TextToSpeechInput
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.media.store import MediaStore
from pomelo.providers.base import AudioSource
from pomelo.providers.chunks import MAX_AUDIO_BYTES
from pomelo.stores.ledger import REPLAY_SECONDS
from pomelo.tasks.base import MAX_INLINE
from tests.tasks import to_task
from tests.unit.engine.jobs import accepted_job

MODELS = Catalog.load().models

UNASKED = ResponseFormat.RESPONSE_FORMAT_UNSPECIFIED
B64_JSON = ResponseFormat.RESPONSE_FORMAT_B64_JSON


def answer(media: MediaStore, data: bytes = b"ID3 a sound") -> TaskResult:
    """The result of a speech task whose audio was stored."""
    result = TaskResult(id="speech_1", model="eleven-labs-tts")
    with media.writer("ann/live", "audio/mpeg") as writer:
        writer.write(data)
        result.speech.media.CopyFrom(writer.commit())
    result.speech.data = data
    return result


def test_media_outlives_the_answer_that_it_belongs_to(tmp_path: Path) -> None:
    media = MediaStore(tmp_path / "media", b"s" * 32)
    result = answer(media)
    idempotency.store_answer(result, UNASKED, media, stream=False)
    # The lifetime of the answer starts at its settlement, a little after this point.
    path, _ = media.find(result.speech.media.media_id, "ann/live")
    lives = path.stat().st_mtime + media.lifetime - time.time()
    assert REPLAY_SECONDS + 30 < lives <= REPLAY_SECONDS + 60


def test_a_kept_answer_comes_back_to_its_owner_alone(tmp_path: Path) -> None:
    media = MediaStore(tmp_path / "media", b"s" * 32)
    kept = idempotency.store_answer(answer(media), UNASKED, media, stream=False)
    assert (
        idempotency.restore_answer(kept, UNASKED, "ann/live", media, stream=False).speech.data
        == b"ID3 a sound"
    )
    for other in ("ann/test", "bob/live"):
        with pytest.raises(PomeloError) as error:
            idempotency.restore_answer(kept, UNASKED, other, media, stream=False)
        assert error.value.code == "store_unavailable"


@pytest.mark.parametrize(
    ("size", "stream", "inline"),
    [(45 * 1024, True, True), (45 * 1024 + 1, True, False), (45 * 1024 + 1, False, True)],
)
def test_a_large_image_comes_back_in_a_stream_as_a_link(
    tmp_path: Path, size: int, stream: bool, inline: bool
) -> None:
    media = MediaStore(tmp_path / "media", b"s" * 32)
    result = TaskResult(id="img_1", model="flux-1-pro")
    image = result.image.images.add(content_type="image/png", data=bytes(size))
    with media.writer("ann/live", "image/png") as writer:
        writer.write(image.data)
        image.media.CopyFrom(writer.commit())
    kept = idempotency.store_answer(result, UNASKED, media, stream=stream)
    (found,) = idempotency.restore_answer(kept, UNASKED, "ann/live", media, stream=stream).image.images
    assert (len(found.data), bool(found.media.url)) == (size if inline else 0, True)


# --- what makes two requests the same


async def digest(body: dict[str, Any], audio: AudioSource | None = None) -> bytes:
    """The fingerprint of a request, given as the body of a REST request."""
    return await idempotency.fingerprint(to_task(body), audio)


SPEECH = {"model": "eleven-labs-tts", "text": "Hi", "voice": "adam"}
CHANGED = {"model": "eleven-labs-sts", "voice": "adam", "audio": "AAAA"}


async def test_how_an_answer_is_to_come_back_makes_no_other_request() -> None:
    formats = [{}, {"response_format": "url"}, {"response_format": "b64_json"}]
    assert len({await digest(SPEECH | one) for one in formats}) == 1
    for change in ({"text": "Ho"}, {"voice": "eve"}, {"output_format": "pcm_16000"}, {"seed": 1}):
        assert await digest(SPEECH | change) != await digest(SPEECH)


async def test_audio_counts_by_its_bytes_however_they_came(tmp_path: Path) -> None:
    path = tmp_path / "sound"
    path.write_bytes(b"OggS a sound")
    stored = AudioSource("audio/ogg", 12, path=path)
    inline = AudioSource("audio/wav", 12, data=b"OggS a sound")
    first = await digest(CHANGED, stored)
    assert await digest(CHANGED | {"audio": "BBBB"}, inline) == first
    assert await digest(CHANGED, AudioSource("audio/ogg", 12, data=b"OggS a sOund")) != first
    assert await digest(CHANGED | {"voice": "eve"}, stored) != first
    path.unlink()
    with pytest.raises(PomeloError) as raised:
        await digest(CHANGED, stored)
    assert raised.value.code == "store_unavailable"


async def test_of_an_idempotency_key_only_a_digest_is_kept() -> None:
    found = await idempotency.idempotency_key("order-7", to_task(SPEECH), None)
    assert "order" not in found.key
    assert found.fingerprint == await digest(SPEECH)
    assert found.key != (await idempotency.idempotency_key("order-8", to_task(SPEECH), None)).key


# --- links and bytes


def test_the_bytes_of_media_are_not_kept_in_the_answer(tmp_path: Path) -> None:
    media = MediaStore(tmp_path / "media", b"s" * 32)
    result = answer(media, bytes(100_000))
    assert len(idempotency.store_answer(result, UNASKED, media, stream=False)) < 1_000
    assert len(result.speech.data) == 100_000, "the caller gets them"


@pytest.mark.parametrize(
    ("wanted", "data", "stream", "linked"),
    [
        (UNASKED, True, False, True),
        (B64_JSON, True, False, False),
        (B64_JSON, False, False, True),  # too large to be inline
        (B64_JSON, False, True, False),
    ],
)
def test_a_link_that_the_caller_did_not_ask_for_is_left_out_where_the_bytes_are_there(
    tmp_path: Path, wanted: Any, data: bool, stream: bool, linked: bool
) -> None:
    media = MediaStore(tmp_path / "media", b"s" * 32)
    size = 10 if data or stream else MAX_INLINE + 1
    result = answer(media, bytes(size))
    if not data:
        result.speech.ClearField("data")
    kept = idempotency.store_answer(result, wanted, media, stream=stream)
    again = idempotency.restore_answer(kept, wanted, "ann/live", media, stream=stream)
    for shown in (result, again):
        assert shown.speech.HasField("media") == linked
        assert len(shown.speech.data) == (size if data else 0)


def test_an_answer_comes_back_with_a_link_that_lasts_as_long_as_its_media(tmp_path: Path) -> None:
    media = MediaStore(tmp_path / "media", b"s" * 32)
    result = answer(media)
    kept = idempotency.store_answer(result, UNASKED, media, stream=False)
    link = idempotency.restore_answer(kept, UNASKED, "ann/live", media, stream=False).speech.media
    assert link.expire_time.seconds > result.speech.media.expire_time.seconds + REPLAY_SECONDS / 2
    media.check_link(link.media_id, link.url.partition("?")[2])


async def test_a_stream_comes_back_in_the_order_of_the_first_one(tmp_path: Path) -> None:
    media = MediaStore(tmp_path / "media", b"s" * 32)
    data = b"ID3" + bytes(3 * MAX_AUDIO_BYTES)
    result = answer(media, data)
    result.created.seconds = 1_700_000_000
    result.speech.content_type = "audio/mpeg"
    result.adjustments.add(field="speed", used="1.2")
    kept = idempotency.store_answer(result, UNASKED, media, stream=True)
    accepted = accepted_job("speech_2", MODELS["eleven-labs-tts"], Usage(), Principal("ann", "k", True))
    job = replace(accepted.job, input=TextToSpeechInput(), stream=True)
    replayed = idempotency.ReplayedTask(kept, replace(accepted, job=job), media)
    again = replayed.result
    assert not again.speech.data
    started, *chunks, last = [event async for event in replayed.events()]
    assert (started.started.id, started.started.model) == ("speech_1", "eleven-labs-tts")
    assert started.started.created.seconds == 1_700_000_000
    assert list(started.started.adjustments) == list(result.adjustments)
    assert b"".join(chunk.audio_chunk.data for chunk in chunks) == data
    assert [chunk.audio_chunk.content_type for chunk in chunks] == ["audio/mpeg", "", "", ""]
    assert last.result == again
