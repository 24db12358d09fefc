"""Speech-to-text: `speech.transcription` objects."""

from __future__ import annotations

from gateway.openapi import examples
from gateway.openapi.schema import object_of
from gateway.types import fields
from gateway.types.base import Link, TaskFormat, open_object, result_schema
from gateway.types.speech import LANGUAGE_CODE
from pomelo.fields import MANY_WORDS, SPEECH_TO_TEXT_FIELDS
from pomelo.gen.v1.speech_pb2 import TimestampGranularity
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.protobuf.times import from_duration


def render_result(result: TaskResult, link: Link) -> bytes:
    transcription = result.transcription
    words = [
        {
            "text": word.text,
            "start": from_duration(word.start_offset),
            "end": from_duration(word.end_offset),
            "speaker": word.speaker or None,
        }
        for word in transcription.words
    ]
    members = {"text": transcription.text, "language": transcription.language_code, "words": words}
    return open_object(result, "speech.transcription", **members) + b"}"


_WORD = {
    "text": {"type": "string"},
    "start": {"type": "number"},
    "end": {"type": "number"},
    "speaker": {"type": ["string", "null"]},
}

FORMAT = TaskFormat(
    name="speech-to-text",
    input="speech_to_text",
    output="transcription",
    schema_name="SpeechToTextTask",
    result_schema_name="SpeechTranscription",
    schemas={
        "SpeechTranscription": result_schema(
            "speech.transcription",
            "speech",
            text={"type": "string"},
            language={"type": "string"},
            words={"type": "array", "items": object_of(_WORD)},
        )
    },
    example_model="eleven-labs-stt",
    examples={"Text from speech": {"model": "eleven-labs-stt", "audio": examples.AUDIO}},
    result_example={
        "text": "Hi there.",
        "language": "en",
        "words": [
            {"text": "Hi", "start": 0.1, "end": 0.32, "speaker": None},
            {"text": "there.", "start": 0.34, "end": 0.7, "speaker": None},
        ],
    },
    rules=SPEECH_TO_TEXT_FIELDS,
    fields=fields.by_name(
        LANGUAGE_CODE,
        fields.flag("diarize", description="Distinguish speakers."),
        fields.integer("num_speakers", SPEECH_TO_TEXT_FIELDS, bits=32),
        fields.choice(
            "timestamps",
            fields.enum_values(TimestampGranularity, SPEECH_TO_TEXT_FIELDS["timestamps"].choices),
        ),
        fields.METADATA,
    ),
    render_result=render_result,
    is_slow=lambda result: len(result.transcription.words) > MANY_WORDS,
)
