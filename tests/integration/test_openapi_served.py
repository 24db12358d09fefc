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
from tests.tasks import TASK_BODIES

CATALOGUE = """
[models.our-model]
type = "text"
limits = { max_input_tokens = 1000, max_output_tokens = 100 }
price = { million_input_tokens = "1", million_output_tokens = "1" }
price_version = "2026-11-26"
[[models.our-model.routes]]
provider = "openai"
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


def check(described: dict[str, Any], name: str, value: Any) -> None:
    """Checks that a value is valid for the schema."""
    components = {"schemas": described["components"]["schemas"]}
    validator = jsonschema_rs.validator_for(
        {"$ref": f"#/components/schemas/{name}", "components": components}
    )
    assert not [error.message for error in validator.iter_errors(value)]


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


async def test_the_description_follows_the_catalogue_and_is_the_same_each_time(folder: Path) -> None:
    catalogue = folder / "catalog.toml"
    catalogue.write_text("")
    settings = {"catalog": catalogue}
    async with run_app(folder, settings=settings) as running:
        before = await fetch(running, "rest")
        assert await fetch(running, "rest") == before
        assert b"our-model" not in before
        catalogue.write_text(CATALOGUE)
        await running.server.reload(lambda: running.server.settings)
        mapping = json.loads(await fetch(running, "rest"))["components"]["schemas"]["Task"]["discriminator"]
    assert mapping["mapping"]["our-model"] == "#/components/schemas/TextTask"


async def test_a_gateway_elsewhere_describes_the_models_of_its_own_catalogue(folder: Path) -> None:
    (folder / "catalog.toml").write_text(CATALOGUE)
    async with run_app(folder, gateway_settings={"catalog": folder / "catalog.toml"}) as running:
        assert b"our-model" not in await fetch(running, "rest")
        assert b"our-model" in await fetch(running, "remote")


async def fetch(running: RunningApp, front_end: str) -> bytes:
    """Returns the description that a front end sends."""
    async with running.session.get(f"{running.urls[front_end]}/openapi.json") as response:
        return await response.read()
