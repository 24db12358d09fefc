"""Speech: the billed length of audio, and what speech costs that ends early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pomelo.catalog.catalog import Route
from pomelo.catalog.pricing import Usage
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.media.quota import MediaLimits
from pomelo.media.store import MediaStore
from pomelo.providers.fitting import Given, fit
from pomelo.tasks.base import AudioInfo, Estimate
from tests.unit.refusals import refused
from tests.unit.tasks.collectors import MODELS, chunk, collector, definition_of, finish, task_input

INLINE = MediaDelivery.MEDIA_DELIVERY_INLINE
SAMPLES = "audio/pcm;rate=16000"
ALL_1000 = Estimate(Usage(characters=1000), Usage(characters=1000), exact=True)


def speech(speed: float | None = None, output_format: str = "pcm_16000") -> Any:
    """A text of 1,000 characters to speak; nothing is stored."""
    settings = {} if speed is None else {"voice_settings": {"speed": speed}}
    return task_input(
        "eleven-labs-tts",
        text="x" * 1000,
        output_format=output_format,
        **settings,
    )


def interrupted(estimate: Estimate, given: Any, size: int, content_type: str = SAMPLES) -> Usage:
    """The usage of streamed audio that ends early, after `size` bytes."""
    collected = collector("eleven-labs-tts", stream=True, delivery=INLINE, given=given, estimate=estimate)
    if size:
        collected.add(chunk(bytes(size), content_type))
    return collected.partial_usage(given)


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


@pytest.mark.parametrize(
    ("ms", "characters"), [(0.0625, 1), (1, 1), (1_000, 15), (1_001, 16), (2_000, 30), (9_000, 30)]
)
def test_cancelled_speech_costs_between_one_character_and_all(ms: float, characters: int) -> None:
    estimate = Estimate(Usage(characters=30), Usage(characters=30), exact=True)
    used = interrupted(estimate, speech(), int(ms * 16), "audio/pcm;rate=8000")
    assert used == Usage(characters=characters)


@pytest.mark.parametrize("speed", [0.25, 0.5, 0.7, None, 1.2, 4])
def test_interrupted_speech_costs_the_spoken_characters_at_its_speed(speed: float | None) -> None:
    # The sandbox speaks a character in 60 ms at speed 1.
    ms = round(100 * 60 / (speed or 1))
    assert interrupted(ALL_1000, speech(speed), ms * 32).characters == 90


def test_a_product_that_is_not_exact_is_no_character_more() -> None:
    assert 6_000 * 15 * 1.1 > 99_000
    assert interrupted(ALL_1000, speech(1.1), 6_000 * 32).characters == 99


@pytest.mark.parametrize(
    ("route", "sent_speed"),
    [
        (Route("p", "m", clamp={"speed": (0.7, 1.2, 0)}), 0.7),
        (Route("p", "m", drop=frozenset({"speed"})), 1.0),
    ],
)
def test_interrupted_speech_is_billed_at_the_speed_sent_to_the_vendor(
    route: Route, sent_speed: float
) -> None:
    model = MODELS["eleven-labs-tts"]
    fitted = fit(Given(speech(0.25)), model, route).input
    estimate = definition_of(model.name).estimate(fitted, model, route, AudioInfo())
    ms = round(100 * 60 / sent_speed)
    assert interrupted(estimate, fitted, ms * 32).characters == 90


@pytest.mark.parametrize(
    ("speed", "answered", "billed"),
    [
        *((None, 4_000, 4_000), (0.7, 4_000, 2_800), (1.2, 4_000, 4_800), (1.1, 4_000, 4_400)),
        *((1.1, 4_001, 4_402), (None, 1, 1), (None, 90_000, 10_000)),
    ],
)
def test_interrupted_speech_to_speech_costs_the_input_that_was_spoken(
    speed: float | None, answered: int, billed: int
) -> None:
    estimate = Estimate(Usage(audio_ms=10_200), Usage(audio_ms=10_200), input_audio_ms=10_000)
    given = task_input("eleven-labs-sts", output_format="pcm_16000")
    if speed is not None:
        given.voice_settings.speed = speed
    collected = collector("eleven-labs-sts", stream=True, delivery=INLINE, given=given, estimate=estimate)
    collected.add(chunk(bytes(answered * 32), SAMPLES))
    assert collected.partial_usage(given).audio_ms == billed


def test_interrupted_audio_that_cannot_be_measured_costs_its_whole_input() -> None:
    given = task_input("eleven-labs-sts")
    estimate = Estimate(Usage(audio_ms=1_020), Usage(audio_ms=1_020), input_audio_ms=1_000)
    unknown = "audio/flac"
    assert interrupted(estimate, given, 100, unknown) == Usage(audio_ms=1_000)
    assert interrupted(estimate, given, 0, unknown) == Usage()
    assert interrupted(ALL_1000, speech(None, "mp3_44100_128"), 100, unknown) == ALL_1000.maximum
    assert interrupted(ALL_1000, speech(), 0) == Usage()


def test_interrupted_audio_without_a_complete_frame_costs_one_character() -> None:
    assert interrupted(ALL_1000, speech(None, "mp3_44100_128"), 20, "audio/mpeg") == Usage(characters=1)


def test_audio_that_could_not_be_stored_for_a_replay_is_not_billed(tmp_path: Path) -> None:
    store = MediaStore(tmp_path, b"x" * 32, limits=MediaLimits(10**9, 150_000, reserve=0))
    given = speech()
    collected = collector("eleven-labs-tts", store, stream=True, keep=True, delivery=INLINE, given=given)
    event = chunk(bytes(96_000), SAMPLES)
    collected.add(event)
    delivered = collected.partial_usage(given)
    with refused("payload_too_large"):
        collected.add(event)
    collected.close()
    assert collected.partial_usage(given) == delivered
    assert collected.output_bytes == 96_000


@pytest.mark.parametrize(
    ("answered", "billed", "measured"),
    [
        *[(0, 10_000, True), (4_000, 4_000, False), (9_000, 10_000, True)],
        *[(10_000, 10_000, True), (20_900, 10_000, True), (60_000, 10_200, False)],
    ],
)
@pytest.mark.parametrize("speed", [None, 0.7, 1.2])
def test_an_answer_of_another_length_than_its_input_is_billed_by_its_length_up_to_the_maximum(
    answered: int, billed: int, measured: bool, speed: float | None
) -> None:
    bound = Estimate(Usage(audio_ms=10_200), Usage(audio_ms=10_200), input_audio_ms=10_000)
    output_format = "pcm_16000" if answered else "opus_48000_32"
    given = task_input("eleven-labs-sts", output_format=output_format)
    if speed is not None:
        given.voice_settings.speed = speed
    collected = collector("eleven-labs-sts", stream=True, delivery=INLINE, given=given, estimate=bound)
    if answered:
        collected.add(chunk(bytes(round(answered / (speed or 1)) * 32), SAMPLES))
    else:
        collected.add(chunk(b"\x1aE\xdf\xa3" * 10, "audio/webm"))
    finish(collected)
    used, counted = collected.usage(given)
    assert used.audio_ms == pytest.approx(billed, abs=2)
    assert counted == measured


def test_what_neither_the_input_nor_the_answer_measures_is_billed_as_an_estimate() -> None:
    most = Usage(audio_ms=8_000)
    given = task_input("eleven-labs-sts")
    collected = collector(
        "eleven-labs-sts", stream=True, delivery=INLINE, given=given, estimate=Estimate(most, most)
    )
    collected.add(chunk(b"\x1aE\xdf\xa3" * 10, "audio/webm"))
    finish(collected)
    assert collected.usage(given) == (most, False)


def test_audio_is_billed_up_to_the_maximum_of_the_model() -> None:
    most = Usage(audio_ms=5_000)
    given = task_input("eleven-labs-sts", output_format="pcm_16000")
    collected = collector(
        "eleven-labs-sts", delivery=INLINE, given=given, estimate=Estimate(most, most, input_audio_ms=9_000)
    )
    collected.add(chunk(bytes(9 * 32_000), SAMPLES))
    finish(collected)
    assert collected.usage(given) == (most, True)
