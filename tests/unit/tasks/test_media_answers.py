"""Images and speech in answers: inline up to a limit, behind links, and without room in the store."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pomelo.catalog.catalog import Route
from pomelo.catalog.pricing import Usage
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.gen.v1.task_pb2 import TaskEvent
from pomelo.media.quota import MediaLimits
from pomelo.media.store import MediaStore
from pomelo.tasks.base import AudioInfo, Estimate
from tests.unit.refusals import refused
from tests.unit.tasks.collectors import (
    MODELS,
    chunk,
    collector,
    definition_of,
    estimate_of,
    finish,
    image,
    task_input,
)

KIB, MIB = 1024, 1024 * 1024
UNSPECIFIED, LINK, INLINE, BOTH = MediaDelivery.values()
MEDIA = pytest.mark.parametrize("model", ["flux-1-pro", "eleven-labs-tts"])


def media(model: str, size: int, store: MediaStore, **how: Any) -> tuple[int, int]:
    """The bytes of an answer that are inline, and those behind its link."""
    collected = collector(model, store, **how)
    collected.add((image if model == "flux-1-pro" else chunk)(bytes(size)))
    result = finish(collected)
    part = result.image.images[0] if result.HasField("image") else result.speech
    return len(part.data), part.media.size_bytes


@pytest.fixture
def store(tmp_path: Path) -> MediaStore:
    return MediaStore(tmp_path / "media", b"s" * 32, limits=MediaLimits(reserve=0))


@pytest.fixture
def full(tmp_path: Path) -> MediaStore:
    """A store that has room for 4 KiB."""
    return MediaStore(tmp_path / "full", b"s" * 32, limits=MediaLimits(account=4 * KIB, reserve=0))


@MEDIA
@pytest.mark.parametrize(
    ("delivery", "limit", "linked"),
    [(UNSPECIFIED, 3 * MIB, True), (INLINE, 16 * MIB, False), (BOTH, 16 * MIB, True)],
)
def test_media_are_inline_up_to_exactly_the_limit_and_behind_a_link_above(
    store: MediaStore, model: str, delivery: MediaDelivery.ValueType, limit: int, linked: bool
) -> None:
    assert media(model, limit, store, delivery=delivery) == (limit, limit if linked else 0)
    assert media(model, limit + 1, store, delivery=delivery) == (0, limit + 1)


@pytest.mark.parametrize(("delivery", "limit"), [(UNSPECIFIED, 45 * KIB), (BOTH, 16 * MIB)])
def test_an_image_of_a_stream_is_inline_up_to_exactly_the_limit(
    store: MediaStore, delivery: MediaDelivery.ValueType, limit: int
) -> None:
    for size, inline in ((limit, limit), (limit + 1, 0)):
        found = media("flux-1-pro", size, store, stream=True, delivery=delivery)
        assert found == (inline, size)


@MEDIA
def test_an_answer_by_link_has_no_inline_bytes_and_an_idempotent_answer_is_stored(
    store: MediaStore, model: str
) -> None:
    assert media(model, 10, store, delivery=LINK) == (0, 10)
    assert media(model, 10, store, delivery=INLINE, keep=True) == (10, 10)
    assert media(model, 10, store, delivery=INLINE) == (10, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_the_progress_of_an_image_is_passed_on_and_is_no_image(store: MediaStore, stream: bool) -> None:
    collected, progress = collector("flux-1-pro", store, stream=stream), TaskEvent()
    progress.image_progress.progress = 0.5
    assert collected.add(progress) == progress
    assert collected.add(image(b"\xff\xd8\xff", "image/jpeg")) is None
    assert finish(collected).image.images[0].content_type == "image/jpeg"


@pytest.mark.parametrize("sizes", [(3_000, 3_000), (1, 5_000, 1)])
def test_speech_that_no_longer_fits_into_the_store_is_complete(
    full: MediaStore, sizes: tuple[int, ...]
) -> None:
    pieces = [bytes([index]) * size for index, size in enumerate(sizes)]
    collected = collector("eleven-labs-tts", full, delivery=LINK)
    for piece in pieces:
        assert collected.add(chunk(piece)) is None
    assert finish(collected).speech.data == b"".join(pieces)
    assert (full.partial, full.quota.total, list(full.folder.iterdir())) == ({}, 0, [])


@pytest.mark.parametrize("size", [100, MIB])
def test_speech_that_can_not_be_published_is_complete(store: MediaStore, size: int) -> None:
    collected = collector("eleven-labs-tts", store, delivery=LINK)
    assert collected.add(chunk(bytes(size))) is None
    shutil.rmtree(store.folder)
    speech = finish(collected).speech
    assert (speech.data, speech.HasField("media")) == (bytes(size), False)


@MEDIA
@pytest.mark.parametrize("delivery", [UNSPECIFIED, LINK])
def test_without_room_an_answer_is_inline_up_to_exactly_its_limit(
    full: MediaStore, model: str, delivery: MediaDelivery.ValueType
) -> None:
    assert media(model, 3 * MIB, full, delivery=delivery) == (3 * MIB, 0)
    with refused("payload_too_large", match="expire"):
        media(model, 3 * MIB + 1, full, delivery=delivery)
    assert list(full.folder.iterdir()) == []


@MEDIA
@pytest.mark.parametrize("delivery", [UNSPECIFIED, LINK, INLINE])
def test_an_answer_that_must_be_stored_fails_without_storage_space(
    full: MediaStore, model: str, delivery: MediaDelivery.ValueType
) -> None:
    with refused("payload_too_large"):
        media(model, 4 * KIB + 1, full, delivery=delivery, keep=True)
    assert media(model, 4 * KIB, full, delivery=INLINE, keep=True) == (4 * KIB, 4 * KIB)


@pytest.mark.parametrize("model", ["flux-1-pro", "eleven-labs-tts", "eleven-labs-stt", "gpt-4"])
def test_an_answer_without_output_is_the_providers_failure(store: MediaStore, model: str) -> None:
    with refused("provider_failed"):
        finish(collector(model, store))
    if model in ("flux-1-pro", "eleven-labs-tts"):
        with refused("provider_failed"):
            media(model, 0, store)


@pytest.mark.parametrize(
    ("model", "fields", "size"),
    [
        ("flux-1-pro", {"width": 256, "height": 512}, 4 * 256 * 512),
        ("flux-1-pro", {}, 4 * 1024 * 1024),
        ("eleven-labs-tts", {"output_format": "mp3_44100_128"}, 2 * 30 * 16_000 // 15),
        ("eleven-labs-tts", {"output_format": "pcm_16000"}, 2 * 30 * 32_000 // 15),
        ("eleven-labs-tts", {"output_format": "ulaw_8000"}, 2 * 30 * 8_000 // 15),
        ("eleven-labs-sts", {"output_format": "ulaw_8000"}, 11 * 8_000),
        ("eleven-labs-sts", {"output_format": "ulaw_8000", "voice_settings": {"speed": 0.5}}, 21 * 8_000),
        ("eleven-labs-stt", {}, 0),
        ("gpt-4", {}, 0),
    ],
)
def test_the_media_size_is_that_of_the_largest_answer_in_its_format(
    model: str, fields: dict[str, Any], size: int
) -> None:
    given = task_input(model, **({"text": "x" * 30} if model == "eleven-labs-tts" else {}), **fields)
    audio = Usage(audio_ms=10_000)
    estimate = Estimate(audio, audio) if model == "eleven-labs-sts" else estimate_of(model, given)
    assert definition_of(model).media_size(given, estimate) == size


@pytest.mark.parametrize(
    ("fields", "pixels"),
    [
        *[({}, 512 * 1024), ({"width": 96}, 96 * 1024)],
        *[({"height": 64}, 512 * 64), ({"width": 96, "height": 64}, 96 * 64)],
    ],
)
def test_an_unset_width_or_height_is_the_default_adjusted_to_the_route(
    fields: dict[str, int], pixels: int
) -> None:
    route = Route("p", "m", drop=frozenset({"height"}), clamp={"width": (64, 512, 32)})
    estimate = definition_of("flux-1-pro").estimate(
        task_input("flux-1-pro", **fields), MODELS["flux-1-pro"], route, AudioInfo()
    )
    assert estimate.exact
    assert estimate.minimum == estimate.maximum == Usage(images=1, pixels=pixels)


def test_audio_that_becomes_too_large_to_be_inline_is_stored_from_its_beginning(store: MediaStore) -> None:
    collected = collector("eleven-labs-tts", store, delivery=INLINE)
    for data in (b"a" * 10 * MIB, b"b" * 5 * MIB, b"c" * 2 * MIB):
        collected.add(chunk(data))
    result = finish(collected)
    assert (result.speech.data, result.speech.media.size_bytes) == (b"", 17 * MIB)
    stored = (store.folder / result.speech.media.id).read_bytes()
    assert [stored.count(letter) for letter in (b"a", b"b", b"c")] == [10 * MIB, 5 * MIB, 2 * MIB]
