"""The cost of a task whose provider fails before the request, before any output, or after some output."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pomelo.errors import PomeloError
from pomelo.gen.v1.text_pb2 import TextDelta, TextInput
from pomelo.providers.base import Event, Job
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.providers.http.connections import NoConnectionError
from tests.unit.engine.apps import STREAM, EngineApp, open_engine


class Failing:
    """A provider that yields `words` and then raises `error`."""

    configured = True

    def __init__(self) -> None:
        self.words: tuple[str, ...] = ()
        self.error: Exception = PomeloError("provider_failed")
        self.errors: list[Exception] = []
        """Those of the first calls, which yield nothing."""

    async def text(self, job: Job[TextInput]) -> AsyncIterator[Event]:
        if self.errors:
            raise self.errors.pop(0)
        for word in self.words:
            yield Event(text_delta=TextDelta(text=word))
        raise self.error

    async def aclose(self) -> None:
        pass


@pytest.fixture(name="provider")
def _provider() -> Failing:
    return Failing()


@pytest.fixture(name="engine")
async def _engine(tmp_path: Path, provider: Failing) -> AsyncIterator[EngineApp]:
    async with open_engine(tmp_path, {"openai": provider}) as opened:
        yield opened


TEXT: dict[str, Any] = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}


def no_connection(retry: RetryPolicy) -> PomeloError:
    """The failure of a call for which no connection became free."""
    return NoConnectionError("overloaded", "Too many calls", retry=retry)


@STREAM
async def test_the_request_of_a_task_that_was_never_sent_is_refunded(
    engine: EngineApp, provider: Failing, stream: bool
) -> None:
    provider.error = no_connection(RetryPolicy.NEXT_ROUTE)
    account = await engine.account("limited")
    answer = await engine.ask(account, TEXT, stream=stream)
    assert answer.code == "overloaded"
    assert answer.call.response_headers["X-RateLimit-Remaining"] == "5"
    assert "X-Credits-Charged" not in answer.call.response_headers
    used = await engine.used(account)
    assert (used.requests, used.concurrency, used.tokens) == (0, 0, 0)
    assert not await engine.failures(account)


@STREAM
async def test_a_failed_task_that_was_sent_counts_as_a_request(
    engine: EngineApp, provider: Failing, stream: bool
) -> None:
    account = await engine.account("limited")
    for error in (PomeloError("provider_failed"), TimeoutError(), KeyError("a bug")):
        provider.error = error
        assert (await engine.ask(account, TEXT, stream=stream)).code == "provider_failed"
    used = await engine.used(account)
    assert (used.requests, used.concurrency) == (3, 0)
    assert not await engine.records(account)
    assert [record.code for record in await engine.failures(account)] == ["provider_failed"] * 3


@STREAM
async def test_a_task_that_was_sent_once_counts_as_a_request_although_its_retry_was_not_sent(
    engine: EngineApp, provider: Failing, stream: bool
) -> None:
    busy = UpstreamError("provider_unavailable", retry=RetryPolicy.SAME_ROUTE, wait=0)
    provider.errors, provider.error = [busy], no_connection(RetryPolicy.NEXT_ROUTE)
    account = await engine.account("limited")
    answer = await engine.ask(account, TEXT, stream=stream)
    assert (answer.code, answer.call.response_headers["X-Credits-Charged"]) == ("overloaded", "0")
    assert answer.call.response_headers["X-RateLimit-Remaining"] == "4"
    (record,) = await engine.failures(account)
    assert (record.code, record.cost) == ("overloaded", 0)


async def test_a_task_that_may_have_been_sent_counts_as_a_request(
    engine: EngineApp, provider: Failing
) -> None:
    provider.error = no_connection(RetryPolicy.NEVER)
    account = await engine.account("limited")
    answer = await engine.ask(account, TEXT)
    assert (answer.code, answer.call.response_headers["X-Credits-Charged"]) == ("overloaded", "0")
    assert (await engine.used(account)).requests == 1


@pytest.mark.parametrize("error", [no_connection(RetryPolicy.SAME_ROUTE), PomeloError("provider_failed")])
async def test_output_delivered_before_a_failure_is_charged(
    engine: EngineApp, provider: Failing, error: PomeloError
) -> None:
    provider.words, provider.error = ("one", " two"), error
    account = await engine.account("limited")
    answer = await engine.ask(account, TEXT, stream=True)
    assert (answer.code, answer.text) == (error.code, "one two")
    (record,) = await engine.records(account)
    assert (record.complete, record.output_tokens) == (False, 2)
    assert (await engine.balance(account)).spent == record.cost > 0
    assert (await engine.used(account)).requests == 1
    charged = answer.call.response_trailers["X-Credits-Charged"]
    assert round(float(charged) * 10**6) == record.cost


async def test_output_that_was_not_delivered_is_not_charged(engine: EngineApp, provider: Failing) -> None:
    provider.words = ("one", " two")
    account = await engine.account("limited")
    answer = await engine.ask(account, TEXT)
    assert answer.code == "provider_failed"
    assert answer.call.response_headers["X-Credits-Charged"] == "0"
    assert not await engine.records(account)
    assert (await engine.balance(account)).spent == 0
