"""The vendor for tests speaks the real protocol: ElevenLabs' own client reads it, and it refuses what they refuse."""

from __future__ import annotations

import io
import json
from hashlib import sha256
from typing import Any

import aiohttp
import av
import elevenlabs
import pytest
from elevenlabs.core.api_error import ApiError

from pomelo.audio_formats import AudioFormat
from pomelo.testing import FaultUpstream, Speech, Transcript, VoiceList
from pomelo.testing.audio import packets
from pomelo.testing.elevenlabs_checks import FORMATS
from pomelo.testing.elevenlabs_protocol import error_reply
from tests.providers.elevenlabs.rig import ADAM, MP3
from tests.providers.rig import KEY, ask

QUIET: Any = {"max_retries": 0}


@pytest.fixture(name="client")
async def _client(upstream: FaultUpstream) -> Any:
    return elevenlabs.AsyncElevenLabs(base_url=upstream.elevenlabs_base_url, api_key=KEY)


async def post(upstream: FaultUpstream, path: str, **options: Any) -> tuple[int, Any]:
    """Status and JSON, or else bytes, of a request below the prefix."""
    headers = options.pop("headers", {"xi-api-key": KEY})
    return await ask(
        options.pop("method", "POST"), upstream.elevenlabs_base_url + path, headers=headers, **options
    )


async def test_the_official_client_reads_audio(upstream: FaultUpstream, client: Any, stream: bool) -> None:
    call = client.text_to_speech.stream if stream else client.text_to_speech.convert
    settings = elevenlabs.VoiceSettings(
        stability=0.5, similarity_boost=0.75, style=0, use_speaker_boost=True, speed=1.1
    )
    answer = call(
        ADAM,
        text="Grüße 🍊",
        model_id="eleven_flash_v2_5",
        language_code="de",
        output_format="mp3_22050_32",
        voice_settings=settings,
        seed=7,
        request_options=QUIET,
    )
    received_audio = b"".join([audio_chunk async for audio_chunk in answer])
    received = await upstream.received()
    assert received_audio == b"".join(Speech().audio(received))
    assert received.body["text"] == "Grüße 🍊"
    assert received.query == {"output_format": "mp3_22050_32"}


async def test_the_official_client_changes_a_voice(
    upstream: FaultUpstream, client: Any, stream: bool
) -> None:
    call = client.speech_to_speech.stream if stream else client.speech_to_speech.convert
    answer = call(
        ADAM,
        audio=("audio.mp3", MP3, "audio/mpeg"),
        model_id="eleven_multilingual_sts_v2",
        voice_settings=json.dumps({"stability": 0.5}),
        seed=7,
        output_format="pcm_16000",
        request_options=QUIET,
    )
    received_audio = b"".join([audio_chunk async for audio_chunk in answer])
    received = await upstream.received()
    assert received_audio == b"".join(Speech().audio(received))
    assert received.form is not None
    assert {part.name for part in received.form} == {"audio", "model_id", "voice_settings", "seed"}


async def test_the_official_client_reads_a_transcript(upstream: FaultUpstream, client: Any) -> None:
    upstream.script(Transcript("Grüße an alle", speakers=2, language="deu"))
    result = await client.speech_to_text.convert(
        model_id="scribe_v2",
        file=("audio.mp3", MP3, "audio/mpeg"),
        language_code="deu",
        diarize=True,
        num_speakers=2,
        timestamps_granularity="character",
        tag_audio_events=True,
        request_options=QUIET,
    )
    assert (result.text, result.language_code) == ("Grüße an alle (laughter)", "deu")
    kinds = [word.type for word in result.words]
    assert kinds == ["word", "spacing", "word", "spacing", "word", "spacing", "audio_event"]
    assert [word.speaker_id for word in result.words][::2] == [f"speaker_{n}" for n in (0, 1, 0, 1)]
    assert "".join(character.text for character in result.words[0].characters) == "Grüße"
    assert result.audio_duration_secs == 1.0


async def test_an_uploads_size_and_digest_are_reported(upstream: FaultUpstream, client: Any) -> None:
    result = await client.speech_to_text.convert(
        model_id="scribe_v2", file=("a.mp3", MP3, "audio/mpeg"), tag_audio_events=False, request_options=QUIET
    )
    assert result.text == f"{len(MP3)} bytes with SHA-256 {sha256(MP3).hexdigest()}"


