"""Jobs for the sandbox, and what comes of them; beside it, the eyes and ears of PyAV."""

from __future__ import annotations

import io
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import av

from pomelo.catalog.catalog import Catalog, Model, Route
from pomelo.gen.v1.image_pb2 import ImageInput
from pomelo.gen.v1.speech_pb2 import SpeechToSpeechInput, SpeechToTextInput, TextToSpeechInput, Transcription
from pomelo.gen.v1.text_pb2 import Message, Role, TextInput
from pomelo.media import audio as samples
from pomelo.media import demux
from pomelo.providers.base import AudioSource, Event, Job

CATALOG = Catalog.load()


def job(model: str | Model, given: Any, *, stream: bool = True, audio: AudioSource | None = None) -> Job:
    """A job as the engine makes it for a test key."""
    found = CATALOG.resolve(model) if isinstance(model, str) else model
    return Job("task_1", found, Route("sandbox", found.name), given, stream, float("inf"), audio)


async def gather(events: AsyncIterator[Event]) -> list[Event]:
    """All events."""
    return [event async for event in events]


def say(prompt: str, **given: Any) -> TextInput:
    """A text input of one message of a user."""
    return TextInput(messages=[Message(role=Role.ROLE_USER, content=prompt)], **given)


async def ask(
    sandbox: Any, given: TextInput, model: str | Model = "gpt-4", *, stream: bool = True
) -> list[Any]:
    """The text deltas of an answer."""
    return [event.text_delta for event in await gather(sandbox.text(job(model, given, stream=stream)))]


async def paint(sandbox: Any, model: str = "flux-1-pro", *, stream: bool = False, **given: Any) -> Any:
    """The picture of a whole answer."""
    events = await gather(sandbox.image(job(model, ImageInput(**given), stream=stream)))
    return events[-1].result.image.images[0]


@dataclass(frozen=True)
class Made:
    """A sound as it came."""

    data: bytes
    content_type: str
    chunks: list[bytes]

    @property
    def source(self) -> AudioSource:
        """The sound as an input."""
        return source(self.data, self.content_type)


def made(events: list[Event]) -> Made:
    """Joins the chunks of a sound."""
    chunks = [event.audio_chunk for event in events]
    assert all(chunk.content_type == "" for chunk in chunks[1:])
    return Made(b"".join(chunk.data for chunk in chunks), chunks[0].content_type, [c.data for c in chunks])


async def speak(sandbox: Any, text: str, output_format: str = "", **given: Any) -> Made:
    """Text to speech."""
    given = {"voice": "adam", **given}
    task = TextToSpeechInput(text=text, output_format=output_format, **given)
    return made(await gather(sandbox.text_to_speech(job("eleven-labs-tts", task))))


async def respeak(sandbox: Any, audio: AudioSource, output_format: str = "", **given: Any) -> Made:
    """Speech to speech."""
    given = {"voice": "bella", **given}
    task = SpeechToSpeechInput(output_format=output_format, **given)
    return made(await gather(sandbox.speech_to_speech(job("eleven-labs-sts", task, audio=audio))))


async def hear(sandbox: Any, audio: AudioSource, **given: Any) -> Transcription:
    """Speech to text."""
    task = job("eleven-labs-stt", SpeechToTextInput(**given), stream=False, audio=audio)
    (event,) = await gather(sandbox.speech_to_text(task))
    return event.result.transcription


def source(data: bytes, content_type: str = "") -> AudioSource:
    """Bytes as an input, measured as the engine does."""
    bare = samples.sample_format(content_type)
    ms = (
        -(-len(data) * 1000 // (bare[0] * bare[1]))
        if bare
        else demux.measure(io.BytesIO(data), len(data), raw=False)[0]
    )
    return AudioSource(content_type, len(data), data=data, ms=ms)


@dataclass(frozen=True)
class Decoded:
    """What PyAV makes of a sound."""

    container: str
    codec: str
    rate: int
    channels: int
    seconds: float
    samples: tuple[int, ...]


def decode(data: bytes, file_format: str | None = None, **options: str) -> Decoded:
    """Decodes a sound to 16-bit samples, by a decoder that shares no code with ours."""
    resampler = av.AudioResampler("s16", "mono")
    pcm = b""
    with av.open(io.BytesIO(data), format=file_format, options=options) as container:
        stream = container.streams.audio[0]
        for frame in container.decode(audio=0):
            for plain in resampler.resample(frame):
                pcm += bytes(plain.planes[0])[: plain.samples * 2]
        samples = struct.unpack(f"<{len(pcm) // 2}h", pcm)
        return Decoded(
            container.format.name,
            stream.codec_context.name,
            stream.rate,
            stream.codec_context.channels,
            len(samples) / stream.rate,
            samples,
        )
