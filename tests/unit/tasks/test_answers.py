"""Collectors: the inline output, stored media and usage that result from a provider's events."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

from pomelo.catalog.catalog import Catalog, Model, Route
from pomelo.catalog.pricing import Usage
from pomelo.errors import PomeloError
from pomelo.gen.v1 import speech_pb2, text_pb2
from pomelo.gen.v1.media_pb2 import ResponseFormat
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse
from pomelo.media.quota import MediaLimits
from pomelo.media.store import MediaStore
from pomelo.tasks import TASK_TYPES
from pomelo.tasks.base import AudioInfo, Collector, CollectorContext, Estimate
from tests.tasks import to_task

MODELS = Catalog.load().models
KIB, MIB = 1024, 1024 * 1024
UNSET = ResponseFormat.RESPONSE_FORMAT_UNSPECIFIED
URL = ResponseFormat.RESPONSE_FORMAT_URL
B64_JSON = ResponseFormat.RESPONSE_FORMAT_B64_JSON
BOTH = ResponseFormat.RESPONSE_FORMAT_BOTH
MEDIA = pytest.mark.parametrize("model", ["flux-1-pro", "eleven-labs-tts"])
BODIES: dict[str, dict[str, Any]] = {
    "gpt-4": {"messages": [{"role": "user", "content": "one two three"}]},
    "flux-1-pro": {"prompt": "A kite"},
    "eleven-labs-tts": {"text": "Hi", "voice": "adam"},
    "eleven-labs-stt": {"audio": "AAAA"},
}


def collector(
    model: str,
    store: MediaStore | None = None,
    *,
    stream: bool = False,
    keep: bool = False,
    response_format: ResponseFormat.ValueType = UNSET,
    estimate: Estimate | None = None,
) -> Collector:
    """Returns the collector of a task of a model."""
    task_type = TASK_TYPES[MODELS[model].task_type]
    given = getattr(to_task({"model": model, **BODIES[model]}), task_type.name)
    if response_format != UNSET or "response_format" in given.DESCRIPTOR.fields_by_name:
        given.response_format = response_format
    estimate = estimate or task_type.estimate(given, MODELS[model], MODELS[model].routes[0], AudioInfo())
    writer: Any = store and (lambda content_type: store.writer("ann/live", content_type))
    return task_type.collector(CollectorContext(given, MODELS[model], estimate, stream, writer, keep))


def finish(collected: Collector) -> TaskResult:
    """The result of the events so far."""
    result = TaskResult()
    try:
        collected.finish(result)
    finally:
        collected.close()
    return result


# --- images and speech


def media(model: str, size: int, store: MediaStore, **how: Any) -> tuple[int, int]:
    """The bytes of an answer that are inline, and those behind its link."""
    collected, event = collector(model, store, **how), StreamTaskResponse()
    if model == "flux-1-pro":
        event.result.image.images.add(data=bytes(size), content_type="image/png")
    else:
        event.audio_chunk.data, event.audio_chunk.content_type = bytes(size), "audio/mpeg"
    collected.add(event)
    result = finish(collected)
    part = result.image.images[0] if result.HasField("image") else result.speech
    return len(part.data), part.media.size_bytes


@pytest.fixture(name="store")
def _store(tmp_path: Path) -> MediaStore:
    return MediaStore(tmp_path / "media", b"s" * 32, limits=MediaLimits(reserve=0))


@pytest.fixture(name="full")
def _full(tmp_path: Path) -> MediaStore:
    """A store that has room for 4 KiB."""
    return MediaStore(tmp_path / "full", b"s" * 32, limits=MediaLimits(account=4 * KIB, reserve=0))


@MEDIA
@pytest.mark.parametrize(
    ("response_format", "limit", "linked"),
    [(UNSET, 3 * MIB, True), (B64_JSON, 16 * MIB, False), (BOTH, 16 * MIB, True)],
)
def test_media_are_inline_up_to_exactly_the_limit_and_behind_a_link_above(
    store: MediaStore, model: str, response_format: Any, limit: int, linked: bool
) -> None:
    assert media(model, limit, store, response_format=response_format) == (limit, limit if linked else 0)
    assert media(model, limit + 1, store, response_format=response_format) == (0, limit + 1)


def test_an_image_of_a_stream_is_inline_up_to_exactly_the_limit(store: MediaStore) -> None:
    for response_format, limit in ((UNSET, 45 * KIB), (BOTH, 16 * MIB)):
        assert media("flux-1-pro", limit, store, stream=True, response_format=response_format) == (
            limit,
            limit,
        )
        assert media("flux-1-pro", limit + 1, store, stream=True, response_format=response_format) == (
            0,
            limit + 1,
        )


@MEDIA
def test_an_answer_by_link_has_no_inline_bytes_and_an_idempotent_answer_is_stored(
    store: MediaStore, model: str
) -> None:
    assert media(model, 10, store, response_format=URL) == (0, 10)
    assert media(model, 10, store, response_format=B64_JSON, keep=True) == (10, 10)
    assert media(model, 10, store, response_format=B64_JSON) == (10, 0)


@MEDIA
@pytest.mark.parametrize("response_format", [UNSET, URL])
def test_without_room_an_answer_is_inline_up_to_exactly_its_limit(
    full: MediaStore, model: str, response_format: Any
) -> None:
    assert media(model, 3 * MIB, full, response_format=response_format) == (3 * MIB, 0)
    with pytest.raises(PomeloError, match="expire"):
        media(model, 3 * MIB + 1, full, response_format=response_format)
    assert list(full.folder.iterdir()) == []


@MEDIA
@pytest.mark.parametrize("response_format", [UNSET, URL, B64_JSON])
def test_an_answer_that_must_be_stored_fails_without_storage_space(
    full: MediaStore, model: str, response_format: Any
) -> None:
    with pytest.raises(PomeloError):
        media(model, 4 * KIB + 1, full, response_format=response_format, keep=True)
    assert media(model, 4 * KIB, full, response_format=B64_JSON, keep=True) == (4 * KIB, 4 * KIB)


@pytest.mark.parametrize("model", ["flux-1-pro", "eleven-labs-tts", "eleven-labs-stt", "gpt-4"])
def test_an_answer_without_output_is_the_providers_failure(store: MediaStore, model: str) -> None:
    with pytest.raises(PomeloError) as raised:
        finish(collector(model, store))
    assert raised.value.code == "provider_failed"
    if model in ("flux-1-pro", "eleven-labs-tts"):
        with pytest.raises(PomeloError) as raised:
            media(model, 0, store)
        assert raised.value.code == "provider_failed"


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
    task_type = TASK_TYPES[MODELS[model].task_type]
    body = {**BODIES.get(model, {"voice": "adam"}), **fields}
    if model == "eleven-labs-tts":
        body["text"] = "x" * 30
    given = getattr(to_task({"model": model, **body}), task_type.name)
    audio = Usage(audio_ms=10_000)
    estimate = task_type.estimate(given, MODELS[model], MODELS[model].routes[0], AudioInfo())
    assert (
        task_type.media_size(given, Estimate(audio, audio) if model == "eleven-labs-sts" else estimate)
        == size
    )


@pytest.mark.parametrize(
    ("fields", "pixels"),
    [
        ({}, 512 * 1024),
        ({"width": 96}, 96 * 1024),
        ({"height": 64}, 512 * 64),
        ({"width": 96, "height": 64}, 96 * 64),
    ],
)
def test_an_unset_width_or_height_is_the_default_adjusted_to_the_route(
    fields: dict[str, int], pixels: int
) -> None:
    task_type = TASK_TYPES[MODELS["flux-1-pro"].task_type]
    given = to_task({"model": "flux-1-pro", "prompt": "A kite", **fields}).image
    route = Route("p", "m", drop=frozenset({"height"}), clamp={"width": (64, 512, 32)})
    estimate = task_type.estimate(given, MODELS["flux-1-pro"], route, AudioInfo())
    assert estimate.exact
    assert estimate.minimum == estimate.maximum == Usage(images=1, pixels=pixels)


# --- transcripts


def transcript(
    seconds: float, words: list[tuple[float, float]], input_audio_ms: int = 9_800, language: str = "eng"
) -> tuple[TaskResult, Usage, bool]:
    """The result of a transcript of audio that has at most 10 s, and what is billed for it."""
    limit = Usage(audio_ms=10_000)
    collected = collector("eleven-labs-stt", estimate=Estimate(limit, limit, input_audio_ms=input_audio_ms))
    event = StreamTaskResponse()
    found = event.result.transcription
    found.text, found.language, found.audio_seconds = "some words", language, seconds
    for start, end in words:
        found.words.add(text="word", start=start, end=end)
    collected.add(event)
    return finish(collected), *collected.usage()


@pytest.mark.parametrize(
    ("seconds", "ms", "counted"),
    [
        (10.0, 10_000, True),
        (1.0001, 1_001, True),
        (0.0001, 1, True),
        (10.001, 9_800, False),
        (0.0, 9_800, False),
        (-1.0, 9_800, False),
        (inf, 9_800, False),
        (nan, 9_800, False),
    ],
)
def test_a_plausible_reported_length_is_billed(seconds: float, ms: int, counted: bool) -> None:
    result, used, by_provider = transcript(seconds, [])
    assert (used, by_provider) == (Usage(audio_ms=ms), counted)
    assert result.transcription.audio_seconds == ms / 1000


def test_audio_of_unknown_length_is_billed_by_its_bound_and_lasts_to_its_last_word() -> None:
    result, used, counted = transcript(0.0, [(0.5, 1.5), (2.0, 2.5)], input_audio_ms=0)
    assert (used, counted) == (Usage(audio_ms=10_000), False)
    assert result.transcription.audio_seconds == 2.5
    assert transcript(0.0, [], input_audio_ms=0)[0].transcription.audio_seconds == 0


def test_times_that_are_no_numbers_are_replaced_by_those_before() -> None:
    result, _, _ = transcript(5.0, [(0.5, 1.0), (nan, 2.0), (2.5, inf), (nan, nan)])
    assert [(word.start, word.end) for word in result.transcription.words] == [
        (0.5, 1.0),
        (1.0, 2.0),
        (2.5, 2.5),
        (2.5, 2.5),
    ]


def test_the_language_is_reported_by_its_shortest_code() -> None:
    assert transcript(5.0, [])[0].transcription.language == "en"


# --- texts


def text_model(**limits: int) -> Model:
    """GPT-4 with other limits."""
    return replace(MODELS["gpt-4"], limits=replace(MODELS["gpt-4"].limits, **limits))


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": 1, "completion_tokens": 1}, True),
        ({"prompt_tokens": 922_000, "completion_tokens": 128_000}, True),
        ({"prompt_tokens": 9, "completion_tokens": 5, "cached_prompt_tokens": 4, "cache_write_prompt_tokens": 5}, True),
        ({"prompt_tokens": 9, "completion_tokens": 5, "cache_write_prompt_tokens": 5, "cache_write_1h_prompt_tokens": 5}, True),
        ({"prompt_tokens": 0, "completion_tokens": 1}, False),
        ({"prompt_tokens": 1, "completion_tokens": 0}, False),
        ({"prompt_tokens": 922_001, "completion_tokens": 1}, False),
        ({"prompt_tokens": 1, "completion_tokens": 128_001}, False),
        ({"prompt_tokens": 9, "completion_tokens": 5, "cached_prompt_tokens": 5, "cache_write_prompt_tokens": 5}, False),
        ({"prompt_tokens": 9, "completion_tokens": 5, "cached_prompt_tokens": -1}, False),
        ({"prompt_tokens": 9, "completion_tokens": 5, "cache_write_prompt_tokens": -1}, False),
        ({"prompt_tokens": 9, "completion_tokens": 5, "cache_write_prompt_tokens": 4, "cache_write_1h_prompt_tokens": 5}, False),
        ({"prompt_tokens": 9, "completion_tokens": 5, "cache_write_1h_prompt_tokens": -1}, False),
    ],
)  # fmt: skip
def test_plausible_counts_of_a_provider_are_used(usage: dict[str, int], counted: bool) -> None:
    collected = collector("gpt-4", stream=True)
    event = StreamTaskResponse()
    event.text_delta.content = "some words"
    collected.add(event)
    last = StreamTaskResponse()
    last.text_delta.finish_reason = text_pb2.FINISH_REASON_STOP
    for name, value in usage.items():
        setattr(last.text_delta.usage, name, value)
    collected.add(last)
    delivered = collected.finish(TaskResult())
    used, by_provider = collected.usage()
    assert by_provider == counted
    assert delivered is not None
    reported = delivered.text_delta.usage
    assert reported.total_tokens == reported.prompt_tokens + reported.completion_tokens
    assert (reported.prompt_tokens, reported.completion_tokens) == (used.input_tokens, used.output_tokens)
    if counted:
        assert (used.input_tokens, used.output_tokens) == (usage["prompt_tokens"], usage["completion_tokens"])


def test_an_early_count_of_the_input_is_billed_and_not_delivered() -> None:
    collected = collector("gpt-4", stream=True)
    early = StreamTaskResponse()
    early.text_delta.content = "some words"
    early.text_delta.usage.prompt_tokens = 77
    passed = collected.add(early)
    assert passed is not None
    assert not passed.text_delta.HasField("usage")
    last = StreamTaskResponse()
    last.text_delta.finish_reason = text_pb2.FINISH_REASON_STOP
    collected.add(last)
    collected.finish(TaskResult())
    assert collected.usage()[0].input_tokens == 77


def test_the_bound_of_a_text_counts_its_bytes_its_messages_and_its_images() -> None:
    task_type = TASK_TYPES[MODELS["gpt-4"].task_type]
    pixel = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    messages = [
        {"role": "system", "content": "größe"},
        {"role": "user", "content": [{"type": "text", "text": "four"}, pixel]},
    ]

    def estimated(model: Model, **fields: Any) -> Estimate:
        given = to_task({"model": "gpt-4", "messages": messages, **fields}).text
        return task_type.estimate(given, model, Route("p", "m"), AudioInfo())

    size = 7 + 4
    tokens = size + 16 * 3 + 6_000
    found = estimated(text_model(), max_tokens=50)
    assert (found.minimum, found.maximum, found.sufficient) == (Usage(tokens, 50), Usage(tokens, 50), None)
    assert (found.tokens, found.input_tokens) == (size // 4 + 50, 2 + 1_100)
    found = estimated(text_model())
    assert (found.minimum, found.maximum) == (Usage(tokens, 1), Usage(tokens, 128_000))
    assert found.sufficient == Usage(tokens, 1_024)
    assert found.tokens == size // 4
    found = estimated(text_model(max_output_tokens=100, max_input_tokens=1_000), max_tokens=500)
    assert found.maximum == Usage(1_000, 100)
    found = estimated(text_model(max_output_tokens=100))
    assert found.sufficient == Usage(tokens, 100)
    assert partial_usage(estimated(text_model(max_input_tokens=1_000)), [200, 300, 300]) == Usage(1_000, 100)
    assert partial_usage(found, [1] * 101).output_tokens == 100


def partial_usage(estimate: Estimate, sizes: list[int]) -> Usage:
    """The usage of a text stream that ends early, after pieces of these sizes."""
    collected = collector("gpt-4", stream=True, estimate=estimate)
    for size in sizes:
        event = StreamTaskResponse()
        event.text_delta.content = "x" * size
        collected.add(event)
    return collected.partial_usage(None)


def test_the_maximum_length_of_audio_is_its_measured_length_plus_a_margin_for_rounding() -> None:
    limited, unlimited = MODELS["eleven-labs-sts"], MODELS["gpt-4"]  # 300 s, and no limit of audio
    for audio, max_ms in (
        (AudioInfo(1_000, 10_000), 10_200),
        (AudioInfo(1_000, 10_001), 10_202),
        (AudioInfo(1_000), 8_000),
        (AudioInfo(1_001), 8_008),
        (AudioInfo(1), 8),
    ):
        assert audio.max_ms(limited) == audio.max_ms(unlimited) == max_ms
    assert AudioInfo(1, 299_000).max_ms(limited) == 300_000 < AudioInfo(1, 299_000).max_ms(unlimited)
    assert not AudioInfo(1, 300_500).exceeds(limited)
    assert AudioInfo(1, 300_501).exceeds(limited)
    assert not AudioInfo(1, 10**9).exceeds(unlimited)


def test_cancelled_speech_costs_between_one_character_and_all(tmp_path: Path) -> None:
    for ms, characters in ((0.0625, 1), (1, 1), (1_000, 15), (1_001, 16), (2_000, 30), (9_000, 30)):
        estimate = Estimate(Usage(characters=30), Usage(characters=30), exact=True)
        store = MediaStore(tmp_path, b"x" * 32)
        collected = collector("eleven-labs-tts", store, stream=True, estimate=estimate)
        event = StreamTaskResponse()
        event.audio_chunk.data = bytes(int(ms * 16))
        event.audio_chunk.content_type = "audio/pcm;rate=8000"
        collected.add(event)
        given = speech_pb2.TextToSpeechInput()
        assert collected.partial_usage(given) == Usage(characters=characters)
