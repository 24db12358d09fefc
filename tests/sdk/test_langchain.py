"""LangChain's ChatOpenAI runs text tasks: in the sandbox and with played vendors."""

from __future__ import annotations

from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from tests.app import Account, RunningApp, app_fixture
from tests.sdk.sdk import CALLERS, PNG, SANDBOX, WEATHER

pytestmark = pytest.mark.filterwarnings("ignore")  # it warns about pydantic

app = app_fixture()


class Forecast(BaseModel):
    """What a model is to answer."""

    city: str
    sky: Literal["clear", "cloudy"]


@pytest.fixture(name="account", scope="module")
async def _account(app: RunningApp) -> Account:
    return await app.account()


def langchain(app: RunningApp, account: Account, protocol: str, mode: str, **options: Any) -> ChatOpenAI:
    app.upstream.reset()
    key = account.live if mode == "live" else account.test
    return ChatOpenAI(
        model="gpt-4", base_url=f"{app.urls[protocol]}/v1", api_key=SecretStr(key), max_retries=0, **options
    )


@CALLERS
async def test_langchain_answers_whole_and_streamed(
    app: RunningApp, account: Account, protocol: str, mode: str
) -> None:
    for model in (
        langchain(app, account, protocol, mode, temperature=0.5),
        langchain(app, account, protocol, mode, use_responses_api=True),
    ):
        whole = await model.ainvoke([("system", "Be brief."), ("human", "Hello there")])
        chunks = [chunk async for chunk in model.astream([("system", "Be brief."), ("human", "Hello there")])]
        assert whole.text == "".join([chunk.text for chunk in chunks]) != ""
        assert whole.usage_metadata is not None
        assert whole.usage_metadata["total_tokens"] > 0


@SANDBOX
async def test_langchain_calls_tools_and_parses_json(
    app: RunningApp, account: Account, protocol: str
) -> None:
    model = langchain(app, account, protocol, "test")
    with_tools = model.bind_tools([{"type": "function", "function": WEATHER}])
    answer = await with_tools.ainvoke("How is the weather?")
    (call,) = answer.tool_calls
    assert (call["name"], set(call["args"])) == ("weather", {"city", "unit"})
    result = ToolMessage("Sunny", tool_call_id=call["id"])
    last = await with_tools.ainvoke([("human", "How is the weather?"), answer, result])
    assert "Sunny" in last.text
    forecast = await model.with_structured_output(Forecast).ainvoke("How is the weather?")
    assert isinstance(forecast, Forecast)


@SANDBOX
async def test_langchain_takes_images_and_raises_openais_errors(
    app: RunningApp, account: Account, protocol: str
) -> None:
    model = langchain(app, account, protocol, "test")
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
    content: Any = [{"type": "text", "text": "What is it?"}, image]
    assert (await model.ainvoke([("human", content)])).text
    with pytest.raises(openai.RateLimitError):
        await model.ainvoke("[[error:rate_limit_exceeded]]")