async def test_the_official_client_reads_the_list_of_voices(upstream: FaultUpstream, client: Any) -> None:
    upstream.unscripted = None
    names = tuple((f"Nr{number}", f"{number:020d}") for number in range(15))
    upstream.script(*[VoiceList(names)] * 3)
    first = await client.voices.search(request_options=QUIET)
    assert (len(first.voices), first.has_more) == (10, True)
    rest = await client.voices.search(next_page_token=first.next_page_token, request_options=QUIET)
    assert ([voice.name for voice in rest.voices], rest.has_more) == (
        [f"Nr{n}" for n in range(10, 15)],
        False,
    )
    assert len((await client.voices.get_all(request_options=QUIET)).voices) == 15


async def test_the_official_client_sees_refusals_of_the_vendor(upstream: FaultUpstream, client: Any) -> None:
    async def ask(which: Any = client, **changes: Any) -> tuple[int, Any]:
        options = {"text": "x", "request_options": QUIET, **changes}
        with pytest.raises(ApiError) as refused:
            async for _ in which.text_to_speech.convert(options.pop("voice_id", ADAM), **options):
                pass
        return int(refused.value.status_code or 0), refused.value.body

    upstream.script(error_reply(429, "system_busy", error_type="rate_limit_error"))
    status, body = await ask()
    assert (status, body["detail"]["code"]) == (429, "system_busy")
    wrong = elevenlabs.AsyncElevenLabs(base_url=upstream.elevenlabs_base_url, api_key="xi-wrong")
    assert (await ask(wrong))[0] == 401
    status, body = await ask(voice_id="nobody")
    assert (status, body["detail"]["code"]) == (404, "voice_not_found")
    status, body = await ask(seed=-1)
    assert (status, body["detail"][0]["loc"]) == (422, ["body", "seed"])
    status, body = await ask(text="x" * 10_001)
    assert (status, body["detail"]["status"]) == (400, "max_character_limit_exceeded")


SAY = f"/v1/text-to-speech/{ADAM}"


@pytest.mark.parametrize(
    ("change", "query", "where", "kind"),
    [
        ({"text": None}, "", ["body", "text"], "missing"),
        ({"text": ""}, "", ["body", "text"], "string_too_short"),
        ({"text": 7}, "", ["body", "text"], "string_type"),
        ({"speed": 1}, "", ["body", "speed"], "extra_forbidden"),
        ({"seed": 2**32}, "", ["body", "seed"], "less_than_equal"),
        ({"seed": 1.5}, "", ["body", "seed"], "int_type"),
        ({"language_code": "deu"}, "", ["body", "language_code"], "value_error"),
        ({"voice_settings": "{}"}, "", ["body", "voice_settings"], "dict_type"),
        ({"voice_settings": {"speed": 4}}, "", ["body", "voice_settings", "speed"], "less_than_equal"),
        ({"voice_settings": {"pitch": 1}}, "", ["body", "voice_settings", "pitch"], "extra_forbidden"),
        ({}, "?output_format=mp3", ["query", "output_format"], "literal_error"),
        ({}, "?format=mp3_44100_128", ["query", "format"], "extra_forbidden"),
        ({}, "/stream?output_format=wav_8000", ["query", "output_format"], "literal_error"),
    ],
)
async def test_what_the_vendor_would_refuse_is_refused_with_its_name_before_the_key(
    upstream: FaultUpstream, change: dict[str, Any], query: str, where: list[str], kind: str
) -> None:
    upstream.script(Speech(size=77, headers={"X-Kept": "for a valid one"}))
    status, body = await post(upstream, SAY + query, json={"text": "x"} | change, headers={})
    assert status == 422
    assert (body["detail"][0]["loc"], body["detail"][0]["type"]) == (where, kind)
    status, body = await post(upstream, SAY + "?output_format=ulaw_8000", json={"text": "x"})
    assert (status, len(body)) == (200, 77)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({}, ["body", "model_id"]),
        ({"model_id": "whisper"}, ["body", "model_id"]),
        ({"model_id": "scribe_v2", "diarize": "yes"}, ["body", "diarize"]),
        ({"model_id": "scribe_v2", "num_speakers": "2"}, ["body", "num_speakers"]),
        ({"model_id": "scribe_v2", "language": "en"}, ["body", "language"]),
        (
            {"model_id": "scribe_v2", "diarize": "true", "diarization_threshold": "0.5"},
            ["body", "diarization_threshold"],
        ),
        ({"model_id": "scribe_v2", "diarization_threshold": "0.2"}, ["body", "diarization_threshold"]),
        ({"model_id": "scribe_v2", "timestamps_granularity": "line"}, ["body", "timestamps_granularity"]),
        ({"model_id": "scribe_v2", "file": None}, ["body", "file"]),
        ({"model_id": "scribe_v2", "file": b""}, ["body", "file"]),
    ],
)
async def test_a_form_is_checked_field_by_field(
    upstream: FaultUpstream, fields: dict[str, Any], where: list[str]
) -> None:
    form = aiohttp.FormData(default_to_multipart=True)
    for name, value in ({"file": MP3} | fields).items():
        if name == "file" and value is not None:
            form.add_field(name, value, filename="a.mp3", content_type="audio/mpeg")
        elif value is not None:
            form.add_field(name, value)
    status, body = await post(upstream, "/v1/speech-to-text", data=form, headers={})
    assert status == 422
    assert where in [problem["loc"] for problem in body["detail"]]


