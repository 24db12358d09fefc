"""The vendors' published types of JSON bodies."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, TypeAdapter
from pydantic_core import SchemaValidator, to_json
from typing_extensions import TypedDict

from tests.providers.client_names import client_names


def check_json(provider: str, model: str, body: Any, stream: bool) -> None:
    """Holds a body against what is published of it.

    Raises:
        AssertionError, TypeError, ValueError: it is not so.
    """
    body = client_names(provider, body)
    if provider == "anthropic":
        _check_sampling(body)
        # What may take long is asked for as a stream and put together.
        stream = stream or body["max_tokens"] > 21_000
    if provider == "replicate":
        assert body.keys() == {"input"}
        body = body["input"]
    _fields(provider, model, stream).validate_json(to_json(body), strict=True)


class _FluxPro(TypedDict):
    prompt: Annotated[str, Field(min_length=1)]
    width: Annotated[int, Field(ge=256, le=1440, multiple_of=32)]
    height: Annotated[int, Field(ge=256, le=1440, multiple_of=32)]
    seed: NotRequired[int]
    safety_tolerance: Annotated[int, Field(ge=0, le=6)]
    output_format: Literal["jpeg", "png", "webp"]


class _FluxDev(_FluxPro):
    steps: NotRequired[Annotated[int, Field(ge=1, le=50)]]
    guidance: NotRequired[Annotated[float, Field(ge=1.5, le=5)]]


class _Together(TypedDict):
    model: Literal["black-forest-labs/FLUX.1-schnell"]
    prompt: Annotated[str, Field(min_length=1)]
    width: int
    height: int
    steps: NotRequired[Annotated[int, Field(ge=1, le=4)]]
    seed: NotRequired[int]
    n: Literal[1]
    response_format: Literal["base64", "url"]
    output_format: Literal["jpeg", "png"]


class _Schnell(TypedDict):
    prompt: str
    aspect_ratio: Literal["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"]
    num_outputs: Annotated[int, Field(ge=1, le=4)]
    num_inference_steps: NotRequired[Annotated[int, Field(ge=1, le=4)]]
    seed: NotRequired[int]
    output_format: Literal["webp", "jpg", "png"]
    go_fast: NotRequired[bool]
    megapixels: Literal["1", "0.25"]


def _types(provider: str, model: str, stream: bool) -> Any:
    # The packages are imported where they are used, because that takes up to two seconds.
    if provider in ("openai", "openrouter"):
        from openai.types.chat import completion_create_params as openai_types

        params: Any = openai_types
        return params.CompletionCreateParamsStreaming if stream else params.CompletionCreateParamsNonStreaming
    if provider == "anthropic":
        from anthropic.types import message_create_params as anthropic_types

        params = anthropic_types
        return params.MessageCreateParamsStreaming if stream else params.MessageCreateParamsNonStreaming
    if provider == "mistral":
        from mistralai.client import models as mistral_types

        kind = "Stream" if stream else ""
        return getattr(mistral_types, f"ChatCompletion{kind}RequestTypedDict")
    return {
        "flux-pro-1.1": _FluxPro,
        "flux-dev": _FluxDev,
        "black-forest-labs/FLUX.1-schnell": _Together,
        "black-forest-labs/flux-schnell": _Schnell,
    }[model]


@cache
def _fields(provider: str, model: str, stream: bool) -> SchemaValidator:
    """The check of a body: each object has the published fields and no other."""
    adapter: TypeAdapter[Any] = TypeAdapter(_types(provider, model, stream))
    return SchemaValidator(_shut(adapter.core_schema))


def _shut(schema: Any) -> Any:
    """A schema in which no object takes a name that it does not declare.

    What a type calls an iterable is a list in JSON; only as a list are its items looked at. A class, which
    takes any name, is what comes in an answer; nothing that is sent may be taken for one.
    """
    if isinstance(schema, list | tuple):
        return type(schema)(_shut(item) for item in schema)
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") == "model":
        return {"type": "is-instance", "cls": schema["cls"], "ref": schema.get("ref")}
    shut = {key: _shut(value) for key, value in schema.items()}
    if shut.get("type") == "typed-dict":
        shut["extra_behavior"] = "forbid"
    if shut.get("type") == "generator":
        shut["type"] = "list"
    return shut


def _check_sampling(body: dict[str, Any]) -> None:
    """Takes out of a body what the version of the API that is asked for has, and that of the client's types
    has no longer."""
    sampling = {name: body.pop(name) for name in ("temperature", "top_p") if name in body}
    assert len(sampling) < 2, "the vendor takes one of them"
    assert all(type(value) is float and 0 <= value <= 1 for value in sampling.values())
