"""Jobs for the tests of the ElevenLabs provider, and functions that run them."""

from __future__ import annotations

from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

from pomelo.catalog.catalog import Route
from pomelo.errors import PomeloError
from pomelo.gen.v1.speech_pb2 import SpeechToSpeechInput, SpeechToTextInput, TextToSpeechInput, Transcription
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.providers.base import AudioSource, Job
from pomelo.providers.elevenlabs.elevenlabs import ElevenLabs
from pomelo.providers.elevenlabs.voices import LAST_DAY
from pomelo.testing import Received
from tests.providers.rig import PROMPT, make_job, read_all, run

ADAM = "pNInz6obpgDQGcFmaJgB"
MP3 = b"\xff\xfb\x90\xc0" + b"a canary audio" * 100

MAKE = partial(ElevenLabs, today=lambda: LAST_DAY)
"""The provider, on a day on which there are default voices."""

TTS = Route("elevenlabs", "eleven_flash_v2_5", clamp={"speed": (0.7, 1.2, 0)})
STS = Route("elevenlabs", "eleven_multilingual_sts_v2", clamp={"speed": (0.7, 1.2, 0)})
STT = Route("elevenlabs", "scribe_v2")

_KINDS = {
    TextToSpeechInput: (TaskType.TASK_TYPE_TEXT_TO_SPEECH, TTS),
    SpeechToSpeechInput: (TaskType.TASK_TYPE_SPEECH_TO_SPEECH, STS),
    SpeechToTextInput: (TaskType.TASK_TYPE_SPEECH_TO_TEXT, STT),
}


def say(text: str = "x", voice: str = "adam", **options: Any) -> TextToSpeechInput:
    """The shortest text to speech, with options."""
    return TextToSpeechInput(text=text, voice=voice, **options)


def job(
    speech_input: Any = None,
    *,
    stream: bool = False,
    route: Route | None = None,
    audio: AudioSource | None = None,
) -> Job[Any]:
    """A job of the kind that `speech_input` is of; by default the shortest text to speech."""
    if speech_input is None:
        speech_input = say(PROMPT)
    kind, default_route = _KINDS[type(speech_input)]
    if audio is None and not isinstance(speech_input, TextToSpeechInput):
        audio = inline(MP3)
    return make_job(kind, route or default_route, speech_input, stream=stream, audio=audio)


def inline(data: bytes, content_type: str = "audio/mpeg") -> AudioSource:
    """Inline audio."""
    return AudioSource(content_type, len(data), data=data)


def stored(path: Path, content_type: str = "audio/mpeg") -> AudioSource:
    """Audio in a file."""
    return AudioSource(content_type, path.stat().st_size, path=path)


async def read_audio(provider: Any, speech_job: Job[Any]) -> tuple[bytes, str]:
    """The whole audio that the provider answers, and its media type; checks the pieces."""
    chunks = [event.audio_chunk for event in await read_all(provider, speech_job)]
    assert chunks
    assert all(0 < len(chunk.data) <= 65536 for chunk in chunks)
    assert chunks[0].content_type
    assert not any(chunk.content_type for chunk in chunks[1:]), "the first piece alone has the media type"
    return b"".join(chunk.data for chunk in chunks), chunks[0].content_type


async def transcript(provider: Any, speech_job: Job[Any]) -> Transcription:
    """The transcript that the provider answers."""
    (event,) = await read_all(provider, speech_job)
    result: Transcription = event.completed.transcription
    return result


async def failure(provider: Any, speech_job: Job[Any]) -> tuple[PomeloError, bytes]:
    """Returns the error that the job ends with, and the audio before it."""
    audio = b""
    try:
        async with aclosing(run(provider, speech_job)) as answer:
            async for event in answer:
                assert not event.HasField("completed"), "a failed answer looked complete"
                audio += event.audio_chunk.data
    except PomeloError as error:
        return error, audio
    raise AssertionError(f"no failure; received {len(audio)} bytes")


def form_fields(received: Received) -> dict[str, str | None]:
    """The fields of a form, its file with its SHA-256."""
    assert received.form is not None
    return {part.name: part.text if part.filename is None else part.sha256 for part in received.form}
