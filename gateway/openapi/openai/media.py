"""Images, speech and transcripts in the form of OpenAI's API in the OpenAPI description."""

from __future__ import annotations

from gateway.openai.images import DEFAULTS
from gateway.openai.images import NO_EFFECT as IMAGE_NO_EFFECT
from gateway.openai.speech import NO_EFFECT as SPEECH_NO_EFFECT
from gateway.openai.transcriptions import FORMATS, GRANULARITIES, GRANULARITY_NAMES
from gateway.openai.transcriptions import NO_EFFECT as TRANSCRIPTION_NO_EFFECT
from gateway.openapi.openai.operations import (
    SAFETY_IDENTIFIER,
    SSE,
    USER,
    events,
    example,
    only,
    task_operation,
    task_properties,
    without_effect,
)
from gateway.openapi.schema import COUNT, JSON, TEXT, Models, Schema, closed, object_of, ref, union
from gateway.openapi.tasks import AUDIO_TYPES, BINARY, task_schema
from gateway.types import TASK_FORMATS
from gateway.types.base import MEDIA_SCHEMA
from pomelo.audio_formats import OUTPUT_FORMATS
from pomelo.gen.v1.task_pb2 import TaskType

_TEXT_CONTENT: Schema = {"schema": TEXT}
_NUMBER: Schema = {"type": "number"}


def _typed(event_type: str, **members: Schema) -> Schema:
    return object_of({"type": {"type": "string", "enum": [event_type]}, **members})


# --- images

_IMAGES = {"created": COUNT, "data": {"type": "array", "items": MEDIA_SCHEMA, "minItems": 1, "maxItems": 1}}
_IMAGE_EVENT = _typed(
    "image_generation.completed",
    created_at=COUNT,
    output_format=TEXT,
    size=TEXT,
    quality=TEXT,
    background=TEXT,
    usage={"type": "object"},
)
_IMAGE_EVENT["properties"] |= MEDIA_SCHEMA["properties"]  # a link in place of the bytes, above 16 MiB


def _image_request(task: Schema) -> Schema:
    named = ("model", "prompt", "response_format", "output_format", "stream", "metadata")
    properties = {
        **task_properties(task, *named, "seed", "num_inference_steps", "guidance_scale"),
        "size": {
            "type": ["string", "null"],
            "pattern": "^(auto|[0-9]{2,4}x[0-9]{2,4})$",
            "description": "auto, or the width and height in pixels.",
        },
        **only(DEFAULTS),
        "user": USER,
        "safety_identifier": SAFETY_IDENTIFIER,
        **without_effect(IMAGE_NO_EFFECT),
    }
    return closed(properties, ("model", "prompt"))


# --- speech

_SPEECH_USAGE = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), COUNT)
_SPEECH_EVENTS = {
    "SpeechEvent": union(
        "An event of speech.", {"speech.audio.delta": "SpeechDelta", "speech.audio.done": "SpeechDone"}
    ),
    "SpeechDelta": _typed("speech.audio.delta", audio={**TEXT, "description": "Base64 to append."}),
    "SpeechDone": _typed("speech.audio.done", usage=object_of(_SPEECH_USAGE)),
}


def _speech_request(task: Schema, speed: Schema) -> Schema:
    fields = task["properties"]
    properties = {
        **task_properties(task, "model", "voice_settings", "language_code", "seed", "metadata"),
        "input": fields["text"],
        "voice": {
            "anyOf": [fields["voice"], closed({"id": TEXT})],
            "description": "A voice's name or id.",
        },
        "response_format": {
            "enum": [*OUTPUT_FORMATS, *fields["output_format"]["enum"]],
            "default": next(iter(OUTPUT_FORMATS)),
        },
        "speed": {**speed, "description": "The same as voice_settings.speed."},
        "stream_format": {"enum": ["audio", "sse", None], "default": "audio"},
        **without_effect(SPEECH_NO_EFFECT),
    }
    return closed(properties, ("model", "input", "voice"))


# --- transcripts

