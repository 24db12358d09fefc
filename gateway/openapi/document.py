"""The OpenAPI 3.1 description of the REST API, served as /openapi.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.openapi import account
from gateway.openapi.schema import (
    COMMON_ERRORS,
    JSON,
    NULL_ONLY,
    Schema,
    object_of,
    operation,
    parameter,
    ref,
    responses,
)
from gateway.types import TASK_FORMATS
from gateway.types.base import TaskFormat
from gateway.types.fields import describe
from pomelo.errors import GRPC_ERRORS, TABLE

_AUDIO = {
    "minLength": 2,
    "description": "Audio as base64, or as a data: URI; in a form, also as a file.",
}
_DATE_OR_NULL = {"type": ["string", "null"], "format": "date"}
_BINARY: Mapping[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_CODES = tuple(code for code in TABLE if code not in GRPC_ERRORS)
_TASK_ERRORS = tuple(code for code in _CODES if code not in ("not_found", "method_not_allowed"))


def _task(task_format: TaskFormat) -> Schema:
    properties: Schema = {
        "model": {
            "type": "string",
            "examples": [task_format.example_model],
            "description": "Decides the type of task.",
        },
        "stream": {"type": ["boolean", "null"], "default": False},
    }
    for name, rule in task_format.rules.items():
        field = task_format.fields.get(name)
        properties[name] = describe(rule, _AUDIO if field is None else field.schema)
    for name, field in task_format.fields.items():
        if name not in task_format.rules:
            properties[name] = field.schema
    required = (name for name, rule in task_format.rules.items() if rule.required)
    return object_of(properties, ("model", *required), additionalProperties=NULL_ONLY)


def _form() -> Schema:
    properties: Schema = {
        name: {"type": "string"} for each in TASK_FORMATS.values() for name in each.fields
    }  # All fields of a form are text; objects and lists are JSON text.
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


def _model() -> Schema:
    count = {"type": "integer", "minimum": 0}
    price = object_of(
        {},
        additionalProperties={"type": "string", "pattern": r"^\d+(\.\d+)?$"},
        description="Credits for one unit.",
    )
    tier = {"from_input_tokens": count, "price": price}
    required = {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "type": {"enum": [each.name for each in TASK_FORMATS.values()]},
        "limits": object_of({}, additionalProperties={"type": "integer"}),
        "price": price,
        "price_version": {"type": "string"},
        "available": {"type": "boolean"},
        "deprecated": {**_DATE_OR_NULL, "description": "When its end was announced; null: it was not."},
        "retires": {**_DATE_OR_NULL, "description": "Its last day in UTC; null: none is known."},
    }
    tiers = {
        "type": "array",
        "items": object_of(tier, tier),
        "description": "The prices of a task from that many input tokens on.",
    }
    return object_of({**required, "price_tiers": tiers}, required)


def _error() -> Schema:
    error = {
        "message": {"type": "string"},
        "type": {"enum": sorted({row.type for row in TABLE.values()})},
        "code": {"enum": list(_CODES)},
    }
    body = {"error": object_of(error, error, additionalProperties=False)}
    return object_of(body, body, additionalProperties=False)


def _schemas() -> dict[str, Schema]:
    models = {"object": {"const": "list"}, "data": {"type": "array", "items": ref("Model")}}
    schemas = {each.schema_name: _task(each) for each in TASK_FORMATS.values()}
    for each in TASK_FORMATS.values():
        schemas |= each.schemas
    return {
        **schemas,
        "Form": _form(),
        "Model": _model(),
        "ModelList": object_of(models, models),
        **account.schemas(),
        "Error": _error(),
    }


def _task_operation() -> Schema:
    tasks = [ref(each.schema_name) for each in TASK_FORMATS.values()]
    results = dict.fromkeys(each.result_schema_name for each in TASK_FORMATS.values())
    media = ("image/png", "image/jpeg", "image/webp", "audio/mpeg", "audio/wav", "audio/ogg")
    return {
        "operationId": "runTask",
        "summary": "Runs a task; the model decides its type.",
        "parameters": [
            parameter("X-Request-Id", "header", {"type": "string", "pattern": "^[!-~]{1,128}$"}),
            parameter(
                "Idempotency-Key",
                "header",
                {"type": "string", "pattern": "^[!-~]{1,255}$"},
                "A unique name of the request: if it is sent again within 24 hours, the first response is "
                "returned.",
            ),
            parameter(
                "Prefer",
                "header",
                {"type": "string"},
                "handling=strict (RFC 7240): a field that the model does not accept as it is is refused with "
                "invalid_parameter. By default it is adjusted, and listed in X-Pomelo-Adjusted.",
                example="handling=strict",
            ),
            parameter(
                "X-Request-Timeout",
                "header",
                {"type": "number", "minimum": 1, "maximum": 600, "default": 600},
                "Seconds that the task may take; fractions and values below 1 are accepted.",
            ),
        ],
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": {"anyOf": tasks}}, "multipart/form-data": {"schema": ref("Form")}},
        },
        "responses": responses(
            {
                JSON: {"schema": {"oneOf": [ref(name) for name in results]}},
                "text/event-stream": {},
                **dict.fromkeys((*media, "application/octet-stream"), _BINARY),
            },
            *_TASK_ERRORS,
        ),
    }


def _path_parameter(name: str, example: str) -> Schema:
    return parameter(name, "path", {"type": "string"}, required=True, example=example)


def _media_operation() -> Schema:
    file = {"*/*": _BINARY}
    failures = ("not_found", "deadline_exceeded", "provider_unavailable")
    described = operation(
        "getMedia",
        "An image or audio file, by its signed link.",
        responses(file, *COMMON_ERRORS, *failures)
        | {
            "206": {"description": "The part that Range asked for.", "content": file},
            "304": {"description": "The caller has the file: If-None-Match has its ETag."},
            "416": {
                "description": "No byte of the file is in Range.",
                "content": {JSON: {"schema": ref("Error")}},
            },
        },
        _path_parameter("media_id", "media_01.png"),
        parameter("exp", "query", {"type": "string"}),
        parameter("sig", "query", {"type": "string"}),
    )
    described["get"]["security"] = [{}, {"key": []}]
    return described


def _paths() -> Schema:
    refusals = ("unsupported_model", "model_not_allowed", "not_found")
    one_model = responses({JSON: {"schema": ref("Model")}}, *COMMON_ERRORS, *refusals)
    return {
        "/api/v1/task": {"post": _task_operation()},
        "/api/v1/models": operation(
            "listModels",
            "The models that the key may use.",
            responses({JSON: {"schema": ref("ModelList")}}, *COMMON_ERRORS),
        ),
        "/api/v1/models/{name}": operation(
            "getModel", "One model.", one_model, _path_parameter("name", "gpt-4")
        ),
        **account.paths(),
        "/media/{media_id}": _media_operation(),
    }


def document(public_url: str) -> Schema:
    """Returns the OpenAPI description; `public_url` is the URL of its server, empty if unknown."""
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
