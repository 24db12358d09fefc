"""OpenAI's Python SDK runs text tasks: in the sandbox and with played vendors, through a gateway in the server's
process and one elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

import httpx2
import openai
import pytest

from pomelo.testing import error_reply
from tests.app import Account, RunningApp, app_fixture
from tests.sdk.sdk import CALLERS, CHAT, sdk

app = app_fixture()
Error = TypeVar("Error", bound=openai.APIStatusError)


async def text_of(stream: openai.AsyncStream[Any]) -> str:
    """Returns the text of a streamed chat completion that has its end."""
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {(chunk.id, chunk.created, chunk.model) for chunk in chunks} == {
        (chunks[0].id, chunks[0].created, chunks[0].model)
    }
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


# --- chat completions


@CALLERS
async def test_a_chat_completion_is_the_same_whole_and_streamed(
    app: RunningApp, account: Account, protocol: str, mode: str
) -> None:
    async with sdk(app, account, protocol, mode) as client:
        whole = await client.chat.completions.create(**CHAT, max_completion_tokens=50, seed=1)
        streamed = await text_of(
            await client.chat.completions.create(**CHAT, max_completion_tokens=50, seed=1, stream=True)
        )
    (choice,) = whole.choices
    assert (whole.object, whole.model) == ("chat.completion", "gpt-4")
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    assert choice.message.content == streamed != ""
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens > 0
    assert whole._request_id


@CALLERS
async def test_the_usage_of_a_stream_is_its_last_chunk_if_it_was_asked_for(
    app: RunningApp, account: Account, protocol: str, mode: str
) -> None:
    async with sdk(app, account, protocol, mode) as client:
        whole = await client.chat.completions.create(**CHAT)
        stream = await client.chat.completions.create(
            **CHAT, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = [chunk async for chunk in stream]
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
    assert (last.choices, last.usage) == ([], whole.usage)


async def test_the_blocking_client_does_the_same(app: RunningApp, account: Account) -> None:
    def ask() -> tuple[str, ...]:
        with openai.OpenAI(base_url=f"{app.urls['rest']}/v1", api_key=account.live, max_retries=0) as client:
            whole: Any = client.chat.completions.create(**CHAT)
            stream: Any = client.chat.completions.create(**CHAT, stream=True)
            streamed = "".join([chunk.choices[0].delta.content or "" for chunk in stream])
            response = client.responses.create(model="gpt-4", input="Hello there")
            assert {"gpt-4", "claude-3-haiku"} <= {model.id for model in client.models.list()}
            return whole.choices[0].message.content, streamed, response.output_text

    app.upstream.reset()
    whole, streamed, response = await asyncio.to_thread(ask)
    assert whole == streamed == response != ""


async def test_parameters_without_effect_are_taken_and_reported(app: RunningApp, account: Account) -> None:
    ignored: dict[str, Any] = {"store": True, "prompt_cache_key": "key"}
    unnoticed: dict[str, Any] = {
        "n": 1,
        "logprobs": False,
        "logit_bias": {},
        "modalities": ["text"],
        "service_tier": "auto",
        "verbosity": "medium",
    }
    async with sdk(app, account) as client:
        raw = client.chat.completions.with_raw_response
        answer = await raw.create(**CHAT, **ignored, **unnoticed, stop="x", safety_identifier="someone")
        assert answer.headers["X-Pomelo-Adjusted"] == "stop; store; prompt_cache_key"
        stream = await raw.create(**CHAT, **ignored, stream=True)
        assert stream.headers["X-Pomelo-Adjusted"] == "store; prompt_cache_key"
        assert await text_of(stream.parse())
        with pytest.raises(openai.BadRequestError) as caught:
            await raw.create(**CHAT, **ignored, extra_headers={"Prefer": "handling=strict"})
        assert caught.value.param == "store"
    assert {record.user for record in await app.records(account)} >= {"someone", ""}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"functions": []}, "functions"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"safety_identifier": "x" * 257}, "safety_identifier"),
        ({"user": "x" * 257}, "user"),
    ],
)
async def test_a_parameter_that_can_not_be_met_is_refused_by_its_name(
    app: RunningApp, account: Account, fields: dict[str, Any], param: str
) -> None:
    async with sdk(app, account) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(**{**CHAT, **fields})
    assert caught.value.param == param
    assert param in caught.value.message


# --- models


@CALLERS
async def test_models_are_listed_and_found_by_their_aliases(
    app: RunningApp, account: Account, protocol: str, mode: str
) -> None:
    async with sdk(app, account, protocol, mode) as client:
        names = [model.id async for model in client.models.list()]
        assert len(names) == 14
        assert (await client.models.retrieve("gpt-4")).owned_by == "pomelo"
        assert (await client.models.retrieve("claude-haiku-4-5")).id == "claude-3-haiku"
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("gpt-99")
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


# --- errors


async def raised(expected: type[Error], answer: Awaitable[Any]) -> Error:
    """Returns the error that an answer is, of exactly that class."""
    with pytest.raises(expected) as caught:
        await answer
    assert type(caught.value) is expected
    assert caught.value.request_id
    return caught.value


@pytest.mark.parametrize("protocol", ["rest", "remote"])
async def test_errors_that_the_matrix_does_not_provoke_have_their_exception_classes(
    app: RunningApp, protocol: str
) -> None:
    account = await app.account("five")
    async with sdk(app, account, protocol) as client:
        create = client.chat.completions.create
        error: openai.APIStatusError = await raised(
            openai.BadRequestError, create(**{**CHAT, "model": "gpt-99"})
        )
        assert (error.code, error.param) == ("unsupported_model", "model")
        key = {"Idempotency-Key": protocol}
        await create(**CHAT, extra_headers=key)
        error = await raised(
            openai.UnprocessableEntityError, create(**CHAT, temperature=1, extra_headers=key)
        )
        assert error.code == "idempotency_mismatch"

        async def use_up() -> None:
            for _ in range(6):
                await create(**CHAT)

        error = await raised(openai.RateLimitError, use_up())
        assert (error.code, error.type) == ("rate_limit_exceeded", "rate_limit_error")
        assert int(error.response.headers["Retry-After"]) > 0


# --- retries


async def test_an_error_that_a_retry_can_not_mend_is_not_retried(app: RunningApp, account: Account) -> None:
    statuses = []

    async def note(response: httpx2.Response) -> None:
        statuses.append(response.status_code)

    http = httpx2.AsyncClient(event_hooks={"response": [note]})
    async with sdk(app, account, http_client=http, max_retries=2) as client:
        app.upstream.script(error_reply(401, code="invalid_api_key"))
        await raised(openai.InternalServerError, client.chat.completions.create(**CHAT))
    assert statuses == [502]
