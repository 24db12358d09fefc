"""Routes and retries, with real providers and servers that fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from datetime import date, timedelta
from typing import Any

import pytest

from pomelo.engine.routing import ATTEMPTS, WAIT_MAX, Router
from pomelo.errors import PomeloError
from pomelo.gen.v1.text_pb2 import ContentPart, Message, Role, TextDelta, TextInput
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers import Credentials
from pomelo.providers.base import CALLER, Event, Job
from pomelo.providers.chat.openai import OpenAI
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.providers.http.client import Http
from pomelo.providers.http.connections import NoConnectionError
from pomelo.testing import Answer, Stop, error_reply
from tests.unit.engine.routing_rig import BUSY, MODEL, FailingProvider, Rig, answer


@pytest.mark.parametrize("stream", [False, True])
async def test_a_busy_route_is_retried_with_growing_waits(rig: Rig, stream: bool) -> None:
    rig.one.script(BUSY, BUSY)
    assert await rig.ask(rig.router(), stream=stream) == "from one"
    assert rig.slept == [0.25, 0.5]
    assert rig.request_counts() == (3, 0)


async def test_a_route_that_stays_busy_gives_way_to_the_next(rig: Rig) -> None:
    rig.one.default = BUSY
    assert await rig.ask(rig.router()) == "from two"
    assert rig.request_counts() == (ATTEMPTS, 1)


async def test_each_route_is_asked_for_its_own_model_and_announced_once(rig: Rig) -> None:
    rig.one.default = BUSY
    router = rig.router()
    given = TextInput(messages=[Message(role=Role.ROLE_USER, content=[ContentPart(text="Hi")])])
    candidates = router.candidates(MODEL, "text", live=True)
    job = Job("task_1", MODEL, candidates[0].route, given, True, 2000.0)
    announced: list[Job[TextInput]] = []
    async with aclosing(answer(router, job, candidates, announced.append)) as events:
        assert "".join([event.text_delta.text async for event in events]) == "from two"
    assert [one.route for one in announced] == list(MODEL.routes)
    for server, model in ((rig.one, "a"), (rig.two, "b")):
        assert {request.body["model"] for request in server.requests} == {model}


@pytest.mark.parametrize(("jitter", "waits"), [(0.0, [0.125, 0.25]), (0.5, [0.1875, 0.375])])
async def test_waits_vary_between_half_and_all_of_their_length(
    rig: Rig, jitter: float, waits: list[float]
) -> None:
    rig.one.script(BUSY, BUSY)
    router = Router(rig.providers, clock=lambda: rig.now, sleep=rig.no_sleep, jitter=lambda: jitter)
    assert await rig.ask(router) == "from one"
    assert rig.slept == waits


@pytest.mark.parametrize(
    ("days", "answer"),
    [((1, 1), "from one"), ((0, 1), "from one"), ((-1, 1), "from two"), ((-1, None), "from two"), ((-1, -1), "from one")],
)  # fmt: skip
async def test_a_retired_route_is_used_only_if_no_other_route_is_available(
    rig: Rig, days: tuple[int | None, ...], answer: str
) -> None:
    today = date(2030, 1, 10)
    routes = tuple(
        replace(route, retires=None if day is None else today + timedelta(day))
        for route, day in zip(MODEL.routes, days, strict=True)
    )
    router = Router(rig.providers, clock=lambda: rig.now, sleep=rig.no_sleep, today=lambda: today)
    assert await rig.ask(router, model=replace(MODEL, routes=routes)) == answer


async def test_a_call_whose_connection_fails_before_the_response_is_retried(rig: Rig) -> None:
    rig.one.script(Answer(before=(Stop.RESET,)))
    assert await rig.ask(rig.router()) == "from one"


async def test_nothing_is_retried_after_the_first_byte(rig: Rig) -> None:
    rig.one.script(Answer("one two three", at={2: Stop.CLOSE}))
    assert (await rig.fail(rig.router())).code == "provider_failed"
    assert rig.request_counts() == (1, 0)


@pytest.mark.parametrize(
    "reply",
    [error_reply(400, code="context_length_exceeded"), error_reply(400, code="content_policy_violation")],
    ids=["too long", "policy"],
)
async def test_an_error_of_the_caller_is_returned_immediately(rig: Rig, reply: Any) -> None:
    rig.one.script(reply)
    await rig.fail(rig.router())
    assert rig.request_counts() == (1, 0)
    assert rig.slept == []


@pytest.mark.parametrize(
    "reply",
    [error_reply(401, code="invalid_api_key"), error_reply(429, code="credit_balance_exhausted"), error_reply(404, code="model_not_found")],
    ids=["key", "money", "model"],
)  # fmt: skip
async def test_an_error_of_our_account_is_retried_on_the_next_route_without_a_wait(
    rig: Rig, reply: Any
) -> None:
    rig.one.script(reply)
    assert await rig.ask(rig.router()) == "from two"
    assert rig.slept == []


async def test_a_vendors_wait_is_respected_and_a_long_one_leads_to_the_next_route(rig: Rig) -> None:
    rig.one.script(error_reply(429, code="slow_down", headers={"Retry-After": "3"}))
    assert await rig.ask(rig.router()) == "from one"
    assert rig.slept == [3]
    rig.one.script(error_reply(429, code="slow_down", headers={"Retry-After": str(int(WAIT_MAX) + 1)}))
    assert await rig.ask(rig.router()) == "from two"
    assert rig.slept == [3]
    rig.one.script(error_reply(429, code="slow_down", headers={"Retry-After": str(int(WAIT_MAX))}))
    assert await rig.ask(rig.router()) == "from one"
    assert rig.slept == [3, WAIT_MAX]


async def test_the_last_failure_is_returned_with_the_vendors_wait(rig: Rig) -> None:
    rig.one.default = BUSY
    rig.two.default = error_reply(429, code="slow_down", headers={"Retry-After": "40"})
    error = await rig.fail(rig.router())
    assert (error.code, error.retry_after) == ("provider_unavailable", 40)


async def test_a_failure_that_a_retry_may_resolve_is_returned_instead_of_a_permanent_one(rig: Rig) -> None:
    broken, busy = (
        error_reply(401, code="invalid_api_key"),
        error_reply(503, "busy", headers={"Retry-After": "6"}),
    )
    for rig.one.default, rig.two.default in ((busy, broken), (broken, busy)):
        error = await rig.fail(rig.router())
        assert (error.code, error.retry_after) == ("provider_unavailable", 6)
    rig.one.default = rig.two.default = broken
    error = await rig.fail(rig.router())
    assert (error.code, error.retry_after) == ("provider_failed", None)
    assert rig.request_counts() == (3, 3)


async def test_no_wait_exceeds_the_deadline(rig: Rig) -> None:
    rig.one.default = rig.two.default = BUSY
    assert (await rig.fail(rig.router(), deadline=rig.now + 0.3)).code == "provider_unavailable"
    assert rig.slept == [0.25]
    # A wait that ends at the deadline leaves no time for a call.
    assert (await rig.fail(rig.router(), deadline=rig.now + 0.25)).code == "provider_unavailable"
    assert rig.slept == [0.25]


class WaitingProvider:
    """A provider that yields a word and waits. It keeps its events, so nothing closes them but their caller."""

    configured = True
    closed = False
    events: AsyncIterator[Event]

    def text(self, job: Job[TextInput]) -> AsyncIterator[Event]:
        self.events = self._events()
        return self.events

    async def _events(self) -> AsyncIterator[Event]:
        try:
            yield Event(text_delta=TextDelta(text="Hello"))
            await asyncio.Event().wait()
        finally:
            self.closed = True

    async def aclose(self) -> None:
        pass


async def test_a_provider_is_closed_with_the_events_of_its_task(rig: Rig) -> None:
    provider = rig.providers["one"] = WaitingProvider()
    router = rig.router()
    candidates = router.candidates(MODEL, "text", live=True)
    job = Job("task_1", MODEL, candidates[0].route, TextInput(), True, 2000.0)
    async with aclosing(answer(router, job, candidates)) as events:
        await anext(events)
        assert not provider.closed
    assert provider.closed


@pytest.mark.parametrize("retry", [RetryPolicy.SAME_ROUTE, RetryPolicy.NEXT_ROUTE], ids=["same", "next"])
@pytest.mark.parametrize("code", ["provider_unavailable", "provider_failed", "overloaded"])
async def test_a_call_that_fails_after_its_first_event_is_never_retried(
    rig: Rig, code: str, retry: RetryPolicy
) -> None:
    error_class = NoConnectionError if code == "overloaded" else UpstreamError
    error = error_class(code, retry=retry)
    failing = rig.providers["one"] = FailingProvider(error, "Hello")
    assert (await rig.fail(rig.router())).code == code
    assert failing.calls == 1
    assert rig.request_counts() == (0, 0)
    assert not rig.slept


@pytest.mark.parametrize("retry", list(RetryPolicy), ids=["never", "next", "same"])
async def test_a_call_that_fails_before_its_first_event_is_retried_as_its_error_allows(
    rig: Rig, retry: RetryPolicy
) -> None:
    failing = rig.providers["one"] = FailingProvider(UpstreamError("provider_unavailable", retry=retry))
    if retry == RetryPolicy.NEVER:
        await rig.fail(rig.router())
    else:
        assert await rig.ask(rig.router()) == "from two"
    assert failing.calls == (ATTEMPTS if retry == RetryPolicy.SAME_ROUTE else 1)
    assert rig.request_counts() == (0, 0 if retry == RetryPolicy.NEVER else 1)


async def test_what_a_failed_attempt_reported_is_forgotten(rig: Rig) -> None:
    class Reporting(FailingProvider):
        """Reports a cost and a count with its first call alone."""

        async def text(self, job: Job[TextInput]) -> AsyncIterator[Event]:
            self.calls += 1
            if self.calls == 1:
                job.report.cost, job.report.usage = 1.5, Usage(input_tokens=7)
                raise UpstreamError("provider_unavailable", retry=RetryPolicy.SAME_ROUTE)
            yield Event(text_delta=TextDelta(text="Hello"))

    rig.providers["one"] = Reporting()
    router = rig.router()
    candidates = router.candidates(MODEL, "text", live=True)
    job = Job("task_1", MODEL, candidates[0].route, TextInput(), True, 2000.0)
    async with aclosing(answer(router, job, candidates)) as events:
        assert [event.text_delta.text async for event in events] == ["Hello"]
    assert job.report.cost is None
    assert job.report.usage is None


async def test_an_error_without_a_retry_policy_is_never_retried(rig: Rig) -> None:
    failing = rig.providers["one"] = FailingProvider(PomeloError("provider_unavailable"))
    assert (await rig.fail(rig.router())).code == "provider_unavailable"
    assert failing.calls == 1
    assert rig.request_counts() == (0, 0)


async def test_a_provider_sees_the_account_of_the_task_in_whichever_asyncio_task_its_events_are_read(
    rig: Rig,
) -> None:
    failing = rig.providers["one"] = FailingProvider(PomeloError("provider_failed"), "one ", "two ", "three")
    router = rig.router()
    candidates = router.candidates(MODEL, "text", live=True)
    job = Job("task_1", MODEL, candidates[0].route, TextInput(), True, 2000.0)
    async with aclosing(answer(router, job, candidates, account="acme")) as events:
        for _ in range(3):
            await asyncio.create_task(anext(events))
    assert failing.callers == ["acme"] * 3
    assert CALLER.get() == ""


async def test_a_route_without_credentials_is_skipped(rig: Rig) -> None:
    async with Http() as http:
        rig.providers["one"] = OpenAI(Credentials(None, rig.one.openai_base_url), http)
        assert await rig.ask(rig.router()) == "from two"
        rig.providers["two"] = rig.providers["one"]
        assert (await rig.fail(rig.router())).code == "provider_not_configured"
