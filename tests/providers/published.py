"""The vendors' published request types, and the check of a request against them.

The vendors' own client packages are made from their descriptions of their APIs: the types of their requests
say which fields there are and of what type, and a call that their own client makes says where each of them
goes. Where a vendor has no such package here, the fields are stated by hand; so are all paths and headers.
`test_published_types` calls `sent` and `check`.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, NotRequired, get_args, get_origin, get_type_hints
from urllib.parse import parse_qsl

import elevenlabs
from anthropic.types import message_create_params as anthropic_types
from mistralai.client import models as mistral_types
from openai.types.chat import completion_create_params as openai_types
from pydantic import Field, TypeAdapter
from pydantic_core import SchemaValidator, to_json
from typing_extensions import TypedDict

from pomelo.catalog.catalog import Catalog, Limits, Model, Route
from pomelo.catalog.pricing import Prices
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.providers import Credentials
from pomelo.providers.anthropic.anthropic import Anthropic
from pomelo.providers.base import AudioSource, Job
from pomelo.providers.bfl import BFL
from pomelo.providers.chat.compatible import Compatible, host
from pomelo.providers.chat.mistral import Mistral
from pomelo.providers.chat.openai import OpenAI
from pomelo.providers.elevenlabs.elevenlabs import ElevenLabs
from pomelo.providers.http.client import Http
from pomelo.providers.replicate import Replicate
from pomelo.providers.together import Together
from pomelo.tasks import TASK_TYPES
from pomelo.testing import FaultUpstream, Received
from tests.providers.client_names import client_names
from tests.providers.rig import KEY, read_all

REFUSALS = (AssertionError, TypeError, ValueError)
"""The errors of `check` for a request that differs from the published types."""


@dataclass(frozen=True)
class Case:
    """A model of the catalogue, or one like it, by one of its routes."""

    model: Model
    route: Route

    @property
    def kind(self) -> str:
        """The name of the model's task type."""
        return TASK_TYPES[self.model.task_type].name

    @property
    def name(self) -> str:
        """The test id."""
        return f"{self.model.name} by {self.route.provider}"


def _case(provider: str, name: str, kind: TaskType.ValueType, clamp: Any = None) -> Case:
    route = Route(provider, name, clamp=clamp or {})
    limits = Limits(max_input_tokens=1_000_000, max_characters=10_000)
    return Case(Model(name, kind, (route,), limits, Prices(), "test"), route)


CASES = (
    *(Case(model, route) for model in Catalog.load().models.values() for route in model.routes),
    # Models that drop less than those of the catalogue do.
    _case("openai", "gpt-4.1", TaskType.TASK_TYPE_TEXT),
    _case("mistral", "mistral-large-latest", TaskType.TASK_TYPE_TEXT, {"temperature": (0, 1.5, 0)}),
    _case("elevenlabs", "eleven_flash_v2_5", TaskType.TASK_TYPE_TEXT_TO_SPEECH, {"speed": (0.7, 1.2, 0)}),
)


@dataclass(frozen=True)
class Setup:
    """All providers and a vendor's own client, connected to one fake server."""

    upstream: FaultUpstream
    providers: Mapping[str, Any]
    elevenlabs: Any


@asynccontextmanager
async def open_providers() -> AsyncIterator[Setup]:
    """Opens every provider, connected to one fake server."""
    async with FaultUpstream(api_key=KEY) as upstream, Http(origins=(upstream.url,)) as http:

        def connect(provider_type: Callable[..., Any], base_url: str, **options: Any) -> Any:
            return provider_type(Credentials(KEY, base_url), http, **options)

        row = Catalog.load().hosts["openrouter"]
        profile = host("openrouter", {field: value for field, value in row.items() if field != "base_url"})
        providers = {
            "openai": connect(OpenAI, upstream.openai_base_url),
            "anthropic": connect(Anthropic, upstream.anthropic_base_url),
            "mistral": connect(Mistral, upstream.mistral_base_url),
            "openrouter": connect(Compatible, upstream.openai_base_url, profile=profile),
            "bfl": connect(BFL, upstream.bfl_base_url, interval=0.001),
            "together": connect(Together, upstream.together_base_url),
            "replicate": connect(Replicate, upstream.replicate_base_url, interval=0.001),
            "elevenlabs": connect(ElevenLabs, upstream.elevenlabs_base_url),
        }
        client = elevenlabs.AsyncElevenLabs(base_url=upstream.elevenlabs_base_url, api_key=KEY)
        yield Setup(upstream, providers, client)
        for provider in providers.values():
            await provider.aclose()