_SEGMENT_TIMES = {"start": _NUMBER, "end": _NUMBER}
_SEGMENT = {
    "id": COUNT,
    "seek": COUNT,
    **_SEGMENT_TIMES,
    "text": TEXT,
    "tokens": {"type": "array", "items": COUNT, "maxItems": 0},
    **dict.fromkeys(("temperature", "avg_logprob", "compression_ratio", "no_speech_prob"), _NUMBER),
}
_SPEAKER_SEGMENT = {
    "type": {"const": "transcript.text.segment"},
    "id": TEXT,
    **_SEGMENT_TIMES,
    "text": TEXT,
    "speaker": TEXT,
}
_TRANSCRIPT = {"text": TEXT, "usage": object_of({"type": {"const": "duration"}, "seconds": _NUMBER})}
_DURATION = {"task": {"const": "transcribe"}, "duration": _NUMBER}
_VERBOSE = {**_DURATION, "language": TEXT, **_TRANSCRIPT}
_DIARIZED = {
    **_DURATION,
    **_TRANSCRIPT,
    "segments": {"type": "array", "items": object_of(_SPEAKER_SEGMENT)},
}
_TRANSCRIPT_SCHEMAS = {
    "Transcript": {
        "anyOf": [ref(name) for name in ("VerboseTranscript", "DiarizedTranscript", "PlainTranscript")]
    },
    "PlainTranscript": object_of(_TRANSCRIPT),
    "VerboseTranscript": object_of(
        {
            **_VERBOSE,
            "words": {"type": "array", "items": object_of({"word": TEXT, **_SEGMENT_TIMES})},
            "segments": {"type": "array", "items": object_of(_SEGMENT)},
        },
        _VERBOSE,
    ),
    "DiarizedTranscript": object_of(_DIARIZED),
    "TranscriptEvent": union(
        "An event of a transcript.",
        {"transcript.text.delta": "TranscriptDelta", "transcript.text.done": "TranscriptDone"},
    ),
    "TranscriptDelta": _typed("transcript.text.delta", delta=TEXT),
    "TranscriptDone": _typed("transcript.text.done", text=TEXT),
}


def _transcription_form(model: Schema) -> Schema:
    properties = {
        "model": {**model, "examples": ["eleven-labs-stt"]},
        "file": {"type": "string", "format": "binary", "contentMediaType": "application/octet-stream"},
        "language": {**TEXT, "description": "An ISO 639 code or a BCP 47 tag, such as en or en-US."},
        "response_format": {"type": "string", "enum": [*FORMATS], "default": "json"},
        # Clients are generated from the SDKs' name alone: with both, they would have one name twice.
        GRANULARITIES[0]: {
            "type": "array",
            "items": {"type": "string", "enum": sorted(GRANULARITY_NAMES)},
            "description": "What verbose_json has times of.",
        },
        "stream": {"type": "string", "enum": ["true", "false"]},
        "diarize": {"type": "string", "enum": ["true", "false"], "description": "Distinguish speakers."},
        "num_speakers": TEXT,
        **{name: {**TEXT, **each} for name, each in without_effect(TRANSCRIPTION_NO_EFFECT).items()},
    }
    properties["chunking_strategy"] |= {
        "type": ["string", "object"],
        "description": "No effect. Listed in X-Pomelo-Adjusted. The members of an object may be parts, such "
        "as chunking_strategy[type].",
    }
    return closed(properties, ("model", "file"))


# --- all


def schemas(models: Models) -> dict[str, Schema]:
    """Returns the schemas; `models` are the models by name."""
    image, speech, transcript = (
        task_schema(task_type, models)
        for task_type in (
            TaskType.TASK_TYPE_IMAGE,
            TaskType.TASK_TYPE_TEXT_TO_SPEECH,
            TaskType.TASK_TYPE_SPEECH_TO_TEXT,
        )
    )
    speech_schemas = TASK_FORMATS[TaskType.TASK_TYPE_TEXT_TO_SPEECH].schemas
    return {
        "ImageRequest": _image_request(image),
        "Images": object_of(_IMAGES),
        "ImageEvent": _IMAGE_EVENT,
        "SpeechRequest": _speech_request(speech, speech_schemas["VoiceSettings"]["properties"]["speed"]),
        **_SPEECH_EVENTS,
        "TranscriptionForm": _transcription_form(transcript["properties"]["model"]),
        **_TRANSCRIPT_SCHEMAS,
    }


_IMAGE_EXAMPLES = example("An image", model="flux-1-schnell", prompt="A kite over the sea", size="1024x768")
_SPEECH_EXAMPLES = example("Speech", model="eleven-labs-tts", voice="alloy", input="Good morning.")
# Never sent, but the only media type by which openapi-python-client knows a file.
_FILE = "application/octet-stream"


def paths() -> Schema:
    """Returns the operations."""
    return {
        "/v1/images/generations": task_operation(
            "createImage",
            "Run an image task in the form of OpenAI's API.",
            {JSON: {"schema": ref("ImageRequest"), "examples": _IMAGE_EXAMPLES}},
            {JSON: {"schema": ref("Images")}, SSE: events("ImageEvent")},
        ),
        "/v1/audio/speech": task_operation(
            "createSpeech",
            "Run a text-to-speech task in the form of OpenAI's API.",
            {JSON: {"schema": ref("SpeechRequest"), "examples": _SPEECH_EXAMPLES}},
            {**dict.fromkeys((*AUDIO_TYPES, _FILE), BINARY), SSE: events("SpeechEvent")},
            "The audio is sent as it arrives; with `stream_format` sse, as events.",
        ),
        "/v1/audio/transcriptions": task_operation(
            "createTranscription",
            "Run a speech-to-text task in the form of OpenAI's API.",
            {"multipart/form-data": {"schema": ref("TranscriptionForm")}},
            {
                JSON: {"schema": ref("Transcript")},
                **dict.fromkeys(("text/plain", "text/vtt"), _TEXT_CONTENT),
                SSE: events("TranscriptEvent"),
            },
        ),
    }
