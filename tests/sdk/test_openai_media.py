"""The Python SDK of OpenAI makes images, speech and transcripts: in the sandbox and with played vendors, through a
gateway in the server's process and one elsewhere.

Every answer has all that the SDK's types and OpenAI's published schemas require.
"""

from __future__ import annotations

import base64
import io
import wave
from typing import Any

import httpx2
import openai
import pytest
from openai.types import ImageGenCompletedEvent, ImagesResponse
from openai.types.audio import (
    Transcription,
    TranscriptionDiarized,
    TranscriptionTextDeltaEvent,
    TranscriptionTextDoneEvent,
    TranscriptionVerbose,
)
from pydantic import BaseModel

from pomelo.errors import TABLE
from pomelo.media.audio import wav_header
from pomelo.testing import Transcript
from pomelo.testing.elevenlabs_protocol import error_reply
from tests.app import Account, RunningApp, app_fixture
from tests.sdk import published
from tests.sdk.python_clients import instead_of_waiting
from tests.sdk.sdk import CALLERS, sdk
from tests.sdk.setup import SENTENCES, TEXT

IMAGE: dict[str, Any] = {"model": "flux-1-pro", "prompt": "A kite", "size": "256x288"}
SPEECH: dict[str, Any] = {"model": "eleven-labs-tts", "input": TEXT, "voice": "alloy"}
STT = "eleven-labs-stt"
WAV = wav_header("audio/pcm;rate=16000", 64_000) + bytes(64_000)

app = app_fixture()


SCHEMAS: dict[type[BaseModel], str] = {
    ImagesResponse: "ImagesResponse",
    ImageGenCompletedEvent: "ImageGenStreamEvent",
    Transcription: "CreateTranscriptionResponseJson",
    TranscriptionVerbose: "CreateTranscriptionResponseVerboseJson",
    TranscriptionTextDeltaEvent: "CreateTranscriptionResponseStreamEvent",
    TranscriptionTextDoneEvent: "CreateTranscriptionResponseStreamEvent",
}
"""The published schemas of the SDK's types."""


def check(value: BaseModel, expected: type[BaseModel]) -> None:
    """Asserts that a value of the SDK, which it does not validate itself, has what its type and OpenAI's published
    schema require."""
    assert type(value) is expected
    members = value.model_dump(exclude_unset=True)
    expected.model_validate(members, strict=True)
    if expected in SCHEMAS:
        assert not published.errors(SCHEMAS[expected], members)


async def speak(client: openai.AsyncOpenAI, **more: Any) -> bytes:
    """Returns the audio of a text."""
    async with client.audio.speech.with_streaming_response.create(**(SPEECH | more)) as response:
        return b"".join([piece async for piece in response.iter_bytes()])


@CALLERS
async def test_an_image_is_a_link_that_needs_no_key_and_bytes(
    app: RunningApp, account: Account, protocol: str, mode: str
) -> None:
    async with sdk(app, account, protocol, mode) as client:
        response: Any = await client.images.generate(**IMAGE)
        check(response, ImagesResponse)
        (image,) = response.data
        assert image.url is not None
        async with app.session.get(image.url) as download:
            data = await download.read()
        assert data.startswith(b"\x89PNG")
        assert base64.b64decode(image.b64_json or "") == data

        link: Any = await client.images.generate(**IMAGE, response_format="url")
        assert [one.b64_json for one in link.data] == [None]


@CALLERS
async def test_a_streamed_image_is_a_completed_event(
    app: RunningApp, account: Account, protocol: str, mode: str
) -> None:
    async with sdk(app, account, protocol, mode) as client:
        stream = await client.images.generate(
            **(IMAGE | {"size": "1024x1024"}), stream=True, output_format="webp", quality="high"
        )
        (event,) = [event async for event in stream]
        assert stream.response.headers["X-Pomelo-Adjusted"] == "quality"
        check(event, ImageGenCompletedEvent)
        assert isinstance(event, ImageGenCompletedEvent)
        assert base64.b64decode(event.b64_json)[8:12] == b"WEBP"
        assert (event.output_format, event.size) == ("webp", "1024x1024")


