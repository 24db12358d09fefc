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
from typing import Any
from urllib.parse import parse_qsl

import elevenlabs

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
from tests.providers.published_bodies import check_json
from tests.providers.published_speech import check_speech
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
        "/replicate/v1/models/{model}/predictions", _BEARER | _JSON | {"prefer": "wait=5"}
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
        await check_speech(setup.elevenlabs, setup.upstream, case.kind, received)
        return
    check_json(case.route.provider, case.route.model, received.body, stream)


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
