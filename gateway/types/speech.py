"""Text-to-speech and speech-to-speech: `speech.generation` objects and their chunks of audio."""

from __future__ import annotations

import binascii
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from gateway.openapi import examples
from gateway.openapi.schema import closed, object_of, ref
from gateway.types import fields
from gateway.types.base import (
    LARGE_FILE,
    MEDIA_SCHEMA,
    Link,
    StreamObjects,
    TaskFormat,
    open_object,
    render_media,
    result_schema,
)
from pomelo.audio_formats import OUTPUT_FORMATS
from pomelo.errors import invalid
from pomelo.fields import (
    LANGUAGE,
    SPEECH_FIELDS,
    SPEECH_FORMAT,
    SPEECH_TO_SPEECH_FIELDS,
    TEXT_TO_SPEECH_FIELDS,
    VOICE_SETTINGS_FIELDS,
)
from pomelo.gen.v1.speech_pb2 import AudioChunk
from pomelo.gen.v1.task_pb2 import TaskResult

MAX_CHUNK_AUDIO = 45 * 1024
"""Bytes of audio in one event: its line stays below 64 KiB, and a multiple of three needs no padding."""

_VOICE_SETTINGS = {
    name: fields.flag(name, label=f"voice_settings.{name}")
    if rule.type == "boolean"
    else fields.number(name, VOICE_SETTINGS_FIELDS, label=f"voice_settings.{name}")
    for name, rule in VOICE_SETTINGS_FIELDS.items()
}


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
            raise fields.unknown_member("voice_settings", name, _VOICE_SETTINGS)
        field.assign(settings, setting)


def render_result(result: TaskResult, link: Link) -> bytes:
    audio = render_media(result.speech, link)
    return b"".join((open_object(result, "speech.generation"), b',"audio":', audio, b"}"))


def render_chunk(objects: StreamObjects, chunk: AudioChunk) -> Iterator[bytes]:
    """Returns `speech.generation.chunk` objects of at most `MAX_CHUNK_AUDIO` bytes of audio each."""
    data = chunk.data
    for at in range(0, len(data), MAX_CHUNK_AUDIO):
        prefix = objects.prefix("speech.generation.chunk", b',"audio":{"b64_json":"')
        yield prefix + binascii.b2a_base64(data[at : at + MAX_CHUNK_AUDIO], newline=False) + b'"}}'


_FORMATS_BY_MEDIA_TYPE = {
    **dict.fromkeys(("audio/mpeg", "audio/mp3"), ""),
    **dict.fromkeys(("audio/wav", "audio/x-wav", "audio/wave", "audio/vnd.wave"), OUTPUT_FORMATS["wav"]),
    **dict.fromkeys(("audio/ogg", "audio/opus"), OUTPUT_FORMATS["opus"]),
    "audio/pcm": OUTPUT_FORMATS["pcm"],
}
"""By media type; empty: the default."""

_FIELDS = (
    fields.text("voice", description="A voice's name, such as adam, or its id."),
    fields.Field(
        "voice_settings",
        _assign_voice_settings,
        fields.parse_json_text,
        {"anyOf": [ref("VoiceSettings"), {"type": "null"}]},
    ),
    fields.text(
        "output_format", expected=SPEECH_FORMAT, description="Codec, rate and kbit/s, such as mp3_44100_128."
    ),
    fields.integer("seed", SPEECH_FIELDS, description="For repeatable output."),
    fields.RESPONSE_FORMAT,
    fields.METADATA,
)

_PIECE_OF_AUDIO = {
    "b64_json": {
        "type": "string",
        "contentEncoding": "base64",
        "description": "A piece of the file; append it to the ones before it.",
    }
}
_SCHEMAS = {
    "VoiceSettings": closed(
        {name: fields.describe(rule, {}) for name, rule in VOICE_SETTINGS_FIELDS.items()}, ()
    ),
    "SpeechGeneration": result_schema("speech.generation", "speech", audio=MEDIA_SCHEMA),
    "SpeechGenerationChunk": result_schema(
        "speech.generation.chunk", "speech", audio=object_of(_PIECE_OF_AUDIO)
    ),
}

LANGUAGE_CODE = fields.text(
    "language_code",
    expected=LANGUAGE,
    minLength=1,
    description="A code of ISO 639 or a BCP 47 tag, such as en, eng or en-US.",
)

TEXT_TO_SPEECH = TaskFormat(
    name="text-to-speech",
    input="text_to_speech",
    output="speech",
    schema_name="TextToSpeechTask",
    result_schema_name="SpeechGeneration",
    schemas=_SCHEMAS,
    stream_schema_names=("SpeechGenerationChunk", "SpeechGeneration"),
    example_model="eleven-labs-tts",
    examples={
        "Speech from text": {
            "model": "eleven-labs-tts",
            "text": "Hello, this is a test of our text-to-speech API.",
            "voice": "adam",
            "response_format": "url",
        }
    },
    result_example={"audio": {"url": "https://your-domain.com/media/media_01.mp3?exp=1234571490&sig=AbC"}},
    rules=TEXT_TO_SPEECH_FIELDS,
    fields=fields.by_name(fields.text("text", description="What to say."), *_FIELDS, LANGUAGE_CODE),
    render_result=render_result,
    render_events={"audio_chunk": render_chunk},
    media_range="audio/",
    output_formats=_FORMATS_BY_MEDIA_TYPE,
    is_slow=lambda result: len(result.speech.data) > LARGE_FILE,
    ignores_audio_file=True,  # the API reference sends one with text-to-speech
)

SPEECH_TO_SPEECH = replace(
    TEXT_TO_SPEECH,
    name="speech-to-speech",
    input="speech_to_speech",
    schema_name="SpeechToSpeechTask",
    example_model="eleven-labs-sts",
    examples={
        "Speech in another voice": {
            "model": "eleven-labs-sts",
            "audio": examples.AUDIO,
            "voice": "adam",
            "response_format": "url",
        }
    },
    rules=SPEECH_TO_SPEECH_FIELDS,
    fields=fields.by_name(*_FIELDS),
    ignores_audio_file=False,
)
