"""LiteLLM's SDK runs text tasks, in the sandbox and with played vendors, where it is installed: with 200 MB it is not among
the packages for development."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.app import Account, RunningApp, app_fixture
from tests.sdk.sdk import CALLERS, MESSAGES, SANDBOX, WEATHER

pytestmark = pytest.mark.filterwarnings("ignore")  # it warns about pydantic

app = app_fixture()


@pytest.fixture(name="account", scope="module")
async def _account(app: RunningApp) -> Account:
    return await app.account()


@pytest.fixture(name="litellm", scope="module")
def _litellm() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would fetch prices when it is imported
        yield pytest.importorskip("litellm")


def options_of(app: RunningApp, account: Account, protocol: str, mode: str) -> dict[str, Any]:
    app.upstream.reset()
    key = account.live if mode == "live" else account.test
    return {
        "model": "openai/gpt-4",
        "api_base": f"{app.urls[protocol]}/v1",
        "api_key": key,
        "num_retries": 0,
        "max_retries": 0,
    }


@CALLERS
async def test_litellm_answers_whole_and_streamed(
    app: RunningApp, account: Account, litellm: Any, protocol: str, mode: str
) -> None:
    options = options_of(app, account, protocol, mode)
    whole = await litellm.acompletion(messages=MESSAGES, **options)
    stream = await litellm.acompletion(
        messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **options
    )
    chunks = [chunk async for chunk in stream]
    text = "".join([chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices])
    assert text == whole.choices[0].message.content != ""
    assert whole.usage.total_tokens > 0


@SANDBOX
async def test_litellm_calls_tools_and_raises_its_own_errors(
    app: RunningApp, account: Account, litellm: Any, protocol: str
) -> None:
    options = options_of(app, account, protocol, "test")
    messages: list[Any] = [{"role": "user", "content": "How is the weather?"}]
    tools = [{"type": "function", "function": WEATHER}]
    answer = await litellm.acompletion(messages=messages, tools=tools, **options)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    messages += [answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "Sunny"}]
    last = await litellm.acompletion(messages=messages, tools=tools, **options)
    assert "Sunny" in last.choices[0].message.content
    for prompt, error in (
        ("[[error:rate_limit_exceeded]]", litellm.RateLimitError),
        ("[[error:provider_unavailable]]", litellm.ServiceUnavailableError),
    ):
        with pytest.raises(error):
            await litellm.acompletion(messages=[{"role": "user", "content": prompt}], **options)
    with pytest.raises(litellm.AuthenticationError):
        await litellm.acompletion(messages=messages, **{**options, "api_key": "pml_test_x"})
