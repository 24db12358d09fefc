"""The operations under /v1 in the OpenAPI description: the API of OpenAI's SDKs."""

from __future__ import annotations

from gateway.openapi.openai import media, text
from gateway.openapi.openai.operations import ERROR
from gateway.openapi.schema import (
    COMMON_ERRORS,
    JSON,
    MODEL_HEADERS,
    TEXT,
    Models,
    Schema,
    Section,
    object_of,
    operation,
    parameter,
    ref,
    responses,
)

_MODEL: Schema = {
    "id": TEXT,
    "object": {"const": "model"},
    "created": {"type": "integer", "description": "0: it is not known."},
    "owned_by": TEXT,
}
_MODELS: Schema = {"object": {"const": "list"}, "data": {"type": "array", "items": ref("OpenAIModel")}}


def section(models: Models) -> Section:
    """Describes the operations; `models` are the models by name."""
    return Section(
        "OpenAI",
        "The same tasks and models for clients of OpenAI's API, which take the URL of the server with /v1.",
        {**text.paths(), **media.paths(), **_model_paths()},
        {
            **text.schemas(models),
            **media.schemas(models),
            "OpenAIModel": object_of(_MODEL),
            "OpenAIModelList": object_of(_MODELS),
            "OpenAIError": ERROR,
        },
    )


def _model_paths() -> Schema:
    of_list = (*COMMON_ERRORS, "model_not_allowed")
    of_one = (*of_list, "model_not_found", "not_found")
    return {
        "/v1/models": operation(
            "listOpenAIModels",
            "List the models that the key may use, as OpenAI's SDKs read them.",
            responses({JSON: {"schema": ref("OpenAIModelList")}}, *of_list, openai=True),
        ),
        "/v1/models/{id}": operation(
            "getOpenAIModel",
            "Get one model, as OpenAI's SDKs read it.",
            responses({JSON: {"schema": ref("OpenAIModel")}}, *of_one, more=MODEL_HEADERS, openai=True),
            parameter("id", "path", TEXT, required=True, examples={"model": {"value": "gpt-4"}}),
        ),
    }