@pytest.mark.parametrize(
    ("path", "taken"),
    [
        ("/v1/voices?show_legacy=true", True),
        ("/v1/voices?page_size=10", False),
        ("/v2/voices?page_size=100&gender=female", True),
        ("/v2/voices?page_size=101", False),
        ("/v2/voices?show_legacy=true", False),
        ("/v2/voices?enable_logging=true", False),
    ],
)
async def test_each_list_of_voices_has_its_own_query(upstream: FaultUpstream, path: str, taken: bool) -> None:
    assert (await post(upstream, path, method="GET"))[0] == (200 if taken else 422)


async def test_a_wrong_key_path_method_or_body_is_refused(upstream: FaultUpstream) -> None:
    assert (await post(upstream, SAY, json={"text": "x"}, headers={}))[0] == 401
    assert (await post(upstream, SAY, json={"text": "x"}, headers={"xi-api-key": "xi-wrong"}))[0] == 401
    assert (await post(upstream, "/v1/speech", json={}))[0] == 404
    assert (await post(upstream, SAY, method="GET"))[0] == 405
    assert (await post(upstream, SAY, data=b"{"))[0] == 422
    assert (await post(upstream, "/v1/speech-to-text", json={}))[0] == 422
    broken = {"Content-Type": "multipart/form-data; boundary=x", "xi-api-key": KEY}
    assert (await post(upstream, "/v1/speech-to-text", data=b"no form", headers=broken))[0] == 422
    assert (
        await post(
            upstream, SAY, json={"text": "x", "model_id": "eleven_multilingual_v2", "language_code": "de"}
        )
    )[0] == 400


@pytest.mark.parametrize("audio_format", sorted(FORMATS))
def test_the_audio_is_playable(audio_format: str) -> None:
    size = AudioFormat.of(audio_format).bytes_per_second * 2
    data = b"".join(packets(audio_format, size, "seed"))
    assert data == b"".join(packets(audio_format, size, "seed"))
    assert data != b"".join(packets(audio_format, size, "another"))
    codec, rate, *_ = audio_format.split("_")
    if codec in ("pcm", "ulaw", "alaw"):
        assert len(data) == size
        return
    kind = "ogg" if codec == "opus" else codec
    with av.open(io.BytesIO(data), "r", format=kind) as container:
        seconds = sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))
        assert container.streams.audio[0].rate == int(rate)
    assert 1.9 < seconds < 3.2


async def test_a_script_is_picked_by_the_text_or_by_the_digest_of_the_audio(
    upstream: FaultUpstream, client: Any
) -> None:
    upstream.when("this very text", Speech(size=7000))
    upstream.when(sha256(MP3).hexdigest(), Transcript("the recorded text"))
    await post(upstream, SAY, json={"text": "Say this very text", "model_id": "eleven_flash_v2_5"})
    result = await client.speech_to_text.convert(model_id="scribe_v2", file=MP3, tag_audio_events=False)
    assert result.text == "the recorded text"
    assert [received.prompt for received in upstream.requests] == [
        "Say this very text",
        sha256(MP3).hexdigest(),
    ]
    assert upstream.requests[0].bytes_sent >= 7000