@CALLERS
async def test_speech_is_spoken_and_transcribed_in_every_format(
    app: RunningApp, account: Account, protocol: str, mode: str
) -> None:
    async with sdk(app, account, protocol, mode) as client:
        audio = await speak(client)
        app.upstream.when("", Transcript(TEXT))

        async def transcribe(**options: Any) -> Any:
            return await client.audio.transcriptions.create(model=STT, file=("speech.mp3", audio), **options)

        plain = await transcribe()
        check(plain, Transcription)
        assert plain.text == TEXT
        assert await transcribe(response_format="text") == TEXT + "\n"
        assert (await transcribe(chunking_strategy={"type": "server_vad"})).text == TEXT
        verbose = await transcribe(
            response_format="verbose_json", timestamp_granularities=["word", "segment"]
        )
        check(verbose, TranscriptionVerbose)
        assert " ".join(word.word for word in verbose.words) == TEXT
        assert [segment.text for segment in verbose.segments] == SENTENCES
        assert 0 < verbose.segments[-1].end <= verbose.duration
        diarized = await transcribe(response_format="diarized_json")
        check(diarized, TranscriptionDiarized)
        srt, vtt = await transcribe(response_format="srt"), await transcribe(response_format="vtt")
        assert srt.startswith("1\n00:00:00,000 --> 00:00:0")
        assert srt.count(" --> ") == vtt.count(" --> ") == 2
        assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:0")
        events = [event async for event in await transcribe(stream=True)]
        assert [type(event) for event in events] == [TranscriptionTextDeltaEvent, TranscriptionTextDoneEvent]
        for event in events:
            check(event, type(event))
        assert events[0].delta == events[1].text == TEXT


@CALLERS
@pytest.mark.parametrize(
    ("response_format", "start"), [("mp3", b"ID3"), ("opus", b"OggS"), ("wav", b"RIFF"), ("pcm", b"")]
)
async def test_speech_has_the_format_that_was_asked_for(
    app: RunningApp, account: Account, protocol: str, mode: str, response_format: str, start: bytes
) -> None:
    async with sdk(app, account, protocol, mode) as client:
        audio = await speak(client, response_format=response_format, speed=1.1)
        if mode == "live":
            start = b"\xff\xfb" if response_format == "mp3" else start
        assert audio.startswith(start)
        if response_format == "wav":
            with wave.open(io.BytesIO(audio)) as file:
                assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24_000, 1, 2)
        if mode == "live":
            assert app.upstream.requests[-1].body["voice_settings"] == {"speed": 1.1}


@CALLERS
@pytest.mark.parametrize("stream_format", ["audio", "sse"])
async def test_adjusted_parameters_have_openais_names(
    app: RunningApp, account: Account, protocol: str, mode: str, stream_format: Any
) -> None:
    async with sdk(app, account, protocol, mode) as client:
        given: dict[str, Any] = {"speed": 4, "instructions": "Whisper", "stream_format": stream_format}
        speech = await client.audio.speech.with_raw_response.create(**(SPEECH | given))
        assert speech.headers["X-Pomelo-Adjusted"] == "speed=1.2; instructions"
        image = await client.images.with_raw_response.generate(
            **(IMAGE | {"size": "64x64", "style": "natural"})
        )
        assert image.headers["X-Pomelo-Adjusted"] == "size=256x256; style"


@CALLERS
async def test_events_of_speech_have_the_raw_audio(
    app: RunningApp, account: Account, protocol: str, mode: str
) -> None:
    async with sdk(app, account, protocol, mode) as client:
        whole = await speak(client)
        options: dict[str, Any] = {"cast_to": object, "stream": True, "stream_cls": openai.AsyncStream[Any]}
        stream = await client.post("/audio/speech", body=SPEECH | {"stream_format": "sse"}, **options)
        *deltas, done = [event async for event in stream]
        assert b"".join(base64.b64decode(delta["audio"]) for delta in deltas) == whole
        assert done["type"] == "speech.audio.done"
        for event in (*deltas, done):
            assert not published.errors("CreateSpeechResponseStreamEvent", event)


