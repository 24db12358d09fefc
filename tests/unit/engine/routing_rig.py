"""A router of two providers, with real servers that fail on request."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest

from pomelo.catalog.catalog import Limits, Model, Route
from pomelo.catalog.pricing import Prices
from pomelo.engine.circuit_breaker import MINIMUM_CALLS
from pomelo.engine.routing import Candidate, Router
from pomelo.engine.upstream_calls import UpstreamCalls
from pomelo.errors import PomeloError
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.gen.v1.text_pb2 import ContentPart, Message, Role, TextDelta, TextInput
from pomelo.providers import Credentials
from pomelo.providers.base import CALLER, Event, Job
from pomelo.providers.chat.openai import OpenAI
from pomelo.providers.chunks import event_text
from pomelo.providers.http.client import Http
from pomelo.testing import Answer, FaultUpstream, error_reply

BUSY = error_reply(503, "busy")
MODEL = Model(
    name="m",
    task_type=TaskType.TASK_TYPE_TEXT,
    routes=(Route("one", "a"), Route("two", "b")),
    limits=Limits(),
    prices=Prices({PriceUnit.PRICE_UNIT_MILLION_OUTPUT_TOKENS: 1}),
    price_version="test",
)


@dataclass
class Rig:
    """Two providers, each with its own server, and a clock that sleeping advances."""

    one: FaultUpstream
    two: FaultUpstream
    providers: dict[str, Any]
    now: float = 1000.0
    slept: list[float] = field(default_factory=list)

    def router(self) -> Router:
        """A new router."""
        return Router(self.providers, clock=lambda: self.now, sleep=self.no_sleep, jitter=lambda: 1.0)

    async def no_sleep(self, seconds: float) -> None:
        """Advances the clock."""
        self.slept.append(seconds)
        self.now += seconds

    async def ask(
        self,
        router: Router,
        account: str = "",
        *,
        stream: bool = True,
        deadline: float = 2000.0,
        prompt: str = "Hi",
        model: Model = MODEL,
    ) -> str:
        """Runs a task; returns its text."""
        text_input = TextInput(messages=[Message(role=Role.ROLE_USER, content=[ContentPart(text=prompt)])])
        candidates = router.candidates(model, "text", live=True)
        job = Job("task_1", model, candidates[0].route, text_input, stream, deadline)
        async with aclosing(answer(router, job, candidates, account=account)) as events:
            return "".join([event_text(event) async for event in events])

    async def fail(self, router: Router, account: str = "", **options: Any) -> PomeloError:
        """Runs a task that fails; returns its error."""
        with pytest.raises(PomeloError) as raised:
            await self.ask(router, account, **options)
        return raised.value

    async def open_route(self, router: Router, *accounts: str) -> None:
        """Makes the first vendor busy, and runs tasks of the accounts until its circuit is open."""
        self.one.default = BUSY
        while self.request_counts()[0] < MINIMUM_CALLS:
            for account in accounts:
                assert await self.ask(router, account) == "from two"

    def request_counts(self) -> tuple[int, int]:
        """The number of requests to each server."""
        return len(self.one.requests), len(self.two.requests)


async def answer(
    router: Router, job: Job[Any], candidates: Sequence[Candidate], *arguments: Any, account: str = ""
) -> AsyncGenerator[Event, None]:
    """Yields the events of a task, or its whole answer as one event."""
    started = await router.start(job, candidates, UpstreamCalls(account), *arguments)
    if isinstance(started, Event):
        yield started
        return
    async with aclosing(started) as events:
        async for event in events:
            yield event


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """Two providers that answer."""
    async with FaultUpstream() as one, FaultUpstream() as two, Http() as http:
        one.default, two.default = Answer("from one"), Answer("from two")
        providers = {
            name: OpenAI(Credentials("sk-x", server.openai_base_url), http)
            for name, server in (("one", one), ("two", two))
        }
        yield Rig(one, two, providers)


class FailingProvider:
    """A provider that yields `words` and then raises `error`. `calls` is the number of calls;
    `callers` has the account of each word."""

    configured = True

    def __init__(self, error: Exception | None = None, *words: str) -> None:
        self._error = error or KeyError("a bug")
        self._words = words
        self.calls = 0
        self.callers: list[str] = []

    async def text(self, job: Job[TextInput]) -> AsyncIterator[Event]:
        """Yields the words, then raises the error."""
        self.calls += 1
        for word in self._words:
            self.callers.append(CALLER.get())
            yield Event(text_delta=TextDelta(text=word))
        raise self._error

    async def aclose(self) -> None:
        pass
