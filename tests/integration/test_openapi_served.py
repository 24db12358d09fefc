"""The OpenAPI description that a running server sends: its models, its examples, and the streams it describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema_rs
import pytest

from gateway.types import TASK_FORMATS
from tests.app import RunningApp, run_app
from tests.conftest import Keys
from tests.tasks import PIXEL, TASK_BODIES

CATALOGUE = """
[models.our-model]
type = "text"
limits = { max_input_tokens = 1000, max_output_tokens = 100 }
price = { million_input_tokens = "1", million_output_tokens = "1" }
price_version = "2026-11-26"
[[models.our-model.routes]]
provider = "openai"
model = "ours"
[models.our-voice]
type = "text_to_speech"
limits = { max_characters = 40_000 }
price = { thousand_characters = "1" }
price_version = "2026-11-26"
[[models.our-voice.routes]]
provider = "elevenlabs"
model = "ours"
"""
EXAMPLES = [body for each in TASK_FORMATS.values() for body in each.examples.values()]
SHORT_AUDIO = EXAMPLES[-1]["audio"]


@pytest.fixture(scope="module")
async def described(http: aiohttp.ClientSession, rest_url: str) -> dict[str, Any]:
    """The description."""
    async with http.get(f"{rest_url}/openapi.json") as response:
        assert response.content_type == "application/json"
        found: dict[str, Any] = await response.json()
        return found


def validator(described: dict[str, Any], name: str) -> jsonschema_rs.Validator:
    components = {"schemas": described["components"]["schemas"]}
    return jsonschema_rs.validator_for({"$ref": f"#/components/schemas/{name}", "components": components})


def check(described: dict[str, Any], name: str, value: Any) -> None:
    """Checks that a value is valid for the schema."""
    assert not [error.message for error in validator(described, name).iter_errors(value)]


def is_valid(described: dict[str, Any], name: str, value: Any) -> bool:
    return validator(described, name).is_valid(value)


async def post(
    http: aiohttp.ClientSession, url: str, key: str, body: Any, **headers: str
) -> tuple[int, str, str]:
    headers = {"Authorization": f"Bearer {key}", **headers}
    async with http.post(f"{url}/api/v1/task", json=body, headers=headers) as response:
        return response.status, response.content_type, await response.text()


def test_the_examples_of_requests_and_results_are_valid(described: dict[str, Any]) -> None:
    operation = described["paths"]["/api/v1/task"]["post"]
    requests = operation["requestBody"]["content"]["application/json"]["examples"]
    assert [each["value"] for each in requests.values()] == EXAMPLES
    for example in requests.values():
        check(described, "Task", example["value"])
    results = operation["responses"]["200"]["content"]["application/json"]["examples"]
    assert set(results) == {each.result_schema_name for each in TASK_FORMATS.values()}
    for name, example in results.items():
        check(described, name, example["value"])
        check(described, "TaskResult", example["value"])
    for code, example in described["components"]["examples"].items():
        check(described, "Error", example["value"])
        assert example["value"]["error"]["code"] == code


@pytest.mark.parametrize("body", EXAMPLES, ids=lambda body: body["model"])
async def test_every_example_of_a_request_runs(
    described: dict[str, Any], http: aiohttp.ClientSession, rest_url: str, keys: Keys, body: dict[str, Any]
) -> None:
    status, content_type, text = await post(http, rest_url, keys.test, body)
    assert status == 200, text
    if body.get("stream"):
        assert content_type == "text/event-stream"
    else:
        check(described, "TaskResult", json.loads(text))


@pytest.mark.parametrize("task_type", TASK_BODIES)
async def test_every_event_of_a_stream_is_described(
    described: dict[str, Any], http: aiohttp.ClientSession, rest_url: str, keys: Keys, task_type: str
) -> None:
    body = {**TASK_BODIES[task_type], "stream": True}
    if "audio" in body:
        body["audio"] = SHORT_AUDIO
    _, _, text = await post(http, rest_url, keys.test, body)
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert events
    for event in events:
        check(described, "TaskEvent", json.loads(event.removeprefix("data: ")))


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
async def test_the_roles_whose_messages_may_have_images_are_described(
    described: dict[str, Any], http: aiohttp.ClientSession, rest_url: str, keys: Keys, role: str
) -> None:
    image = {"type": "image_url", "image_url": {"url": PIXEL}}
    messages = [{"role": "user", "content": "Hi"}, {"role": role, "content": [image]}]
    body = {"model": "gpt-4", "messages": messages, "max_tokens": 5}
    status, _, text = await post(http, rest_url, keys.test, body)
    assert status == (200 if role == "user" else 400), text
    assert is_valid(described, "Task", body) is (status == 200)


def test_each_model_has_the_schema_of_its_type(described: dict[str, Any]) -> None:
    schemas = described["components"]["schemas"]
    mapping = schemas["Task"]["discriminator"]["mapping"]
    for name, reference in mapping.items():
        schema = schemas[reference.rpartition("/")[2]]
        assert name in schema["properties"]["model"]["enum"]
    assert mapping["gpt-4"] == "#/components/schemas/TextTask"
    assert mapping["gpt-5.6-sol"] == mapping["gpt-4"]  # the vendor's name for a model
    assert mapping["eleven-labs-sts"] == "#/components/schemas/SpeechToSpeechTask"
    assert schemas["Form"]["properties"]["model"]["enum"] == sorted(mapping)


@pytest.mark.parametrize("front_end", ["rest", "remote"])
async def test_the_models_of_the_operator_are_described_only_for_keys_that_may_use_them(
    folder: Path, front_end: str
) -> None:
    catalogue = folder / "catalog.toml"
    catalogue.write_text("")
    async with run_app(folder, settings={"catalog": catalogue}) as running:
        account = await running.account()
        before = await fetch(running, front_end, account.test)
        assert await fetch(running, front_end, account.test) == before
        assert b"our-model" not in before
        catalogue.write_text(CATALOGUE)
        await running.server.reload(lambda: running.server.settings)
        described = json.loads(await fetch(running, front_end, account.test))["components"]["schemas"]
        mapping = described["Task"]["discriminator"]["mapping"]
        assert mapping["our-model"] == "#/components/schemas/TextTask"
        assert described["TextToSpeechTask"]["properties"]["text"]["maxLength"] == 40_000
        assert described["SpeechRequest"]["properties"]["input"]["maxLength"] == 40_000
        assert described["ImageTask"]["properties"]["prompt"]["maxLength"] == 10_000
        assert "our-model" in described["ChatCompletionRequest"]["properties"]["model"]["enum"]
        without_key = await fetch(running, front_end)
        assert b"our-model" not in without_key
        assert b"gpt-5.6-sol" in without_key
        limited = await running.account(models=("gpt-4",))
        assert await fetch(running, front_end, limited.test) == without_key


async def test_a_bad_key_gets_no_description(http: aiohttp.ClientSession, rest_url: str) -> None:
    for authorization, status in (("Bearer pml_test_no", 401), ("Basic eDp5", 200)):
        headers = {"Authorization": authorization}
        async with http.get(f"{rest_url}/openapi.json", headers=headers) as response:
            assert response.status == status


async def fetch(running: RunningApp, front_end: str, key: str = "") -> bytes:
    """Returns the description that a front end sends to a caller with this key."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with running.session.get(f"{running.urls[front_end]}/openapi.json", headers=headers) as response:
        assert response.status == 200
        return await response.read()
