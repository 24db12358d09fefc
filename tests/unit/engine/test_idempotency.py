"""The answers stored for an Idempotency-Key, and their media."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pomelo.call import Principal
from pomelo.catalog.catalog import Catalog
from pomelo.catalog.pricing import Usage
from pomelo.engine import idempotency
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.gen.v1.speech_pb2 import TextToSpeechInput
from pomelo.gen.v1.task_pb2 import TaskResult, TaskSpec
from pomelo.gen.v1.usage_pb2 import Usage as UsageCounts
from pomelo.media.store import MediaStore
from pomelo.providers.base import AudioSource
from pomelo.providers.chunks import MAX_AUDIO_BYTES
from pomelo.stores.ledger import REPLAY_SECONDS, LimitStatus, ReplayedAnswer
from pomelo.stores.usage import UsageRecord
from pomelo.tasks.base import LARGE, MAX_INLINE
from tests.calls import call_of
from tests.tasks import TASK_TYPES, small_task, to_task
from tests.unit.engine.jobs import accepted_job
from tests.unit.loop import iterations
from tests.unit.refusals import refused

MODELS = Catalog.load().models

UNSPECIFIED = MediaDelivery.MEDIA_DELIVERY_UNSPECIFIED
INLINE = MediaDelivery.MEDIA_DELIVERY_INLINE

restore_answer = partial(idempotency.restore_answer, reserve=lambda size: None)


RECORD = UsageRecord("speech_1", "req_1", "ann", True, "k", "rest", "eleven-labs-tts", "text_to_speech",
                     characters=2, cost=160)  # fmt: skip


@pytest.fixture
def media(tmp_path: Path) -> MediaStore:
    return MediaStore(tmp_path / "media", b"s" * 32)


def answer(media: MediaStore, data: bytes = b"ID3 some audio") -> TaskResult:
    """The result of a speech task whose audio was stored."""
    result = TaskResult(id="speech_1", model="eleven-labs-tts")
    with media.writer("ann/live", "audio/mpeg") as writer:
        writer.write(data)
        result.speech.media.CopyFrom(writer.commit())
    result.speech.data = data
    return result


def test_what_a_replay_has_inline_is_counted_before_it_is_read(media: MediaStore) -> None:
    stored = idempotency.store_answer(answer(media), UNSPECIFIED, media, stream=False)
    for delivery, counted in ((UNSPECIFIED, [14]), (MediaDelivery.MEDIA_DELIVERY_LINK, [])):
        sizes: list[int] = []
        idempotency.restore_answer(stored, delivery, "ann/live", media, stream=False, reserve=sizes.append)
        assert sizes == counted


def test_media_outlives_the_answer_that_it_belongs_to(media: MediaStore) -> None:
    result = answer(media)
    idempotency.store_answer(result, UNSPECIFIED, media, stream=False)
    # The lifetime of the answer starts at its settlement, a little after this point.
    path, _ = media.find(result.speech.media.id, "ann/live")
    lifetime = path.stat().st_mtime + media.lifetime - time.time()
    assert REPLAY_SECONDS + 30 < lifetime <= REPLAY_SECONDS + 60


def test_a_stored_answer_is_replayed_only_to_its_owner(media: MediaStore) -> None:
    stored = idempotency.store_answer(answer(media), UNSPECIFIED, media, stream=False)
    assert (
        restore_answer(stored, UNSPECIFIED, "ann/live", media, stream=False)[0].speech.data
        == b"ID3 some audio"
    )
    for other in ("ann/test", "bob/live"):
        with refused("store_unavailable"):
            restore_answer(stored, UNSPECIFIED, other, media, stream=False)


@pytest.mark.parametrize(
    ("size", "stream", "inline"),
    [(45 * 1024, True, True), (45 * 1024 + 1, True, False), (45 * 1024 + 1, False, True)],
)
def test_a_large_image_is_replayed_in_a_stream_as_a_link(
    media: MediaStore, size: int, stream: bool, inline: bool
) -> None:
    result = TaskResult(id="img_1", model="flux-1-pro")
    image = result.image.images.add(content_type="image/png", data=bytes(size))
    with media.writer("ann/live", "image/png") as writer:
        writer.write(image.data)
        image.media.CopyFrom(writer.commit())
    stored = idempotency.store_answer(result, UNSPECIFIED, media, stream=stream)
    replayed, _ = restore_answer(stored, UNSPECIFIED, "ann/live", media, stream=stream)
    (image,) = replayed.image.images
    assert (len(image.data), bool(image.media.url)) == (size if inline else 0, True)


# --- fingerprints: which requests are equal


async def digest(body: dict[str, Any], audio: AudioSource | None = None) -> bytes:
    """Returns the fingerprint of a request, given as the body of a REST request."""
    return await idempotency.fingerprint(to_task(body), audio)


SPEECH = {"model": "eleven-labs-tts", "text": "Hi", "voice": "adam"}
CHANGED = {"model": "eleven-labs-sts", "voice": "adam", "audio": "AAAA"}


async def test_an_answer_of_the_previous_form_has_another_fingerprint() -> None:
    # This serializes to the bytes whose digest was the fingerprint of the answers of the previous form.
    spec = to_task({"model": "flux-1-pro", "prompt": "A kite"})
    previous = hashlib.sha256(spec.SerializeToString(deterministic=True)).digest()
    assert await idempotency.fingerprint(spec, None) != previous


async def test_the_response_format_does_not_change_the_fingerprint() -> None:
    formats = [{}, {"response_format": "url"}, {"response_format": "b64_json"}]
    assert len({await digest(SPEECH | one) for one in formats}) == 1
    for change in ({"text": "Ho"}, {"voice": "eve"}, {"output_format": "pcm_16000"}, {"seed": 1}):
        assert await digest(SPEECH | change) != await digest(SPEECH)


@pytest.mark.parametrize("task_type", TASK_TYPES)
async def test_the_user_and_the_metadata_change_the_fingerprint(task_type: str) -> None:
    spec = small_task(task_type)
    audio = AudioSource("audio/mpeg", 3, data=b"ID3") if task_type.startswith("speech") else None
    digests = [await idempotency.fingerprint(spec, audio)]
    for labels in (
        TaskSpec(user="ann"),
        TaskSpec(user="bob"),
        TaskSpec(metadata={"a": "1", "b": "2"}),
        TaskSpec(metadata={"a": "2", "b": "1"}),
        TaskSpec(metadata={"a": "1"}),
        TaskSpec(metadata={"a": "1", "b": ""}),
    ):
        labelled = TaskSpec()
        labelled.CopyFrom(spec)
        labelled.MergeFrom(labels)
        digests.append(await idempotency.fingerprint(labelled, audio))
    assert len(set(digests)) == 7
    for order in ("abcdefgh", "hgfedcba"):
        spec.metadata.clear()
        for key in order:
            spec.metadata[key] = key.upper()
        digests.append(await idempotency.fingerprint(spec, audio))
    assert digests[-1] == digests[-2]
    assert len(set(digests)) == 8


async def test_the_fingerprint_of_audio_depends_only_on_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "audio"
    path.write_bytes(b"OggS audio")
    stored = AudioSource("audio/ogg", 10, path=path)
    inline = AudioSource("audio/wav", 10, data=b"OggS audio")
    first = await digest(CHANGED, stored)
    assert await digest(CHANGED | {"audio": "BBBB"}, inline) == first
    assert await digest(CHANGED, AudioSource("audio/ogg", 10, data=b"OggS aUdio")) != first
    assert await digest(CHANGED | {"voice": "eve"}, stored) != first
    path.unlink()
    with refused("store_unavailable"):
        await digest(CHANGED, stored)


async def test_the_media_type_of_bare_samples_changes_the_fingerprint() -> None:
    types = [
        "audio/pcm;rate=8000",
        "audio/pcm;rate=16000",
        "audio/l16;rate=16000",
        "audio/basic",
        "audio/ogg",
    ]
    digests = [await digest(CHANGED, AudioSource(each, 4, data=bytes(4))) for each in (*types, *types)]
    assert digests[:5] == digests[5:]
    assert len(set(digests)) == 5


async def test_only_a_digest_of_an_idempotency_key_is_stored() -> None:
    key = await idempotency.idempotency_key("order-7", to_task(SPEECH), None)
    assert "order" not in key.key
    assert key.fingerprint == await digest(SPEECH)
    assert key.key != (await idempotency.idempotency_key("order-8", to_task(SPEECH), None)).key


# --- links and bytes


def test_the_bytes_of_media_are_not_stored_in_the_answer(media: MediaStore) -> None:
    result = answer(media, bytes(100_000))
    assert len(idempotency.store_answer(result, UNSPECIFIED, media, stream=False)) < 1_000
    assert len(result.speech.data) == 100_000, "the caller receives the bytes"


@pytest.mark.parametrize(
    ("requested", "data", "stream", "linked"),
    [
        (UNSPECIFIED, True, False, True),
        (INLINE, True, False, False),
        (INLINE, False, False, True),  # too large to be inline
        (INLINE, False, True, False),
    ],
)
def test_an_unrequested_link_is_omitted_if_the_bytes_are_inline(
    media: MediaStore, requested: Any, data: bool, stream: bool, linked: bool
) -> None:
    size = 10 if data or stream else MAX_INLINE + 1
    result = answer(media, bytes(size))
    if not data:
        result.speech.ClearField("data")
    stored = idempotency.store_answer(result, requested, media, stream=stream)
    replayed, _ = restore_answer(stored, requested, "ann/live", media, stream=stream)
    for speech_result in (result, replayed):
        assert speech_result.speech.HasField("media") == linked
        assert len(speech_result.speech.data) == (size if data else 0)


def test_a_replayed_answer_has_a_link_that_is_valid_as_long_as_its_media(media: MediaStore) -> None:
    result = answer(media)
    stored = idempotency.store_answer(result, UNSPECIFIED, media, stream=False)
    link = restore_answer(stored, UNSPECIFIED, "ann/live", media, stream=False)[0].speech.media
    assert link.expire_time.seconds > result.speech.media.expire_time.seconds + REPLAY_SECONDS / 2
    media.check_link(link.id, link.url.partition("?")[2])


@pytest.mark.parametrize("gone", [True, False])
def test_a_stored_answer_whose_file_is_gone_asks_for_no_repetition(media: MediaStore, gone: bool) -> None:
    stored = idempotency.store_answer(answer(media), UNSPECIFIED, media, stream=False)
    (path,) = [one for one in media.folder.iterdir() if one.name.startswith("media_")]
    path.unlink()
    if not gone:
        path.mkdir()  # can't be read
    with refused("store_unavailable") as refusal:
        restore_answer(stored, UNSPECIFIED, "ann/live", media, stream=False)
    assert refusal.value.repeatable is not gone
    assert ("is gone" in refusal.value.message) is gone


def test_a_stored_answer_whose_file_was_truncated_by_a_power_cut_is_not_returned(media: MediaStore) -> None:
    stored = idempotency.store_answer(answer(media, bytes(10)), UNSPECIFIED, media, stream=False)
    (path,) = [one for one in media.folder.iterdir() if one.name.startswith("media_")]
    os.truncate(path, 9)
    for stream in (False, True):
        with refused("store_unavailable", match="is gone") as refusal:
            restore_answer(stored, UNSPECIFIED, "ann/live", media, stream=stream)
        assert not refusal.value.repeatable


async def test_a_replayed_stream_has_the_order_of_the_first_one(media: MediaStore) -> None:
    data = b"ID3" + bytes(3 * MAX_AUDIO_BYTES)
    result = answer(media, data)
    result.create_time.seconds = 1_700_000_000
    result.speech.content_type = "audio/mpeg"
    result.adjustments.add(field="speed", used="1.2")
    stored = idempotency.store_answer(result, UNSPECIFIED, media, stream=True)
    accepted = accepted_job("speech_2", MODELS["eleven-labs-tts"], Usage(), Principal("ann", "k", True))
    job = replace(accepted.job, input=TextToSpeechInput(), stream=True)
    replayed = idempotency.ReplayedTask(
        ReplayedAnswer(LimitStatus(0), RECORD, stored), replace(accepted, job=job), media, call_of("")
    )
    assert not replayed.result.speech.data
    started, *chunks, last = [event async for event in replayed.events()]
    assert (started.started.id, started.started.model) == ("speech_1", "eleven-labs-tts")
    assert started.started.create_time.seconds == 1_700_000_000
    assert list(started.started.adjustments) == list(result.adjustments)
    assert b"".join(chunk.audio_chunk.data for chunk in chunks) == data
    assert [chunk.audio_chunk.content_type for chunk in chunks] == ["audio/mpeg", "", "", ""]
    assert last.completed == replayed.result
    assert (last.completed.usage, last.completed.cost_micros) == (UsageCounts(characters=2), 160)
    assert [event.sequence_number for event in (started, *chunks, last)] == list(range(1, 7))


async def test_the_replays_of_transcripts_with_many_words_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "REPLAY_RATE", 1)  # byte a second
    accepted = accepted_job("speech_2", MODELS["eleven-labs-stt"], Usage(), Principal("ann", "k", True))
    queue, waits = idempotency.ReplayQueue(), []
    for size in (LARGE, LARGE, LARGE + 1, LARGE + 1, LARGE):  # of the words, beside a short text
        replayed = ReplayedAnswer(LimitStatus(0), replace(RECORD, output_bytes=1000), bytes(size))
        waiting = asyncio.ensure_future(queue.turn(replayed, accepted))
        await iterations()
        waits.append(not waiting.done())
        waiting.cancel()
    assert waits == [False, False, False, True, False]