async def sent(
    setup: Setup, case: Case, given: Any, stream: bool, audio: AudioSource | None = None, user: str = ""
) -> Received | None:
    """Runs a job; returns its single request, or None if the model does not accept the order of the roles in
    the conversation. No other refusal, by Pomelo or by the fake vendor, is accepted."""
    setup.upstream.reset()
    job_audio = audio if TASK_TYPES[case.model.task_type].audio else None
    job = Job("task_1", case.model, case.route, given, stream, 1e12, job_audio, user=user)
    try:
        provider = setup.providers[case.route.provider]
        await read_all(provider, job)
    except PomeloError as error:
        refused = case.route.provider in ("anthropic", "mistral") and error.field == "messages"
        if not refused or error.code != "invalid_parameter":
            raise
    posts = [received for received in setup.upstream.requests if received.method == "POST"]
    assert len(posts) <= 1, "it was sent twice"
    return posts[0] if posts else None


# --- where requests go, and their headers


@dataclass(frozen=True)
class Call:
    """A vendor's endpoint: its path, as a pattern, as the played vendor has it, and what its headers are."""

    path: str
    headers: Mapping[str, str]


_JSON = {"content-type": "application/json"}
_BEARER = {"authorization": f"Bearer {KEY}"}
_XI = {"xi-api-key": KEY}
_VOICE = r"[A-Za-z0-9]{20}"
_CALLS: Mapping[tuple[str, str], Call] = {
    ("openai", "text"): Call("/v1/chat/completions", _BEARER | _JSON),
    ("anthropic", "text"): Call(
        "/v1/messages", {"x-api-key": KEY, "anthropic-version": "2023-06-01"} | _JSON
    ),
    ("mistral", "text"): Call("/mistral/v1/chat/completions", _BEARER | _JSON),
    ("openrouter", "text"): Call("/v1/chat/completions", _BEARER | _JSON),
    ("bfl", "image"): Call("/bfl/v1/{model}", {"x-key": KEY} | _JSON),
    ("together", "image"): Call("/together/v1/images/generations", _BEARER | _JSON),
    ("replicate", "image"): Call(
        "/replicate/v1/models/{model}/predictions", _BEARER | _JSON | {"prefer": "wait"}
    ),
    ("elevenlabs", "text_to_speech"): Call(f"/elevenlabs/v1/text-to-speech/{_VOICE}", _XI | _JSON),
    ("elevenlabs", "speech_to_speech"): Call(f"/elevenlabs/v1/speech-to-speech/{_VOICE}", _XI),
    ("elevenlabs", "speech_to_text"): Call("/elevenlabs/v1/speech-to-text", _XI),
}
_FORM = re.compile(r"multipart/form-data; boundary=\S+")
_TRANSPORT = {
    "host", "user-agent", "accept", "accept-encoding", "connection", "content-length", "transfer-encoding",
}  # fmt: skip


async def check(setup: Setup, case: Case, received: Received, stream: bool) -> None:
    """Holds a request against what is published of it.

    Raises:
        AssertionError, TypeError, ValueError: it is not so.
    """
    _check_call(case, received, stream)
    if case.route.provider == "elevenlabs":
        await _check_speech(setup, case, received)
        return
    body = client_names(case.route.provider, received.body)
    if case.route.provider == "anthropic":
        _check_sampling(body)
        # What may take long is asked for as a stream and put together.
        stream = stream or body["max_tokens"] > 21_000
    if case.route.provider == "replicate":
        assert body.keys() == {"input"}
        body = body["input"]
    _fields(case.route.provider, case.route.model, stream).validate_json(to_json(body), strict=True)


def _check_call(case: Case, received: Received, stream: bool) -> None:
    call = _CALLS[case.route.provider, case.kind]
    path, query = call.path.replace("{model}", re.escape(case.route.model)), {}
    if case.kind in ("text_to_speech", "speech_to_speech"):
        wanted = received.query["output_format"]
        query = {"output_format": wanted}
        path += "/stream" if stream and not wanted.startswith("wav_") else ""
    assert received.method == "POST"
    assert re.fullmatch(path, received.path)
    assert parse_qsl(received.target.partition("?")[2], keep_blank_values=True) == list(query.items())
    headers = {name.lower(): value for name, value in received.headers.items()}
    assert len(headers) == len(received.headers), "a header is there twice"
    ours = {name: value for name, value in headers.items() if name not in _TRANSPORT}
    if "content-type" not in call.headers:
        assert _FORM.fullmatch(ours.pop("content-type", ""))
    assert ours == call.headers


