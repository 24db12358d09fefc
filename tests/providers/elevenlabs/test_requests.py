"""Requests of the ElevenLabs provider: every field of the contract, and no value the vendor would refuse."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from pomelo.audio_formats import AUDIO_FORMATS as FORMATS
from pomelo.catalog.catalog import Catalog, Route
from pomelo.gen.v1.speech_pb2 import (
    SpeechToSpeechInput,
    SpeechToTextInput,
    TextToSpeechInput,
    TimestampGranularity,
    VoiceSettings,
)
from pomelo.providers.http.client import Timeouts
from pomelo.testing import Speech, VoiceList
from pomelo.testing.elevenlabs_checks import FORMATS as VENDORS_FORMATS
from pomelo.testing.elevenlabs_protocol import error_reply
from tests.providers.elevenlabs.rig import (
    ADAM,
    MAKE,
    MP3,
    STS,
    failure,
    form_fields,
    job,
    read_audio,
    say,
    stored,
    transcript,
)
from tests.providers.rig import KEY, PROMPT, Rig, open_provider

SETTINGS = VoiceSettings(stability=0.5, similarity_boost=0.75, style=0, use_speaker_boost=False, speed=1.1)
SETTINGS_SENT = {
    "stability": 0.5,
    "similarity_boost": 0.75,
    "style": 0.0,
    "speed": 1.1,
    "use_speaker_boost": False,
}


async def test_the_largest_text_to_speech_is_exactly_this(rig: Rig, stream: bool) -> None:
    speech_input = TextToSpeechInput(
        text="Grüße 🍊\nthere",
        voice="Adam",
        voice_settings=SETTINGS,
        output_format="opus_48000_64",
        language_code="DE",
        seed=2**32 - 1,
    )
    before = TextToSpeechInput.FromString(speech_input.SerializeToString())
    await read_audio(rig.provider, job(speech_input, stream=stream))
    received = await rig.received()
    assert received.method == "POST"
    assert received.path == f"/elevenlabs/v1/text-to-speech/{ADAM}" + ("/stream" if stream else "")
    assert received.query == {"output_format": "opus_48000_64"}
    assert received.headers["xi-api-key"] == KEY
    assert "Authorization" not in received.headers
    assert received.body == {
        "text": "Grüße 🍊\nthere",
        "model_id": "eleven_flash_v2_5",
        "language_code": "de",
        "voice_settings": SETTINGS_SENT,
        "seed": 2**32 - 1,
    }
    assert speech_input == before


async def test_the_smallest_text_to_speech_has_no_field_that_the_caller_did_not_set(rig: Rig) -> None:
    await read_audio(rig.provider, job())
    received = await rig.received()
    assert received.body == {"text": PROMPT, "model_id": "eleven_flash_v2_5"}
    assert received.query == {"output_format": "mp3_44100_128"}


async def test_a_zero_that_the_caller_set_is_sent(rig: Rig) -> None:
    settings = VoiceSettings(stability=0)
    await read_audio(rig.provider, job(say(seed=0, voice_settings=settings)))
    body = (await rig.received()).body
    assert (body["seed"], body["voice_settings"]) == (0, {"stability": 0.0})


async def test_empty_voice_settings_are_left_out(rig: Rig) -> None:
    await read_audio(rig.provider, job(say(voice_settings=VoiceSettings())))
    assert "voice_settings" not in (await rig.received()).body


@pytest.mark.parametrize(("speed", "sent"), [(0.25, 0.7), (4, 1.2), (1, 1.0)])
async def test_speed_is_clamped_to_the_models_range(rig: Rig, speed: float, sent: float) -> None:
    settings = VoiceSettings(speed=speed)
    await read_audio(rig.provider, job(say(voice_settings=settings)))
    assert (await rig.received()).body["voice_settings"] == {"speed": sent}
    await read_audio(rig.provider, job(SpeechToSpeechInput(voice="adam", voice_settings=settings)))
    assert json.loads(str(form_fields(await rig.received())["voice_settings"])) == {"speed": sent}


async def test_what_a_route_drops_is_not_sent(rig: Rig) -> None:
    speech_input = TextToSpeechInput(
        text="x", voice="adam", voice_settings=SETTINGS, language_code="de", seed=1
    )
    drop = frozenset(("language_code", "seed", "style", "use_speaker_boost", "speed"))
    await read_audio(
        rig.provider, job(speech_input, route=Route("elevenlabs", "eleven_multilingual_v2", drop=drop))
    )
    assert (await rig.received()).body == {
        "text": "x",
        "model_id": "eleven_multilingual_v2",
        "voice_settings": {"stability": 0.5, "similarity_boost": 0.75},
    }
    drop = frozenset(("voice_settings", "language_code"))
    await read_audio(
        rig.provider, job(speech_input, route=Route("elevenlabs", "eleven_multilingual_v2", drop=drop))
    )
    assert (await rig.received()).body == {"text": "x", "model_id": "eleven_multilingual_v2", "seed": 1}


@pytest.mark.parametrize(
    ("speech_input", "text_to_speech", "speech_to_text"),
    [("DEU", "de", "de"), ("ger", "de", "de"), ("de-AT", "de", "de"), ("haw", None, "haw"), ("", None, None)],
)
async def test_a_language_is_sent_by_the_code_that_the_endpoint_takes(
    rig: Rig, speech_input: str, text_to_speech: str | None, speech_to_text: str | None
) -> None:
    await read_audio(rig.provider, job(say(language_code=speech_input)))
    assert (await rig.received()).body.get("language_code") == text_to_speech
    await transcript(rig.provider, job(SpeechToTextInput(language_code=speech_input)))
    assert form_fields(await rig.received()).get("language_code") == speech_to_text


def test_the_vendors_formats_are_the_contracts() -> None:
    assert set(FORMATS) == VENDORS_FORMATS


@pytest.mark.parametrize("audio_format", sorted(FORMATS))
async def test_every_output_format_is_taken_by_the_endpoint_that_has_it(
    rig: Rig, audio_format: str, stream: bool
) -> None:
    for speech_input in (
        say(output_format=audio_format),
        SpeechToSpeechInput(voice="adam", output_format=audio_format),
    ):
        await read_audio(rig.provider, job(speech_input, stream=stream))
        received = await rig.received()
        assert received.query == {"output_format": audio_format}
        assert received.path.endswith("/stream") == (stream and not audio_format.startswith("wav_"))


async def test_the_largest_speech_to_speech_is_exactly_this(rig: Rig, stream: bool) -> None:
    speech_input = SpeechToSpeechInput(
        voice="adam", voice_settings=SETTINGS, output_format="pcm_16000", seed=7
    )
    await read_audio(rig.provider, job(speech_input, stream=stream))
    received = await rig.received()
    assert received.path == f"/elevenlabs/v1/speech-to-speech/{ADAM}" + ("/stream" if stream else "")
    assert received.query == {"output_format": "pcm_16000"}
    sent = form_fields(received)
    assert json.loads(str(sent.pop("voice_settings"))) == SETTINGS_SENT
    assert sent == {"model_id": "eleven_multilingual_sts_v2", "seed": "7", "audio": sha256(MP3).hexdigest()}
    assert received.form is not None
    assert (received.form[-1].filename, received.form[-1].content_type) == ("audio.mp3", "audio/mpeg")


async def test_the_largest_speech_to_text_is_exactly_this(rig: Rig) -> None:
    speech_input = SpeechToTextInput(
        language_code="en",
        diarize=True,
        num_speakers=3,
        timestamps=TimestampGranularity.TIMESTAMP_GRANULARITY_CHARACTER,
    )
    await transcript(rig.provider, job(speech_input))
    received = await rig.received()
    assert (received.path, received.query) == ("/elevenlabs/v1/speech-to-text", {})
    assert form_fields(received) == {
        "model_id": "scribe_v2",
        "tag_audio_events": "false",
        "language_code": "en",
        "diarize": "true",
        "num_speakers": "3",
        "timestamps_granularity": "character",
        "file": sha256(MP3).hexdigest(),
    }


async def test_the_smallest_speech_to_text_has_no_field_that_the_caller_did_not_set(rig: Rig) -> None:
    await transcript(rig.provider, job(SpeechToTextInput(num_speakers=3)))
    assert form_fields(await rig.received()).keys() == {
        "model_id",
        "tag_audio_events",
        "timestamps_granularity",
        "file",
    }


@pytest.mark.parametrize("path", ["speech-to-speech", "voice-changer"])
async def test_the_path_of_speech_to_speech_is_the_routes(rig: Rig, path: str) -> None:
    route = Route("elevenlabs", STS.model, options={"sts_path": path})
    await read_audio(rig.provider, job(SpeechToSpeechInput(voice="adam"), route=route))
    assert (await rig.received()).path == f"/elevenlabs/v1/{path}/{ADAM}"


GONE = [
    error_reply(404, shape="text", message="Not Found"),
    error_reply(404, "not_found", error_type="not_found", message="Not Found"),
]


@pytest.mark.parametrize("gone", GONE)
async def test_if_the_first_path_is_not_found_the_other_one_is_tried_and_remembered(
    rig: Rig, tmp_path: Path, gone: Any
) -> None:
    path = tmp_path / "audio.mp3"
    path.write_bytes(MP3)
    rig.script(gone)
    for _ in range(2):
        await read_audio(rig.provider, job(SpeechToSpeechInput(voice="adam"), audio=stored(path)))
    assert [received.path.split("/")[3] for received in rig.requests] == [
        "speech-to-speech",
        "voice-changer",
        "voice-changer",
    ]
    assert form_fields(rig.requests[1])["audio"] == sha256(MP3).hexdigest()


@pytest.mark.parametrize("gone", GONE)
async def test_the_other_path_is_tried_once(rig: Rig, gone: Any) -> None:
    rig.script(gone, gone)
    error, _ = await failure(rig.provider, job(SpeechToSpeechInput(voice="adam")))
    assert error.code == "provider_failed"
    assert len(rig.requests) == 2


@pytest.mark.parametrize("gone", GONE)
async def test_a_path_that_was_not_found_is_tried_again_once_the_other_one_is_not_found(
    rig: Rig, gone: Any
) -> None:
    for missing in (1, 0, 1, 0):
        if missing:
            rig.script(gone)
        await read_audio(rig.provider, job(SpeechToSpeechInput(voice="adam")))
    paths = [received.path.split("/")[3] for received in rig.requests]
    assert paths == ["speech-to-speech", *["voice-changer"] * 3, "speech-to-speech", "speech-to-speech"]


@pytest.mark.parametrize(
    "reply",
    [
        error_reply(404, "voice_not_found", error_type="not_found"),
        error_reply(404, "model_not_found", error_type="not_found"),
        error_reply(500, shape="text"),
        Speech(before=(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nID3",)),
    ],
)
async def test_no_other_request_is_sent_twice(rig: Rig, reply: Any) -> None:
    rig.script(reply)
    async with open_provider(
        MAKE, rig.elevenlabs_base_url, timeouts=Timeouts(silence=0.2, whole=0.2)
    ) as hasty:
        await failure(hasty, job(SpeechToSpeechInput(voice="adam")))
    assert len(rig.requests) == 1


async def test_the_catalogues_own_rows_are_accepted(rig: Rig) -> None:
    catalog = Catalog.load()
    for name, speech_input in (
        ("eleven-labs-tts", say(voice_settings=SETTINGS, language_code="en", seed=1)),
        ("eleven-labs-sts", SpeechToSpeechInput(voice="adam", voice_settings=SETTINGS, seed=1)),
    ):
        for route in catalog.by_any_name[name].routes:
            for stream in (False, True):
                await read_audio(rig.provider, job(speech_input, route=route, stream=stream))
    for route in catalog.by_any_name["eleven-labs-stt"].routes:
        result = SpeechToTextInput(diarize=True, num_speakers=2, language_code="eng")
        await transcript(rig.provider, job(result, route=route))


async def test_the_list_of_voices_is_not_requested_for_a_default_voice_or_an_id(rig: Rig) -> None:
    rig.default = lambda received: (VoiceList() if "voices" in received.path else Speech())(received)
    for voice in ("adam", " ADAM", "Rachel", "x" * 20):
        await read_audio(rig.provider, job(say(voice=voice)))
    assert [received.path.rsplit("/", 1)[1] for received in rig.requests] == [
        ADAM,
        ADAM,
        "21m00Tcm4TlvDq8ikWAM",
        "x" * 20,
    ]
