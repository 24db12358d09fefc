"""Jobs for the sandbox, functions that run them, and PyAV as an independent decoder of the results."""

from __future__ import annotations

import io
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import av

from pomelo.catalog.catalog import Catalog, Model, Route
from pomelo.gen.v1.image_pb2 import ImageInput
from pomelo.gen.v1.speech_pb2 import (
    SpeechToSpeechInput,
    SpeechToTextInput,
    TextToSpeechInput,
    Transcription,
    Word,
)
from pomelo.gen.v1.text_pb2 import ContentPart, FinishReason, Message, Role, TextInput
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.media import audio as audio_format
from pomelo.media import demux
from pomelo.protobuf.times import from_duration
from pomelo.providers.base import AudioSource, Event, Job

CATALOG = Catalog.load()


def job(model: str | Model, given: Any, *, stream: bool = True, audio: AudioSource | None = None) -> Job[Any]:
    """Builds the job that the engine builds for a test key."""
    resolved = CATALOG.by_any_name[model] if isinstance(model, str) else model
    return Job("task_1", resolved, Route("sandbox", resolved.name), given, stream, float("inf"), audio)


async def gather(events: AsyncIterator[Event]) -> list[Event]:
    """Returns all events."""
    return [event async for event in events]


def user_input(prompt: str, **given: Any) -> TextInput:
    """Returns a text input with one user message."""
    return TextInput(messages=[message(Role.ROLE_USER, prompt)], **given)


def message(role: Role.ValueType, text: str) -> Message:
    """A message with a text."""
    return Message(role=role, content=[ContentPart(text=text)])


@dataclass(frozen=True)
class Piece:
    """An event of a text: what it adds, and, of the last one, the finish reason and the usage."""

    content: str
    finish_reason: FinishReason.ValueType
    usage: Usage


async def ask(
    sandbox: Any, given: TextInput, model: str | Model = "gpt-4", *, stream: bool = True
) -> list[Piece]:
    """Returns the events of an answer."""
    *deltas, last = await gather(sandbox.text(job(model, given, stream=stream)))
    assert all(event.HasField("text_delta") for event in deltas)
    output = last.completed.text
    rest = "".join(part.text for part in output.message.content)
    return [
        *(Piece(event.text_delta.text, FinishReason.FINISH_REASON_UNSPECIFIED, Usage()) for event in deltas),
        Piece(rest, output.finish_reason, last.completed.usage),
    ]


def start(word: Word) -> float:
    """Returns the second at which a word starts."""
    return from_duration(word.start_offset)


def end(word: Word) -> float:
    """Returns the second at which a word ends."""
    return from_duration(word.end_offset)


async def generate_image(
    sandbox: Any, model: str = "flux-1-pro", *, stream: bool = False, **given: Any
) -> Any:
    """Returns the generated image."""
    events = await gather(sandbox.image(job(model, ImageInput(**given), stream=stream)))
    return events[-1].completed.image.images[0]


@dataclass(frozen=True)
class Speech:
    """Generated speech and the chunks that it arrived in."""

    data: bytes
    content_type: str
    chunks: list[bytes]

    @property
    def source(self) -> AudioSource:
        """The speech as the input of a task."""
        return source(self.data, self.content_type)


def join_chunks(events: list[Event]) -> Speech:
    """Joins the chunks of speech."""
    chunks = [event.audio_chunk for event in events]
    assert all(chunk.content_type == "" for chunk in chunks[1:])
    return Speech(b"".join(chunk.data for chunk in chunks), chunks[0].content_type, [c.data for c in chunks])


async def synthesize(sandbox: Any, text: str, output_format: str = "", **given: Any) -> Speech:
    """Runs a text-to-speech task."""
    given = {"voice": "adam", **given}
    task = TextToSpeechInput(text=text, output_format=output_format, **given)
    return join_chunks(await gather(sandbox.text_to_speech(job("eleven-labs-tts", task))))


async def convert(sandbox: Any, audio: AudioSource, output_format: str = "", **given: Any) -> Speech:
    """Runs a speech-to-speech task."""
    given = {"voice": "bella", **given}
    task = SpeechToSpeechInput(output_format=output_format, **given)
    return join_chunks(await gather(sandbox.speech_to_speech(job("eleven-labs-sts", task, audio=audio))))


async def transcribe(sandbox: Any, audio: AudioSource, **given: Any) -> Transcription:
    """Runs a speech-to-text task."""
    task = job("eleven-labs-stt", SpeechToTextInput(**given), stream=False, audio=audio)
    (event,) = await gather(sandbox.speech_to_text(task))
    return event.completed.transcription


def source(data: bytes, content_type: str = "") -> AudioSource:
    """Returns audio input with the duration that the engine would measure."""
    raw_format = audio_format.sample_format(content_type)
    ms = (
        -(-len(data) * 1000 // (raw_format[0] * raw_format[1]))
        if raw_format
        else demux.measure(io.BytesIO(data), len(data), raw=False)[0]
    )
    return AudioSource(content_type, len(data), data=data, ms=ms)


@dataclass(frozen=True)
class Decoded:
    """Audio as PyAV decodes it."""

    container: str
    codec: str
    rate: int
    channels: int
    seconds: float
    samples: tuple[int, ...]


def decode(data: bytes, file_format: str | None = None, **options: str) -> Decoded:
    """Decodes audio to 16-bit samples with a decoder that shares no code with the sandbox."""
    resampler = av.AudioResampler("s16", "mono")
    pcm = b""
    with av.open(io.BytesIO(data), "r", format=file_format, options=options) as container:
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
