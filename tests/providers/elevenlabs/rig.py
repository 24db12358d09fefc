"""Helpers for the tests of the ElevenLabs provider: jobs, and functions that run them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from pomelo.catalog.catalog import Limits, Model, Route
from pomelo.catalog.pricing import Prices
from pomelo.errors import PomeloError
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.gen.v1.speech_pb2 import (
    SpeechToSpeechInput,
    SpeechToTextInput,
    TextToSpeechInput,
    Transcription,
)
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.providers import Credentials
from pomelo.providers.base import AudioSource, Job, fit_hook, fit_job
from pomelo.providers.elevenlabs.elevenlabs import ElevenLabs
from pomelo.providers.elevenlabs.voices import LAST_DAY
from pomelo.providers.http.client import Http, Timeouts

KEY = "xi-canary-2718"
TEXT = "my canary text"
ADAM = "pNInz6obpgDQGcFmaJgB"
MP3 = b"\xff\xfb\x90\xc0" + b"a canary audio" * 100

TTS = Route("elevenlabs", "eleven_flash_v2_5", clamp={"speed": (0.7, 1.2, 0)})
STS = Route("elevenlabs", "eleven_multilingual_sts_v2", clamp={"speed": (0.7, 1.2, 0)})
STT = Route("elevenlabs", "scribe_v2")

_KINDS = {
    TextToSpeechInput: (TaskType.TASK_TYPE_TEXT_TO_SPEECH, TTS),
    SpeechToSpeechInput: (TaskType.TASK_TYPE_SPEECH_TO_SPEECH, STS),
    SpeechToTextInput: (TaskType.TASK_TYPE_SPEECH_TO_TEXT, STT),
}


def job(
    speech_input: Any = None,
    *,
    stream: bool = False,
    route: Route | None = None,
    audio: AudioSource | None = None,
) -> Job[Any]:
    """A job of the kind that `speech_input` is of; by default the shortest text to speech."""
    if speech_input is None:
        speech_input = TextToSpeechInput(text=TEXT, voice="adam")
    kind, default_route = _KINDS[type(speech_input)]
    model = Model(
        name="speech",
        task_type=kind,
        routes=(route or default_route,),
        limits=Limits(),
        prices=Prices({PriceUnit.PRICE_UNIT_AUDIO_MINUTE: 1}),
        price_version="test",
    )
    if audio is None and not isinstance(speech_input, TextToSpeechInput):
        audio = inline(MP3)
    return Job("task_1", model, route or default_route, speech_input, stream, deadline=1e12, audio=audio)


def inline(data: bytes, content_type: str = "audio/mpeg") -> AudioSource:
    """Inline audio."""
    return AudioSource(content_type, len(data), data=data)


def stored(path: Path, content_type: str = "audio/mpeg") -> AudioSource:
    """Audio in a file."""
    return AudioSource(content_type, path.stat().st_size, path=path)


@asynccontextmanager
async def open_provider(
    base_url: str, *, key: str | None = KEY, **timeouts: float
) -> AsyncIterator[ElevenLabs]:
    """The provider, called at `base_url`."""
    async with Http(Timeouts(**timeouts)) as http:
        provider = ElevenLabs(Credentials(key, base_url), http, today=lambda: LAST_DAY)
        yield provider
        await provider.aclose()


def events(provider: ElevenLabs, speech_job: Job[Any]) -> Any:
    """The provider's events for a job of any task type."""
    kind = TaskType.Name(speech_job.model.task_type).removeprefix("TASK_TYPE_").lower()
    return getattr(provider, kind)(fit_job(speech_job, fit_hook(provider, kind)))


async def read_audio(provider: ElevenLabs, speech_job: Job[Any]) -> tuple[bytes, str]:
    """The whole audio that the provider answers, and its media type; checks the pieces."""
    chunks: list[bytes] = []
    kind = ""
    async with aclosing(events(provider, speech_job)) as answer:
        async for event in answer:
            piece = event.audio_chunk
            assert 0 < len(piece.data) <= 65536
            assert bool(piece.content_type) == (not chunks), "the first piece alone has the media type"
            kind = kind or piece.content_type
            chunks.append(piece.data)
    assert chunks
    return b"".join(chunks), kind


async def transcript(provider: ElevenLabs, speech_job: Job[Any]) -> Transcription:
    """The transcript that the provider answers."""
    async with aclosing(events(provider, speech_job)) as answer:
        results: list[Transcription] = [event.result.transcription async for event in answer]
    assert len(results) == 1
    return results[0]


async def failure(provider: ElevenLabs, speech_job: Job[Any]) -> tuple[PomeloError, bytes]:
    """Returns the error that the job ends with, and the audio before it."""
    audio = b""
    try:
        async with aclosing(events(provider, speech_job)) as answer:
            async for event in answer:
                assert not event.HasField("result"), "a failed answer looked complete"
                audio += event.audio_chunk.data
    except PomeloError as error:
        return error, audio
    raise AssertionError(f"no failure; received {len(audio)} bytes")
