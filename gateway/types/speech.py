"""Text-to-speech and speech-to-speech: `speech.generation` objects and their chunks of audio."""

from __future__ import annotations

import binascii
from collections.abc import Iterator
from typing import Any

from gateway.openapi.schema import NULL_ONLY, nullable, object_of, ref, text_schema
from gateway.types.base import (
    MEDIA_SCHEMA,
    RESPONSE_FORMAT,
    Field,
    Link,
    StreamObjects,
    TaskFormat,
    by_name,
    flag_field,
    integer_field,
    json_from_form,
    number_field,
    open_object,
    render_media,
    result_schema,
    text_field,
    unknown_field,
)
from pomelo.errors import invalid
from pomelo.gen.v1.speech_pb2 import AudioChunk
from pomelo.gen.v1.task_pb2 import TaskResult

MAX_CHUNK_AUDIO = 45 * 1024
"""Bytes of audio in one event: its line stays below 64 KiB, and a multiple of three needs no padding."""

_VOICE_SETTINGS = by_name(
    number_field("stability", nullable("number", 0, 1), "voice_settings.stability"),
    number_field("similarity_boost", nullable("number", 0, 1), "voice_settings.similarity_boost"),
    number_field("style", nullable("number", 0, 1), "voice_settings.style"),
    flag_field("use_speaker_boost", {"type": ["boolean", "null"]}, "voice_settings.use_speaker_boost"),
    number_field("speed", nullable("number", 0.25, 4), "voice_settings.speed"),
)


def _assign_voice_settings(message: Any, value: Any) -> None:
    if type(value) is not dict:
        raise invalid("voice_settings", "an object")
    settings = message.voice_settings
    settings.SetInParent()
    for name, setting in value.items():
        if setting is None:
            continue
        field = _VOICE_SETTINGS.get(name)
        if field is None:
            raise unknown_field(f"voice_settings.{name}")
        field.assign(settings, setting)


def render_result(result: TaskResult, link: Link) -> bytes:
    """Returns a `speech.generation` object."""
    speech = result.speech
    url = link(speech.media.url) if speech.HasField("media") else ""
    return open_object(result, "speech.generation") + b',"audio":' + render_media(url, speech.data) + b"}"


def render_chunk(objects: StreamObjects, chunk: AudioChunk) -> Iterator[bytes]:
    """Returns `speech.generation.chunk` objects of at most `MAX_CHUNK_AUDIO` bytes of audio each."""
    data = chunk.data
    for at in range(0, len(data), MAX_CHUNK_AUDIO):
        prefix = objects.prefix("speech.generation.chunk", b',"audio":{"b64_json":"')
        yield prefix + binascii.b2a_base64(data[at : at + MAX_CHUNK_AUDIO], newline=False) + b'"}}'


_FIELDS = by_name(
    text_field("voice", text_schema(1, description="A voice's name, such as adam, or its id.")),
    Field(
        "voice_settings",
        _assign_voice_settings,
        json_from_form,
        {"anyOf": [ref("VoiceSettings"), {"type": "null"}]},
    ),
    text_field("output_format", text_schema(description="Codec, rate and kbit/s, such as mp3_44100_128.")),
    integer_field("seed", nullable("integer", 0, 2**32 - 1, description="For repeatable output.")),
    RESPONSE_FORMAT,
)

_SCHEMAS = {
    "VoiceSettings": object_of(
        {name: each.schema for name, each in _VOICE_SETTINGS.items()}, additionalProperties=NULL_ONLY
    ),
    "SpeechGeneration": result_schema("speech.generation", "speech", audio=MEDIA_SCHEMA),
}

LANGUAGE_CODE = text_field(
    "language_code", text_schema(description="A code of ISO 639 or a BCP 47 tag, such as en, eng or en-US.")
)

TEXT_TO_SPEECH = TaskFormat(
    name="text-to-speech",
    input="text_to_speech",
    output="speech",
    schema_name="TextToSpeechTask",
    result_schema_name="SpeechGeneration",
    schemas=_SCHEMAS,
    example_model="eleven-labs-tts",
    required=("text", "voice"),
    fields={
        **by_name(text_field("text", text_schema(1, description="What to say."))),
        **_FIELDS,
        **by_name(LANGUAGE_CODE),
    },
    render_result=render_result,
    event="audio_chunk",
    render_event=render_chunk,
    media_range="audio/",
    ignores_audio_file=True,  # the API reference sends one with text-to-speech
)

SPEECH_TO_SPEECH = TaskFormat(
    name="speech-to-speech",
    input="speech_to_speech",
    output="speech",
    schema_name="SpeechToSpeechTask",
    result_schema_name="SpeechGeneration",
    schemas=_SCHEMAS,
    example_model="eleven-labs-sts",
    required=("audio", "voice"),
    fields=_FIELDS,
    render_result=render_result,
    event="audio_chunk",
    render_event=render_chunk,
    media_range="audio/",
)