@pytest.mark.parametrize(
    ("code", "raised"),
    [
        ("invalid_parameter", openai.BadRequestError),
        ("content_policy_violation", openai.BadRequestError),
        ("insufficient_credits", openai.APIStatusError),
        ("model_not_allowed", openai.PermissionDeniedError),
        ("rate_limit_exceeded", openai.RateLimitError),
        ("idempotency_conflict", openai.ConflictError),
        ("idempotency_mismatch", openai.UnprocessableEntityError),
        ("provider_unavailable", openai.InternalServerError),
        ("deadline_exceeded", openai.InternalServerError),
    ],
)
async def test_errors_are_the_sdks_own_exceptions(
    app: RunningApp, account: Account, code: str, raised: type[openai.APIStatusError]
) -> None:
    async with sdk(app, account, "rest", "test") as client:
        trigger = f"[[error:{code}]]"
        for call in (
            client.images.generate(**(IMAGE | {"prompt": trigger})),
            client.audio.speech.create(**(SPEECH | {"input": trigger})),
        ):
            with pytest.raises(openai.APIStatusError) as caught:
                await call
            assert type(caught.value) is raised
            assert (caught.value.code, caught.value.status_code) == (code, TABLE[code].http)
            assert caught.value.request_id


async def test_a_wrong_key_is_an_authentication_error(app: RunningApp, account: Account) -> None:
    async with sdk(app, account, "rest", "test") as client:
        unknown = client.with_options(api_key="pml_test_wrong")
        for call in (
            unknown.images.generate(**IMAGE),
            unknown.audio.speech.create(**SPEECH),
            unknown.audio.transcriptions.create(model=STT, file=b"ID3 some audio"),
        ):
            with pytest.raises(openai.AuthenticationError) as caught:
                await call
            assert caught.value.code == "invalid_api_key"


async def test_the_sdk_names_the_parameter_at_fault(app: RunningApp, account: Account) -> None:
    async with sdk(app, account, "rest", "test") as client:
        for call, param in (
            (client.images.generate(**(IMAGE | {"size": "1x1"})), "size"),
            (client.audio.speech.create(**(SPEECH | {"input": ""})), "input"),
            (client.audio.speech.create(**SPEECH, response_format="flac"), "response_format"),
            (client.audio.transcriptions.create(model=STT, file=("a.mp3", b"")), "file"),
            (client.audio.transcriptions.create(model="gpt-4", file=b"ID3"), "model"),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                await call
            assert caught.value.param == param


async def test_the_sdk_repeats_a_call_that_the_vendor_could_not_take(
    app: RunningApp, account: Account
) -> None:
    async def nothing() -> None:
        return

    async with sdk(app, account, "rest", "live") as client, instead_of_waiting(nothing) as waits:
        app.upstream.script(
            error_reply(429, "system_busy", error_type="rate_limit_error", headers={"Retry-After": "7"})
        )
        patient = client.with_options(max_retries=3)
        response = await patient.audio.speech.with_raw_response.create(**SPEECH)
        assert (response.retries_taken, len(app.upstream.requests), waits) == (1, 2, [7])


async def test_the_sdk_repeats_speech_that_breaks_off_unless_it_is_streamed(app: RunningApp) -> None:
    async def nothing() -> None:
        return

    account, speech = await app.account(), SPEECH | {"input": f"[[cut]] {TEXT * 20}"}
    async with sdk(app, account, "rest", "test", max_retries=2) as client, instead_of_waiting(nothing):
        with pytest.raises(openai.APIConnectionError):
            await client.audio.speech.create(**speech)
        assert [record.cost > 0 for record in await app.records(account)] == [True] * 3
        once = client.audio.speech.with_streaming_response.create(**speech)
        with pytest.raises(httpx2.TransportError):
            async with once as response:
                await response.read()
        assert len(await app.records(account)) == 4


@pytest.mark.parametrize("model", ["flux-1-pro", "eleven-labs-tts", STT])
async def test_a_task_costs_the_same_as_over_the_tasks_api(app: RunningApp, model: str) -> None:
    mine, other = await app.account(), await app.account()
    async with sdk(app, mine, "rest", "live") as client:
        if model == STT:
            await client.audio.transcriptions.create(model=STT, file=("a.wav", WAV))
            body: dict[str, Any] = {"audio": base64.b64encode(WAV).decode()}
        elif model == "eleven-labs-tts":
            await speak(client)
            body = {"text": TEXT, "voice": "alloy"}
        else:
            await client.images.generate(**IMAGE)
            body = {"prompt": "A kite", "width": 256, "height": 288}
    await app.ask("rest", other.live, {"model": model, **body})
    bills = [
        (record.cost, record.images, record.pixels, record.characters, record.audio_ms, record.wire)
        for record in (await app.only_record(mine), await app.only_record(other))
    ]
    assert bills[0] == bills[1]
    assert bills[0][0] > 0
