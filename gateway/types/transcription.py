"""Speech-to-text: `speech.transcription` objects."""

from __future__ import annotations

from pydantic_core import to_json

from gateway.openapi.schema import nullable, object_of, one_of
from gateway.types.base import (
    Link,
    TaskFormat,
    by_name,
    choice_field,
    flag_field,
    integer_field,
    result_schema,
)
from gateway.types.speech import LANGUAGE_CODE
from pomelo.gen.v1.speech_pb2 import Timestamps
from pomelo.gen.v1.task_pb2 import TaskResult


def render_result(result: TaskResult, link: Link) -> bytes:
    """Returns a `speech.transcription` object."""
    transcription = result.transcription
    return to_json(
        {
            "id": result.id,
            "object": "speech.transcription",
            "created": result.created.seconds,
            "model": result.model,
            "text": transcription.text,
            "language": transcription.language,
            "words": [
                {"text": word.text, "start": word.start, "end": word.end, "speaker": word.speaker or None}
                for word in transcription.words
            ],
        }
    )


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
            words={"type": "array", "items": object_of(_WORD, _WORD)},
        )
    },
    example_model="eleven-labs-stt",
    required=("audio",),
    fields=by_name(
        LANGUAGE_CODE,
        flag_field("diarize", {"type": ["boolean", "null"], "description": "Distinguish speakers."}),
        integer_field("num_speakers", nullable("integer", 1, 32), 32),
        choice_field(
            "timestamps",
            one_of("none", "word", "character"),
            {
                "none": Timestamps.TIMESTAMPS_NONE,
                "word": Timestamps.TIMESTAMPS_WORD,
                "character": Timestamps.TIMESTAMPS_CHARACTER,
            },
            "none, word, character",
        ),
    ),
    render_result=render_result,
)
