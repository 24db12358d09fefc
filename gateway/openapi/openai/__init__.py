"""The operations under /v1 in the OpenAPI description: the API of OpenAI's SDKs."""

from __future__ import annotations

from collections.abc import Mapping

from gateway.openapi.openai import media, text
from gateway.openapi.openai.operations import ERROR, responses
from gateway.openapi.schema import COMMON_ERRORS, JSON, Schema, Section, object_of, parameter, ref

_MODEL: Schema = {
    "id": {"type": "string"},
    "object": {"const": "model"},
    "created": {"type": "integer", "description": "0: it is not known."},
    "owned_by": {"type": "string"},
}
_MODELS: Schema = {"object": {"const": "list"}, "data": {"type": "array", "items": ref("OpenAIModel")}}


def section(models: Mapping[str, int]) -> Section:
    """Describes the operations; `models` are the models by name, with their task types."""
    return Section(
        "OpenAI",
        "The same tasks and models for clients of OpenAI's API, which take the URL of the server with /v1.",
        {**text.paths(), **media.paths(), **_model_paths()},
        {
            **text.schemas(models),
            **media.schemas(models),
            "OpenAIModel": object_of(_MODEL, _MODEL),
            "OpenAIModelList": object_of(_MODELS, _MODELS),
            "OpenAIError": ERROR,
        },
    )


def _model_paths() -> Schema:
    listed = responses({JSON: {"schema": ref("OpenAIModelList")}}, *COMMON_ERRORS)
    codes = (*COMMON_ERRORS, "model_not_allowed", "model_not_found", "not_found")
    model_id = parameter(
        "id", "path", {"type": "string"}, required=True, examples={"model": {"value": "gpt-4"}}
    )
    return {
        "/v1/models": {
            "get": {
                "operationId": "listOpenAIModels",
                "summary": "List the models that the key may use, as OpenAI's SDKs read them.",
                "responses": listed,
            }
        },
        "/v1/models/{id}": {
            "get": {
                "operationId": "getOpenAIModel",
                "summary": "Get one model, as OpenAI's SDKs read it.",
                "parameters": [model_id],
                "responses": responses({JSON: {"schema": ref("OpenAIModel")}}, *codes),
            }
        },
    }
