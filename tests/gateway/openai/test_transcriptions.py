"""`POST /v1/audio/transcriptions`: its form, its formats and its stream."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway.openai import transcriptions
from pomelo.errors import PomeloError
from pomelo.gen.v1.speech_pb2 import Transcription
from pomelo.gen.v1.task_pb2 import TaskEvent as Event
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.providers.transcripts import add_word
from tests.gateway.gateway_app import AUDIO, GatewayApp, OpenApp
from tests.gateway.openai.media_requests import STRICT, error_of, post
from tests.gateway.requests import FORM, Sending, events_of
from tests.gateway.scripts import Script, play

PATH = "audio/transcriptions"
STT = ("model", "eleven-labs-stt")
Field = tuple[str, str]


def form(*fields: Field, file: bytes = AUDIO, first: bool = False) -> bytes:
    """Returns a form with these fields, and the file before or after them."""
    head = 'Content-Disposition: form-data; name="file"; filename="a.mp3"\r\nContent-Type: audio/mpeg'
    parts = [f'Content-Disposition: form-data; name="{name}"\r\n\r\n{text}'.encode() for name, text in fields]
    parts.insert(0 if first else len(parts), head.encode() + b"\r\n\r\n" + file)
    return b"".join(b"--B\r\n" + part + b"\r\n" for part in parts) + b"--B--\r\n"


def transcribe(gateway: GatewayApp, *fields: Field, headers: dict[str, str] | None = None) -> Sending:
    """Posts a form with a file and these fields."""
    return post(gateway, PATH, data=form(STT, *fields), headers={"Content-Type": FORM, **(headers or {})})


def answer(*words: tuple[str, float, float, str], text: str = "", language: str = "en") -> Script:
    """Returns a script that answers with these words: their text, times and speaker."""
    made = Transcription(text=text or " ".join(word for word, *_ in words), language_code=language)
    made.audio_seconds = 2.5
    for word in words:
        add_word(made, *word)
    return play(Event(completed=TaskResult(transcription=made)))


TWO_SPEAKERS = answer(("Hi", 0, 0.5, "a"), ("there.", 0.5, 1, "a"), ("Hello!", 1.5, 2, "b"))


@pytest.mark.parametrize("first", [True, False])
async def test_parameters_become_the_fields_of_a_task(gateway: GatewayApp, first: bool) -> None:
    fields = (STT, ("language", "de"), ("diarize", "true"), ("num_speakers", "3"), ("temperature", "0"))
    sending = post(gateway, PATH, data=form(*fields, first=first), headers={"Content-Type": FORM, **STRICT})
    async with sending as response:
        assert await response.json() == {"text": "hi there", "usage": {"type": "duration", "seconds": 1.0}}
        assert "X-Pomelo-Adjusted" not in response.headers
    given = gateway.provider.jobs[-1].input
    assert (given.language_code, given.diarize, given.num_speakers) == ("de", True, 3)
    assert gateway.provider.received_audio[-1] == AUDIO
    assert gateway.provider.audio.path is not None, "it was stored as it arrived"


async def test_an_empty_language_and_stream_of_null_are_left_out(gateway: GatewayApp) -> None:
    fields = (("language", ""), ("stream", "null"), ("response_format", "verbose_json"))
    async with transcribe(gateway, *fields) as response:
        assert response.status == 200
    assert not gateway.provider.jobs[-1].input.language_code


async def test_the_transcript_may_be_plain_text_or_captions(gateway: GatewayApp) -> None:
    cues = "00:00:00{0}000 --> 00:00:01{0}000\nHi there.\n\n", "00:00:01{0}500 --> 00:00:02{0}000\nHello!\n\n"
    for response_format, content_type, body in (
        ("text", "text/plain; charset=utf-8", "Hi there. Hello!\n"),
        ("srt", "text/plain; charset=utf-8", "1\n" + cues[0].format(",") + "2\n" + cues[1].format(",")),
        ("vtt", "text/vtt", "WEBVTT\n\n" + "".join(cues).format(".")),
    ):
        gateway.provider.script = TWO_SPEAKERS
        async with transcribe(gateway, ("response_format", response_format)) as response:
            assert response.headers["Content-Type"] == content_type
            assert response.headers["X-Pomelo-Mode"] == "test"
            assert await response.text() == body


@pytest.mark.parametrize(
    ("granularities", "members"),
    [((), {"segments"}), (("word",), {"words"}), (("segment", "word"), {"words", "segments"})],
)
@pytest.mark.parametrize("parameter", ["timestamp_granularities[]", "timestamp_granularities"])
async def test_verbose_json_has_the_times_that_were_asked_for(
    gateway: GatewayApp, granularities: tuple[str, ...], members: set[str], parameter: str
) -> None:
    gateway.provider.script = TWO_SPEAKERS
    fields = [(parameter, name) for name in granularities]
    async with transcribe(gateway, ("response_format", "verbose_json"), *fields) as response:
        value = await response.json()
    words, segments = value.pop("words", None), value.pop("segments", None)
    assert {name for name, times in (("words", words), ("segments", segments)) if times} == members
    assert value == {
        **{"task": "transcribe", "language": "en", "duration": 2.5, "text": "Hi there. Hello!"},
        "usage": {"type": "duration", "seconds": 2.5},
    }
    if words:
        assert words[1] == {"word": "there.", "start": 0.5, "end": 1.0}
    if segments:
        assert [(s["id"], s["start"], s["end"], s["text"]) for s in segments] == [
            (0, 0.0, 1.0, "Hi there."),
            (1, 1.5, 2.0, "Hello!"),
        ]


async def test_diarized_json_has_the_speaker_of_each_segment(gateway: GatewayApp) -> None:
    gateway.provider.script = TWO_SPEAKERS
    async with transcribe(gateway, ("response_format", "diarized_json")) as response:
        value = await response.json()
    assert gateway.provider.jobs[-1].input.diarize
    assert [(each["speaker"], each["text"]) for each in value["segments"]] == [
        ("a", "Hi there."),
        ("b", "Hello!"),
    ]


async def test_a_long_transcript_is_rendered_as_a_short_one(
    gateway: GatewayApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = []
    for limit in (10**9, 0):
        monkeypatch.setattr(transcriptions, "_THREAD_CHARACTERS", limit)
        gateway.provider.script = TWO_SPEAKERS
        async with transcribe(gateway, ("response_format", "srt")) as response:
            bodies.append(await response.text())
    assert bodies[0] == bodies[1] != ""


async def test_an_idempotency_key_returns_the_same_transcript_in_every_format(gateway: GatewayApp) -> None:
    headers = {"Idempotency-Key": "one-transcript"}
    async with transcribe(gateway, headers=headers) as response:
        assert (await response.json())["text"] == "hi there"
    async with transcribe(gateway, ("response_format", "srt"), headers=headers) as response:
        assert response.headers["Idempotent-Replayed"] == "true"
        assert await response.text() == "1\n00:00:00,000 --> 00:00:00,500\nhi there\n\n"
    assert len(gateway.provider.jobs) == 1


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ([("response_format", "html")], "response_format"),
        ([("response_format", "srt"), ("stream", "true")], "response_format"),
        ([("timestamp_granularities[]", "word")], "timestamp_granularities"),
        (
            [("response_format", "verbose_json"), ("timestamp_granularities[]", "letter")],
            "timestamp_granularities",
        ),
        ([("language", "klingon")], "language"),
        ([("language", "en"), ("language", "de")], "language"),
        ([("stream", "maybe")], "stream"),
        ([("include[]", "logprobs")], "include[]"),
        ([("audio", "SUQz")], "file"),
        ([("language_code", "en")], "language"),
    ],
)
async def test_a_wrong_parameter_is_named(gateway: GatewayApp, fields: list[Field], parameter: str) -> None:
    assert await error_of(transcribe(gateway, *fields)) == (400, "invalid_parameter", parameter)
    assert not gateway.provider.jobs


@pytest.mark.parametrize(
    ("body", "refusal"),
    [
        (form(STT, file=b""), (400, "invalid_parameter", "file")),
        (form(file=AUDIO), (400, "missing_parameter", "model")),
        (form(("model", "eleven-labs-tts")), (400, "invalid_parameter", "model")),
        (form(("model", "eleven-labs-tts"), first=True), (400, "invalid_parameter", "model")),
        (form(("model", "gpt-4")), (400, "invalid_parameter", "model")),
        (
            form(STT).replace(b'; filename="a.mp3"\r\nContent-Type: audio/mpeg', b""),
            (400, "invalid_parameter", "file"),
        ),
        (
            form(STT).split(b'--B\r\nContent-Disposition: form-data; name="file"')[0] + b"--B--\r\n",
            (400, "missing_parameter", "file"),
        ),
    ],
)
async def test_a_form_needs_a_file_and_a_model_of_speech_to_text(
    gateway: GatewayApp, body: bytes, refusal: tuple[int, str, str]
) -> None:
    before = set(gateway.media.folder.iterdir())
    assert await error_of(post(gateway, PATH, data=body, headers={"Content-Type": FORM})) == refusal
    assert set(gateway.media.folder.iterdir()) == before, "a refused file is not kept"


async def test_json_is_refused(gateway: GatewayApp) -> None:
    refusal = await error_of(post(gateway, PATH, {"model": "eleven-labs-stt"}))
    assert refusal == (415, "unsupported_media_type", None)


async def test_a_file_that_is_too_large_is_refused(open_gateway: OpenApp) -> None:
    async with open_gateway(upload_limit=1000) as gateway:
        assert await error_of(transcribe(gateway)) == (413, "payload_too_large", None)
        assert not list(gateway.media.folder.iterdir())


async def test_parameters_without_effect_are_reported(gateway: GatewayApp) -> None:
    fields = ("temperature", "0.4"), ("prompt", "Names: Ann"), ("chunking_strategy", "auto")
    async with transcribe(gateway, *fields) as response:
        assert response.headers["X-Pomelo-Adjusted"] == "temperature; prompt"
    refusal = await error_of(transcribe(gateway, *fields, headers=STRICT))
    assert refusal == (400, "invalid_parameter", "temperature")


@pytest.mark.parametrize("first", [True, False])
async def test_an_object_without_effect_may_be_split_into_parts(gateway: GatewayApp, first: bool) -> None:
    """As OpenAI's SDKs write objects in forms."""
    members = ("chunking_strategy[type]", "server_vad"), ("chunking_strategy[threshold]", "")
    fields = members if first else (("chunking_strategy", "auto"), *members)
    async with transcribe(gateway, *fields) as response:
        assert response.status == 200
        assert response.headers["X-Pomelo-Adjusted"] == "chunking_strategy"
    refusal = await error_of(transcribe(gateway, *fields, headers=STRICT))
    assert refusal == (400, "invalid_parameter", "chunking_strategy")
    name = "chunking_strategy[type]"
    assert await error_of(transcribe(gateway, *fields, members[0])) == (400, "invalid_parameter", name)


@pytest.mark.parametrize(
    "response_format", [(), (("response_format", "json"),), (("response_format", "text"),)]
)
async def test_a_stream_has_the_text_as_a_delta_and_as_a_whole(
    gateway: GatewayApp, response_format: tuple[Field, ...]
) -> None:
    delta, whole, end = await events_of(transcribe(gateway, ("stream", "true"), *response_format))
    assert delta == ("message", {"type": "transcript.text.delta", "delta": "hi there"})
    assert whole == ("message", {"type": "transcript.text.done", "text": "hi there"})
    assert end == ("message", "[DONE]")


async def test_a_stream_that_fails_after_a_comment_ends_with_the_error(open_gateway: OpenApp) -> None:
    async with open_gateway(keep_alive=0.01) as gateway:
        proceed = asyncio.Event()
        gateway.provider.script = play(
            proceed.wait, PomeloError("invalid_parameter", "audio?", field="audio")
        )
        async with asyncio.timeout(20), transcribe(gateway, ("stream", "true")) as response:
            assert await response.content.readuntil(b"\n\n") == b": keep-alive\n\n"
            proceed.set()
            body: Any = await response.read()
        assert b'"message":"file?"' in body
        assert b"[DONE]" not in body
