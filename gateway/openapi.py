"""The OpenAPI 3.1 description of the REST API, served as /openapi.json.

Read by programs; the words for people are in docs/. Its field names come from the table in `fields`, so that
the two can't part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway import described_account
from gateway.described_headers import IDEMPOTENCY_KEY, PREFER
from gateway.fields import FIELDS
from gateway.schema import ANY, JSON, NUMBER, Schema, object_of, one_of, ranged, ref, responses, text
from pomelo.errors import TABLE
from pomelo.gen.v1.task_pb2 import TaskType

_FIELD_SCHEMAS: Mapping[str, Schema] = {
    "messages": {
        "type": "array",
        "items": ref("Message"),
        "minItems": 1,
        "maxItems": 10_000,
        "description": "The conversation, oldest first.",
    },
    "max_tokens": ranged("integer", 1, description="The most tokens to generate."),
    "temperature": ranged("number", 0, 2, description="Randomness."),
    "top_p": ranged("number", 0, 1, description="Nucleus sampling."),
    "stop": {
        "type": ["string", "array", "null"],
        "minLength": 1,
        "items": {"type": "string", "minLength": 1},
        "maxItems": 4,
        "description": "Text that ends the output, or up to 4 of them.",
    },
    "seed": ranged("integer", 0, 2**32 - 1, description="For repeatable output."),
    "presence_penalty": ranged("number", -2, 2),
    "frequency_penalty": ranged("number", -2, 2),
    "user": text(0, 256, description="Your own name for the end user."),
    "prompt": text(1, 10_000, description="What to draw."),
    "width": ranged("integer", 64, 2048, description="In pixels.", default=1024),
    "height": ranged("integer", 64, 2048, description="In pixels.", default=1024),
    "num_inference_steps": ranged("integer", 1, 100),
    "guidance_scale": ranged("number", 0, 20),
    "text": text(1, description="What to say."),
    "voice": text(1, description="A voice's name, such as adam, or its id."),
    "voice_settings": {"anyOf": [ref("VoiceSettings"), {"type": "null"}]},
    "language_code": text(description="A code of ISO 639 or a BCP 47 tag, such as en, eng or en-US."),
    "diarize": {"type": ["boolean", "null"], "description": "Tell speakers apart."},
    "num_speakers": ranged("integer", 1, 32),
    "timestamps": one_of("none", "word", "character"),
    "response_format": one_of(
        "url", "b64_json", description="A link or the bytes; both when absent, if they fit a stream's line."
    ),
}

_SOUND_FORMAT = text(description="Codec, rate and kbit/s, such as mp3_44100_128.")
_OWN_SCHEMAS: Mapping[tuple[int, str], Schema] = {
    (TaskType.TASK_TYPE_TEXT, "seed"): ranged("integer", 0, 2**53 - 1, description="For repeatable output."),
    (TaskType.TASK_TYPE_IMAGE, "seed"): ranged("integer", 0, 2**53 - 1, description="For the same picture."),
    (TaskType.TASK_TYPE_IMAGE, "output_format"): one_of("png", "jpeg", "webp"),
    (TaskType.TASK_TYPE_TEXT_TO_SPEECH, "output_format"): _SOUND_FORMAT,
    (TaskType.TASK_TYPE_SPEECH_TO_SPEECH, "output_format"): _SOUND_FORMAT,
}
"""Where a field is not the same for every kind."""

_KINDS: tuple[tuple[int, str, str, tuple[str, ...]], ...] = (
    (TaskType.TASK_TYPE_TEXT, "TextTask", "gpt-4", ("messages",)),
    (TaskType.TASK_TYPE_IMAGE, "ImageTask", "flux-1-pro", ("prompt",)),
    (TaskType.TASK_TYPE_TEXT_TO_SPEECH, "TextToSpeechTask", "eleven-labs-tts", ("text", "voice")),
    (TaskType.TASK_TYPE_SPEECH_TO_SPEECH, "SpeechToSpeechTask", "eleven-labs-sts", ("audio", "voice")),
    (TaskType.TASK_TYPE_SPEECH_TO_TEXT, "SpeechToTextTask", "eleven-labs-stt", ("audio",)),
)
_NULL = {"type": "null"}
"""Any other field is refused, unless it is null."""

_AUDIO = {
    "type": "string",
    "minLength": 2,
    "description": "Audio as base64, or as a data: URI; in a form, also as a file.",
}


def _tasks() -> dict[str, Schema]:
    schemas = {}
    for kind, name, example, required in _KINDS:
        properties: Schema = {
            "model": {"type": "string", "examples": [example], "description": "Decides the kind of task."},
            "stream": {"type": ["boolean", "null"], "default": False},
        }
        for field in FIELDS[kind]:
            schema = dict(_OWN_SCHEMAS.get((kind, field)) or _FIELD_SCHEMAS[field])
            if field in required and type(schema["type"]) is list:
                schema["type"] = schema["type"][0]
            properties[field] = schema
        if "audio" in required:
            properties["audio"] = _AUDIO
        schemas[name] = object_of(properties, ("model", *required), additionalProperties=_NULL)
    return schemas


def _form() -> Schema:
    properties: Schema = {
        field: {"type": "string"} for fields in FIELDS.values() for field in fields
    }  # All of a form's fields are texts; objects and lists are JSON text.
    properties |= {
        "model": {"type": "string", "examples": ["eleven-labs-stt"]},
        "stream": {"type": "string", "enum": ["true", "false"]},
        "audio": {"type": "string", "contentMediaType": "application/octet-stream"},
    }
    return object_of(
        properties,
        ["model"],
        additionalProperties=False,
        description="Fields of the model's task type; others are refused.",
    )


def _result(kind: str, prefix: str, **own: Any) -> Schema:
    return object_of(
        {
            "id": {"type": "string", "pattern": f"^{prefix}_"},
            "object": {"const": kind},
            "created": {"type": "integer", "description": "Unix seconds."},
            "model": {"type": "string"},
            **own,
        },
        ("id", "object", "created", "model", *own),
    )


def _schemas() -> dict[str, Schema]:
    count = {"type": "integer", "minimum": 0}
    medium = object_of(
        {
            "url": {
                "type": "string",
                "format": "uri",
                "description": "Signed; needs no key until it expires.",
            },
            "b64_json": {"type": "string", "contentEncoding": "base64"},
        }
    )
    price = object_of(
        {},
        additionalProperties={"type": "string", "pattern": r"^\d+(\.\d+)?$"},
        description="Credits for one unit.",
    )
    usage = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), count)
    message = object_of({"role": {"const": "assistant"}, "content": {"type": "string"}}, ("role", "content"))
    choice = object_of(
        {
            "index": {"const": 0},
            "message": message,
            "finish_reason": {"enum": ["stop", "length", "content_filter", None]},
        },
        ("index", "message", "finish_reason"),
    )
    word = object_of(
        {
            "text": {"type": "string"},
            "start": NUMBER,
            "end": NUMBER,
            "speaker": {"type": ["string", "null"]},
        },
        ("text", "start", "end", "speaker"),
    )
    return {
        **_tasks(),
        "Form": _form(),
        "Message": object_of(
            {
                "role": {"type": "string", "enum": ["system", "user", "assistant"]},
                "content": {
                    "anyOf": [
                        {"type": "string"},
                        {"type": "array", "items": ref("Part"), "minItems": 1, "maxItems": 100},
                    ]
                },
            },
            ("role", "content"),
            additionalProperties=_NULL,
        ),
        "Part": {
            "oneOf": [
                object_of(
                    {"type": {"const": "text"}, "text": {"type": "string"}},
                    ("type", "text"),
                    additionalProperties=_NULL,
                ),
                object_of(
                    {
                        "type": {"const": "image_url"},
                        "image_url": object_of(
                            {"url": {"type": "string", "description": "A data: URI with a base64 image."}},
                            ("url",),
                            additionalProperties=_NULL,
                        ),
                    },
                    ("type", "image_url"),
                    additionalProperties=_NULL,
                ),
            ]
        },
        "VoiceSettings": object_of(
            {
                "stability": ranged("number", 0, 1),
                "similarity_boost": ranged("number", 0, 1),
                "style": ranged("number", 0, 1),
                "use_speaker_boost": {"type": ["boolean", "null"]},
                "speed": ranged("number", 0.25, 4),
            },
            additionalProperties=_NULL,
        ),
        "TaskCompletion": _result(
            "task.completion",
            "task",
            choices={"type": "array", "items": choice, "minItems": 1, "maxItems": 1},
            usage=object_of({**usage, "prompt_tokens_details": ref("PromptTokensDetails")}, usage),
        ),
        "ImageGeneration": _result(
            "image.generation", "img", data={"type": "array", "items": medium, "minItems": 1}
        ),
        "SpeechGeneration": _result("speech.generation", "speech", audio=medium),
        "SpeechTranscription": _transcription(word),
        "PromptTokensDetails": object_of(
            {"cached_tokens": count, "cache_write_tokens": count},
            ("cached_tokens", "cache_write_tokens"),
            description="Of the input, what the provider read from its cache and wrote to it.",
        ),
        "Model": object_of(
            {
                "id": {"type": "string"},
                "object": {"const": "model"},
                "type": {"enum": ["text", "image", "text-to-speech", "speech-to-speech", "speech-to-text"]},
                "limits": object_of({}, additionalProperties={"type": "integer"}),
                "price": price,
                "price_tiers": {
                    "type": "array",
                    "items": object_of(
                        {"from_input_tokens": count, "price": price}, ("from_input_tokens", "price")
                    ),
                    "description": "What a task costs from that many tokens of input on.",
                },
                "price_version": {"type": "string"},
                "available": {"type": "boolean"},
                "deprecated": {
                    "type": ["string", "null"],
                    "format": "date",
                    "description": "Since when its end is announced; null: it is not.",
                },
                "retires": {
                    "type": ["string", "null"],
                    "format": "date",
                    "description": "The day on which it ends, in UTC; null: none is known.",
                },
            },
            (
                "id",
                "object",
                "type",
                "limits",
                "price",
                "price_version",
                "available",
                "deprecated",
                "retires",
            ),
        ),
        "ModelList": object_of(
            {"object": {"const": "list"}, "data": {"type": "array", "items": ref("Model")}},
            ("object", "data"),
        ),
        **described_account.schemas(),
        "Error": object_of(
            {
                "error": object_of(
                    {
                        "message": {"type": "string"},
                        "type": {"enum": sorted({row.type for row in TABLE.values()})},
                        "code": {"enum": list(TABLE)},
                    },
                    ("message", "type", "code"),
                    additionalProperties=False,
                )
            },
            ("error",),
            additionalProperties=False,
        ),
    }


def _transcription(word: Schema) -> Schema:
    return _result(
        "speech.transcription",
        "speech",
        text={"type": "string"},
        language={"type": "string"},
        words={"type": "array", "items": word},
    )


_TASK = tuple(code for code in TABLE if code not in ("not_found", "method_not_allowed"))
_BINARY: Mapping[str, Any] = {"schema": {"type": "string", "format": "binary"}}


def _task_operation() -> Schema:
    results = ("TaskCompletion", "ImageGeneration", "SpeechGeneration", "SpeechTranscription")
    media = ("image/png", "image/jpeg", "image/webp", "audio/mpeg", "audio/wav", "audio/ogg")
    return {
        "operationId": "runTask",
        "summary": "Runs a task; the model decides its kind.",
        "parameters": [
            {
                "name": "X-Request-Id",
                "in": "header",
                "schema": {"type": "string", "pattern": "^[!-~]{1,128}$"},
            },
            IDEMPOTENCY_KEY,
            PREFER,
            {
                "name": "X-Request-Timeout",
                "in": "header",
                "schema": {"type": "number", "minimum": 1, "maximum": 600, "default": 600},
                "description": "Seconds that the task may take; fractions, and less than 1, are taken too.",
            },
        ],
        "requestBody": {
            "required": True,
            "content": {
                JSON: {"schema": {"anyOf": [ref(name) for _, name, _, _ in _KINDS]}},
                "multipart/form-data": {"schema": ref("Form")},
            },
        },
        "responses": responses(
            {
                JSON: {"schema": {"oneOf": [ref(name) for name in results]}},
                "text/event-stream": {},
                **dict.fromkeys((*media, "application/octet-stream"), _BINARY),
            },
            *_TASK,
        ),
    }


def _path(name: str, example: str) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}, "example": example}


def _paths() -> Schema:
    download = {
        "operationId": "getMedia",
        "summary": "A picture or a sound, by its signed link.",
        "security": [{}, {"key": []}],
        "parameters": [
            _path("media_id", "media_01.png"),
            {"name": "exp", "in": "query", "schema": {"type": "string"}},
            {"name": "sig", "in": "query", "schema": {"type": "string"}},
        ],
        "responses": {
            **responses(
                {"*/*": _BINARY},
                "invalid_api_key",
                "invalid_parameter",
                "not_found",
                "overloaded",
                "store_unavailable",
                "shutting_down",
                "server_unavailable",
                "internal_error",
                "deadline_exceeded",
                "provider_unavailable",
            ),
            "206": {"description": "The part that Range asked for.", "content": {"*/*": _BINARY}},
        },
    }
    return {
        "/api/v1/task": {"post": _task_operation()},
        "/api/v1/models": {
            "get": {
                "operationId": "listModels",
                "summary": "The models that the key may use.",
                "responses": responses({JSON: {"schema": ref("ModelList")}}, *ANY),
            }
        },
        "/api/v1/models/{name}": {
            "get": {
                "operationId": "getModel",
                "summary": "One model.",
                "parameters": [_path("name", "gpt-4")],
                "responses": responses(
                    {JSON: {"schema": ref("Model")}},
                    *ANY,
                    "unsupported_model",
                    "model_not_allowed",
                    "not_found",
                ),
            }
        },
        **described_account.paths(),
        "/media/{media_id}": {"get": download},
    }


def document(public_url: str) -> Schema:
    """The whole description; `public_url` is the server it names, if any."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "Pomelo", "version": "1", "description": "AI tasks: text, images, speech."},
        "servers": [{"url": public_url or "/"}],
        "security": [{"key": []}],
        "paths": _paths(),
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": _schemas(),
        },
    }