# --- bodies of JSON


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
    if provider in ("openai", "openrouter"):
        params: Any = openai_types
        return params.CompletionCreateParamsStreaming if stream else params.CompletionCreateParamsNonStreaming
    if provider == "anthropic":
        params = anthropic_types
        return params.MessageCreateParamsStreaming if stream else params.MessageCreateParamsNonStreaming
    if provider == "mistral":
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


# --- ElevenLabs: its own client makes the same request of the same parameters


async def _check_speech(setup: Setup, case: Case, received: Received) -> None:
    files = [part.name for part in received.form or () if part.filename is not None]
    assert files == {"speech_to_speech": ["audio"], "speech_to_text": ["file"]}.get(case.kind, [])
    expected = await _official_request(setup, case, received)
    # The client calls one of the two by its other name.
    assert expected.path.replace("voice-changer", "speech-to-speech") == received.path
    assert (expected.method, expected.query) == (received.method, received.query)
    assert expected.body == received.body
    if received.form is None:
        return
    ours, others = _parts(received), _parts(expected)
    # The client sends some of what it was not given as null.
    assert ours == {
        name: value for name, value in others.items() if name in ours or value != ("text", "null")
    }


async def _official_request(setup: Setup, case: Case, received: Received) -> Received:
    """Returns the request that the vendor's own client sends for the same parameters; the client accepts only
    declared ones."""
    api = getattr(setup.elevenlabs, case.kind)
    ask = api.stream if received.path.endswith("/stream") else api.convert
    types = get_type_hints(ask)
    for name in ("voice_id", "request_options", "return"):
        types.pop(name, None)
    values = {name: _typed(types[name], text) for name, text in received.query.items() if _known(name, types)}
    for name, value in (received.body or {}).items():
        assert _known(name, types)
        values[name] = _settings(value) if name == "voice_settings" else _strict(types[name], value)
    for part in received.form or ():
        assert _known(part.name, types)
        assert part.name not in values, "it is there twice"
        if part.filename is not None:
            assert part.size
            values[part.name] = (part.filename, part.head, part.content_type)
        else:
            values[part.name] = _typed(types[part.name], part.text or "")
            if part.name == "voice_settings":
                _settings(TypeAdapter(dict[str, Any]).validate_json(part.text or ""))
    if case.kind != "speech_to_text":
        values["voice_id"] = received.path.removesuffix("/stream").rpartition("/")[2]
    options: Any = {"max_retries": 0}
    asked = ask(**values, request_options=options)
    if case.kind == "speech_to_text":
        await asked
    else:
        async for _ in asked:
            pass
    return setup.upstream.requests[-1]


def _parts(received: Received) -> dict[str, tuple[str, Any]]:
    """The parts of a form: the file's name, type and beginning, and the others' texts."""
    return {
        part.name: ("text", part.text)
        if part.filename is None
        else ("file", (part.filename, part.content_type, part.head))
        for part in received.form or ()
    }


def _known(name: str, types: Mapping[str, Any]) -> bool:
    if name not in types:
        raise TypeError(f"nothing is called {name}")
    return True


def _typed(kind: Any, text: str) -> Any:
    """A text of a form or a query as the value that it stands for."""
    return _strict(kind, TypeAdapter(kind).validate_python(text))


def _strict(kind: Any, value: Any) -> Any:
    if words := _words(kind):
        assert value in words
        return value
    return TypeAdapter(kind).validate_python(value, strict=True)


def _words(kind: Any) -> tuple[Any, ...]:
    """The words that a type names; the client's types take any other, too, but only these are published."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(word for inner in get_args(kind) for word in _words(inner))


def _settings(given: dict[str, Any]) -> elevenlabs.VoiceSettings:
    for name in given:
        _known(name, elevenlabs.VoiceSettings.model_fields)
    return elevenlabs.VoiceSettings.model_validate(given, strict=True)
