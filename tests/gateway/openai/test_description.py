"""The OpenAPI description of the paths under /v1: the requests that they take, and what they answer."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest

from gateway.openapi.document import document
from pomelo.errors import TABLE
from tests.gateway.gateway_app import GatewayApp
from tests.gateway.openai.media_requests import post
from tests.gateway.openai.test_text_parameters import DEFAULTS
from tests.gateway.openai.test_transcriptions import STT, TWO_SPEAKERS, form, transcribe
from tests.gateway.requests import FORM, HI, events_of
from tests.gateway.scripts import play
from tests.gateway.test_openai_text import CALLS, CHAT_TOOLS, TOOLS

DOCUMENT = document("")
SCHEMAS = DOCUMENT["components"]["schemas"]
CHAT: dict[str, Any] = {**HI, "tools": CHAT_TOOLS}
RESPONSE: dict[str, Any] = {"model": "gpt-4", "input": "Hi", "tools": TOOLS}
IMAGE: dict[str, Any] = {"model": "flux-1-pro", "prompt": "a kite"}
SPEECH: dict[str, Any] = {"model": "eleven-labs-tts", "input": "Hi", "voice": "adam"}
REQUESTS = {
    "chat/completions": (CHAT, "ChatCompletionRequest"),
    "responses": (RESPONSE, "ResponseRequest"),
    "images/generations": (IMAGE, "ImageRequest"),
    "audio/speech": (SPEECH, "SpeechRequest"),
}
"""A request to each path, and the name of the schema."""

NAMES = {name for _, schema in REQUESTS.values() for name in SCHEMAS[schema]["properties"]}
ERRORS = [code for code in TABLE if code != "method_not_allowed"]


def faults(name: str, value: Any, *, strict: bool = True) -> list[str]:
    """Returns what is wrong with a value by a schema. With `strict`, every member has to be described."""
    schema: dict[str, Any] = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": SCHEMAS}}
    schema |= {"unevaluatedProperties": False} if strict else {}
    return [error.message for error in jsonschema_rs.validator_for(schema).iter_errors(value)]


@pytest.mark.parametrize("path", REQUESTS)
async def test_exactly_the_parameters_that_a_path_takes_are_described(gateway: GatewayApp, path: str) -> None:
    body, schema = REQUESTS[path]
    assert faults(schema, body) == []
    for name in NAMES | {"audio", "file", "functions"}:
        async with post(gateway, path, body | {name: {"x": [1]}}) as response:
            text = "" if response.status == 200 else await response.text()
        reasons = (
            f": {name}. Leave it out",
            f"not as {name}",
            f"{name}: must be left out: nothing is stored",
        )
        is_refused = any(reason in text for reason in reasons)
        assert is_refused is (name not in SCHEMAS[schema]["properties"]), text


@pytest.mark.parametrize(
    ("path", "name", "valid", "wrong"),
    [
        ("chat/completions", "temperature", (0, 2), (-0.1, 2.1)),
        ("chat/completions", "top_p", (0, 1), (-0.1, 1.1)),
        ("chat/completions", "max_completion_tokens", (1,), (0,)),
        ("chat/completions", "frequency_penalty", (-2, 2), (-2.1, 2.1)),
        ("responses", "temperature", (0, 2), (-0.1, 2.1)),
        ("responses", "top_p", (0, 1), (-0.1, 1.1)),
        ("responses", "max_output_tokens", (1,), (0,)),
        ("images/generations", "num_inference_steps", (1, 100), (0, 101)),
        ("images/generations", "guidance_scale", (0, 20), (-0.1, 20.1)),
        ("audio/speech", "speed", (0.25, 4), (0.24, 4.1)),
    ],
)
async def test_a_number_is_taken_if_its_description_says_so(
    gateway: GatewayApp, path: str, name: str, valid: tuple[float, ...], wrong: tuple[float, ...]
) -> None:
    body, schema = REQUESTS[path]
    for value in (*valid, *wrong):
        async with post(gateway, path, body | {name: value}) as response:
            await response.read()
        is_described = not faults(schema, body | {name: value})
        assert (response.status == 200) is is_described is (value in valid), value


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("chat/completions", "user"),
        ("chat/completions", "safety_identifier"),
        ("responses", "user"),
        ("responses", "safety_identifier"),
        ("images/generations", "user"),
        ("images/generations", "safety_identifier"),
    ],
)
async def test_an_end_user_is_taken_if_its_length_is_as_described(
    gateway: GatewayApp, path: str, name: str
) -> None:
    body, schema = REQUESTS[path]
    for length, status in ((256, 200), (257, 400)):
        named = body | {name: "é" * length}
        async with post(gateway, path, named) as response:
            assert response.status == status
        assert (not faults(schema, named)) is (status == 200)


async def test_exactly_the_parts_that_a_form_takes_are_described(gateway: GatewayApp) -> None:
    described = SCHEMAS["TranscriptionForm"]["properties"]
    for name in {*NAMES, *described} - {"model", "file"}:
        async with transcribe(gateway, (name, "?")) as response:
            text = await response.text()
        assert ("Unknown field" in text or f"not as {name}" in text) is (name not in described), text
    sending = post(gateway, "audio/transcriptions", data=form(STT), headers={"Content-Type": FORM})
    async with sending as response:
        assert faults("PlainTranscript", await response.json()) == []


def test_the_defaults_of_clients_are_valid_unless_they_are_null() -> None:
    for default in DEFAULTS:
        form, given = default.values
        assert isinstance(form, tuple)
        assert isinstance(given, dict)
        described = {name: value for name, value in given.items() if value is not None}
        assert faults(REQUESTS[form[0]][1], form[1] | described) == []


async def test_every_answer_of_a_text_is_described(gateway: GatewayApp) -> None:
    for script in (None, play(*CALLS)):
        for path, body, whole, event in (
            ("chat/completions", CHAT, "ChatCompletion", "ChatCompletionChunk"),
            ("responses", RESPONSE | {"user": "me"}, "TextResponse", "TextResponseEvent"),
        ):
            gateway.provider.script = script
            async with post(gateway, path, body) as response:
                assert faults(whole, await response.json()) == []
            streamed = body | {"stream": True}
            if path == "chat/completions":
                streamed["stream_options"] = {"include_usage": True}
            events = await events_of(post(gateway, path, streamed))
            assert len(events) > 3
            for _, data in events:
                assert data == "[DONE]" or faults(event, data) == []


async def test_every_answer_with_media_is_described(gateway: GatewayApp) -> None:
    async with post(gateway, "images/generations", IMAGE) as response:
        assert faults("Images", await response.json()) == []
    for path, body, event in (
        ("images/generations", IMAGE | {"stream": True}, "ImageEvent"),
        ("audio/speech", SPEECH | {"stream_format": "sse"}, "SpeechEvent"),
    ):
        *events, done = await events_of(post(gateway, path, body))
        assert done[1] == "[DONE]"
        assert [faults(event, data) for _, data in events] == [[]] * len(events)
        if path == "images/generations":  # above 16 MiB there is a link in place of the bytes
            del events[0][1]["b64_json"]
            assert faults(event, events[0][1] | {"url": "https://pomelo.example/media/m"}) == []
    *events, _ = await events_of(transcribe(gateway, ("stream", "true")))
    assert [faults("TranscriptEvent", data) for _, data in events] == [[], []]
    granularities = [("timestamp_granularities[]", name) for name in ("word", "segment")]
    for response_format, more, name in (
        ("verbose_json", granularities, "VerboseTranscript"),
        ("diarized_json", [], "DiarizedTranscript"),
    ):
        gateway.provider.script = TWO_SPEAKERS
        async with transcribe(gateway, ("response_format", response_format), *more) as response:
            value = await response.json()
        assert faults(name, value) == []
        assert faults("Transcript", value, strict=False) == []


async def test_models_and_errors_are_described(gateway: GatewayApp) -> None:
    for path, name in (("models", "OpenAIModelList"), ("models/gpt-4", "OpenAIModel")):
        async with gateway.get(f"/v1/{path}") as response:
            assert faults(name, await response.json()) == []
    async with gateway.get("/v1/models/gpt-99") as response:
        assert faults("OpenAIError", await response.json()) == []


def test_every_operation_names_its_errors_and_every_example_is_valid() -> None:
    described = set()
    for path, operations in DOCUMENT["paths"].items():
        if not path.startswith("/v1/"):
            continue
        ((_, operation),) = operations.items()
        for status, answer in operation["responses"].items():
            if status == "200":
                continue
            described |= set(answer["description"].split(", "))
            assert "X-Should-Retry" in answer["headers"]
            assert ("Retry-After" in answer["headers"]) is (status in ("409", "429", "503"))
            assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/OpenAIError")
        for content in operation.get("requestBody", {}).get("content", {}).values():
            for example in content.get("examples", {}).values():
                assert faults(content["schema"]["$ref"].rpartition("/")[2], example["value"]) == []
    assert described == set(ERRORS)
    assert len(json.dumps(DOCUMENT)) < 200_000
