"""Helpers for the tests of the OpenAI provider: jobs, and functions that run them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from pomelo.catalog.catalog import Limits, Model, Route
from pomelo.catalog.pricing import Prices
from pomelo.errors import PomeloError
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.gen.v1.text_pb2 import Message, Role, TextDelta, TextInput
from pomelo.providers import Credentials
from pomelo.providers.base import Job, fit_hook, fit_job
from pomelo.providers.chat.openai import OpenAI
from pomelo.providers.http.client import Http, Timeouts

KEY = "sk-canary-2718"
PROMPT = "my canary prompt"
CLASSIC = Route("openai", "gpt-4.1")


def job(
    text_input: TextInput | None = None, *, stream: bool, route: Route = CLASSIC, max_output_tokens: int = 0
) -> Job[Any]:
    """A text job; with the shortest input by default. `max_output_tokens` is the model's limit of output tokens."""
    model = Model(
        name="gpt-4",
        task_type=TaskType.TASK_TYPE_TEXT,
        routes=(route,),
        limits=Limits(max_output_tokens=max_output_tokens),
        prices=Prices({PriceUnit.PRICE_UNIT_MILLION_OUTPUT_TOKENS: 1}),
        price_version="test",
    )
    if text_input is None:
        text_input = TextInput(messages=[Message(role=Role.ROLE_USER, content=PROMPT)])
    return Job("task_1", model, route, text_input, stream, deadline=1e12)


@asynccontextmanager
async def open_provider(base_url: str, *, key: str | None = KEY, **timeouts: float) -> AsyncIterator[Any]:
    """The provider, called at `base_url`."""
    async with Http(Timeouts(**timeouts)) as http:
        yield OpenAI(Credentials(key, base_url), http)


async def deltas(provider: Any, text_job: Job[Any]) -> list[TextDelta]:
    """All events of the provider."""
    async with aclosing(provider.text(fit_job(text_job, fit_hook(provider, "text")))) as events:
        return [event.text_delta async for event in events]


async def failure(provider: Any, text_job: Job[Any]) -> tuple[PomeloError, str]:
    """The error that the job ends with, and the text that came before it."""
    text = ""
    try:
        async with aclosing(provider.text(fit_job(text_job, fit_hook(provider, "text")))) as events:
            async for event in events:
                text += event.text_delta.content
                assert not event.text_delta.finish_reason, "a failed answer looked complete"
    except PomeloError as error:
        return error, text
    raise AssertionError(f"no failure; received {text!r}")
