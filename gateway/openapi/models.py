"""The operations on models in the OpenAPI description."""

from __future__ import annotations

from gateway.openapi.schema import (
    COMMON_ERRORS,
    JSON,
    MODEL_HEADERS,
    Models,
    Schema,
    Section,
    object_of,
    operation,
    parameter,
    ref,
    responses,
)
from gateway.types import TASK_FORMATS

_DATE_OR_NULL = {"type": ["string", "null"], "format": "date"}
_PRICE = object_of(
    {},
    additionalProperties={"type": "string", "pattern": r"^\d+(\.\d+)?$"},
    description="Credits for one unit.",
)


def section(models: Models) -> Section:
    return Section("Models", "What the key may use, with limits and prices.", _paths(), _schemas())


def _schemas() -> dict[str, Schema]:
    tier = {"from_input_tokens": {"type": "integer", "minimum": 0}, "price": _PRICE}
    required = {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "type": {"enum": [each.name for each in TASK_FORMATS.values()]},
        "limits": object_of({}, additionalProperties={"type": "integer"}),
        "price": _PRICE,
        "price_version": {"type": "string"},
        "available": {"type": "boolean"},
        "deprecated": {**_DATE_OR_NULL, "description": "When its end was announced; null: it was not."},
        "retires": {**_DATE_OR_NULL, "description": "Its last day in UTC; null: none is known."},
    }
    tiers = {
        "type": "array",
        "items": object_of(tier),
        "description": "The prices of a task from that many input tokens on.",
    }
    listed = {"object": {"const": "list"}, "data": {"type": "array", "items": ref("Model")}}
    return {
        "Model": object_of({**required, "price_tiers": tiers}, required),
        "ModelList": object_of(listed),
    }


_EXAMPLE = {
    "id": "gpt-4",
    "object": "model",
    "type": "text",
    "limits": {"max_input_tokens": 128000, "max_output_tokens": 16384},
    "price": {"million_input_tokens": "2", "million_output_tokens": "8"},
    "price_version": "2026-11-22",
    "available": True,
    "deprecated": None,
    "retires": None,
}


def _paths() -> Schema:
    one = {JSON: {"schema": ref("Model"), "examples": {"model": {"value": _EXAMPLE}}}}
    listed = {"object": "list", "data": [_EXAMPLE]}
    several = {JSON: {"schema": ref("ModelList"), "examples": {"models": {"value": listed}}}}
    return {
        "/api/v1/models": operation(
            "listModels",
            "List the models that the key may use.",
            responses(several, *COMMON_ERRORS, "model_not_allowed"),
        ),
        "/api/v1/models/{name}": operation(
            "getModel",
            "Get one model.",
            responses(
                one,
                *(*COMMON_ERRORS, "unsupported_model", "model_not_allowed", "not_found"),
                more=MODEL_HEADERS,
            ),
            parameter(
                "name", "path", {"type": "string"}, required=True, examples={"model": {"value": "gpt-4"}}
            ),
        ),
    }
