"""The JavaScript clients of OpenAI's API run text tasks: OpenAI's own SDK, and the AI SDK of Vercel."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from tests import node_client
from tests.app import Account, RunningApp, app_fixture
from tests.sdk.sdk import SANDBOX

FOLDER = Path(__file__).parent / "js"

OPENAI = ("chat", "tools", "json", "responses", "errors", "models")
AI_SDK = ("chat", "tools", "json", "image", "errors")

app = app_fixture()


@pytest.fixture(name="account", scope="module")
async def _account(app: RunningApp) -> Account:
    return await app.account()


@pytest.fixture(name="modules", scope="module")
def _modules(request: pytest.FixtureRequest) -> Path:
    return node_client.install(Path(request.config.cache.mkdir("node")), FOLDER)


async def run(
    modules: Path, script: str, app: RunningApp, protocol: str, key: str, parts: Collection[str]
) -> Any:
    """Runs parts of a script with a key; returns what it prints."""
    argument = {
        "baseURL": f"{app.urls[protocol]}/v1",
        "key": key,
        "badKey": "pml_test_x",
        "parts": list(parts),
    }
    return await node_client.run(modules, str(FOLDER / script), argument)


@pytest.mark.parametrize("protocol", ["rest", "remote"])
async def test_a_played_vendor_answers_both(
    app: RunningApp, account: Account, modules: Path, protocol: str
) -> None:
    app.upstream.reset()
    got = await run(modules, "openai.cjs", app, protocol, account.live, ("chat", "responses"))
    again = await run(modules, "ai_sdk.cjs", app, protocol, account.live, ("chat", "image"))
    assert {
        *(got["chat"]["whole"], got["chat"]["text"], got["responses"]["whole"], got["responses"]["text"]),
        *(again["chat"]["whole"], again["chat"]["text"], again["image"]),
    } == {"Hello from the upstream."}
    assert got["chat"]["same"]
    assert again["chat"]["same"]


@SANDBOX
async def test_openais_sdk_gets_the_answers_that_its_users_expect(
    app: RunningApp, account: Account, modules: Path, protocol: str
) -> None:
    got = await run(modules, "openai.cjs", app, protocol, account.test, OPENAI)
    assert got["chat"]["same"]
    assert got["chat"]["whole"] == got["chat"]["text"] != ""
    assert (got["tools"]["name"], got["tools"]["arguments"]) == ("weather", ["city"])
    assert got["tools"]["same"]
    assert "Sunny" in got["tools"]["answer"]
    assert got["json"] == [["city", "sky"]] * 2
    responses = got["responses"]
    assert responses["whole"] == responses["text"] == responses["last"] != ""
    assert {"gpt-4", "claude-3-haiku"} <= set(got["models"])
    assert got["errors"] == {
        "key": ["AuthenticationError", 401, "invalid_api_key", None, True],
        "field": ["BadRequestError", 400, "invalid_parameter", "temperature", True],
        "model": ["NotFoundError", 404, "model_not_found", "model", True],
        "limit": ["RateLimitError", 429, "rate_limit_exceeded", None, True],
        "provider": ["InternalServerError", 502, "provider_failed", None, True],
        "stream": ["APIError", None, "provider_failed", None, True],
    }


@SANDBOX
async def test_the_ai_sdk_gets_the_answers_that_its_users_expect(
    app: RunningApp, account: Account, modules: Path, protocol: str
) -> None:
    got = await run(modules, "ai_sdk.cjs", app, protocol, account.test, AI_SDK)
    chat, tools = got["chat"], got["tools"]
    assert (chat["finish"], chat["same"]) == ("stop", True)
    assert chat["whole"] == chat["text"] != ""
    assert tools["called"] == ["string"] * 2
    assert "Sunny" in tools["whole"] == tools["text"]
    assert got["json"] == ["city", "sky"]
    assert got["image"]
    key, field, limit = (got["errors"][name] for name in ("key", "field", "limit"))
    assert key[:3] == [True, 401, False]
    assert field[:2] == [True, 400]
    assert "temperature" in field[3]
    assert limit[:3] == [True, 429, True]
