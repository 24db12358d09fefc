"""Routes, retries and breakers, with real providers before servers that misbehave."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest

from pomelo.catalog import Limits, Model, Route
from pomelo.errors import PomeloError
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.gen.v1.text_pb2 import Message, Role, TextInput
from pomelo.providers import Credentials
from pomelo.providers.base import Job
from pomelo.providers.http import Http
from pomelo.providers.openai import OpenAI
from pomelo.routing import RESTS_FOR, RETRIES, TRIPS_AT, WAIT_MOST, Router
from pomelo.testing import Answer, FaultUpstream, Stop, error_reply

BUSY = error_reply(503, "busy")
MODEL = Model(
    name="m",
    task_type=TaskType.TASK_TYPE_TEXT,
    routes=(Route("one", "a"), Route("two", "b")),
    limits=Limits(),
    prices={PriceUnit.PRICE_UNIT_MILLION_OUTPUT_TOKENS: 1},
    price_version="test",
)


@dataclass
class House:
    """Two providers, each before a server of its own, and a clock that sleeping moves."""

    one: FaultUpstream
    two: FaultUpstream
    providers: dict[str, Any]
    now: float = 1000.0
    slept: list[float] = field(default_factory=list)

    def router(self) -> Router:
        """A router that has seen nothing."""

        async def sleep(seconds: float) -> None:
            self.slept.append(seconds)
            self.now += seconds

        return Router(self.providers, clock=lambda: self.now, sleep=sleep, chance=lambda: 1.0)

    async def ask(self, router: Router, *, stream: bool = True, deadline: float = 2000.0) -> str:
        """The text of an answer."""
        given = TextInput(messages=[Message(role=Role.ROLE_USER, content="Hi")])
        candidates = router.candidates(MODEL, "text", live=True)
        job = Job("task_1", MODEL, candidates[0].route, given, stream, deadline)
        async with aclosing(router.events(job, candidates, lambda route: None)) as events:
            return "".join([event.text_delta.content async for event in events])

    async def fail(self, router: Router, **how: Any) -> PomeloError:
        """The error of an answer that there is none of."""
        with pytest.raises(PomeloError) as raised:
            await self.ask(router, **how)
        return raised.value

    def asked(self) -> tuple[int, int]:
        """How many requests each server got."""
        return len(self.one.requests), len(self.two.requests)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    """Two providers that answer."""
    async with FaultUpstream() as one, FaultUpstream() as two, Http() as http:
        one.default, two.default = Answer("from one"), Answer("from two")
        providers = {
            name: OpenAI(Credentials("sk-x", server.openai_base_url), http)
            for name, server in (("one", one), ("two", two))
        }
        yield House(one, two, providers)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_busy_route_is_asked_again_with_growing_waits(house: House, stream: bool) -> None:
    house.one.script(BUSY, BUSY)
    assert await house.ask(house.router(), stream=stream) == "from one"
    assert house.slept == [0.25, 0.5]
    assert house.asked() == (3, 0)


async def test_a_route_that_stays_busy_gives_way_to_the_next(house: House) -> None:
    house.one.default = BUSY
    assert await house.ask(house.router()) == "from two"
    assert house.asked() == (RETRIES + 1, 1)


async def test_a_connection_that_breaks_ahead_of_the_answer_is_made_again(house: House) -> None:
    house.one.script(Answer(before=(Stop.RESET,)))
    assert await house.ask(house.router()) == "from one"


async def test_nothing_is_asked_twice_once_a_byte_was_delivered(house: House) -> None:
    house.one.script(Answer("one two three", at={2: Stop.CLOSE}))
    assert (await house.fail(house.router())).code == "provider_failed"
    assert house.asked() == (1, 0)


@pytest.mark.parametrize(
    "reply",
    [error_reply(400, code="context_length_exceeded"), error_reply(400, code="content_policy_violation")],
    ids=["too long", "policy"],
)
async def test_what_is_the_callers_fault_is_told_at_once(house: House, reply: Any) -> None:
    house.one.script(reply)
    await house.fail(house.router())
    assert house.asked() == (1, 0)
    assert house.slept == []


@pytest.mark.parametrize(
    "reply",
    [error_reply(401, code="invalid_api_key"), error_reply(429, code="credit_balance_exhausted"), error_reply(404, code="model_not_found")],
    ids=["key", "money", "model"],
)  # fmt: skip
async def test_what_is_our_own_fault_with_one_vendor_is_tried_at_the_next_without_a_wait(
    house: House, reply: Any
) -> None:
    house.one.script(reply)
    assert await house.ask(house.router()) == "from two"
    assert house.slept == []


async def test_a_vendors_wait_is_kept_and_a_long_one_goes_elsewhere(house: House) -> None:
    house.one.script(error_reply(429, code="slow_down", headers={"Retry-After": "3"}))
    assert await house.ask(house.router()) == "from one"
    assert house.slept == [3]
    house.one.script(error_reply(429, code="slow_down", headers={"Retry-After": str(int(WAIT_MOST) + 1)}))
    assert await house.ask(house.router()) == "from two"
    assert house.slept == [3]


async def test_the_last_failure_is_told_with_the_vendors_wait(house: House) -> None:
    house.one.default = BUSY
    house.two.default = error_reply(429, code="slow_down", headers={"Retry-After": "40"})
    error = await house.fail(house.router())
    assert (error.code, error.retry_after) == ("provider_unavailable", 40)


async def test_no_wait_goes_beyond_the_deadline(house: House) -> None:
    house.one.default = house.two.default = BUSY
    assert (await house.fail(house.router(), deadline=house.now + 0.3)).code == "provider_unavailable"
    assert house.slept == [0.25]


async def test_a_route_in_trouble_is_left_alone_and_then_probed_by_one_task(house: House) -> None:
    router = house.router()
    house.one.default = BUSY
    while house.asked()[0] < TRIPS_AT:
        assert await house.ask(router) == "from two"
    tried = house.asked()[0]
    assert await house.ask(router) == "from two"
    assert house.asked()[0] == tried, "an open breaker lets nothing through"

    house.now += RESTS_FOR
    assert await house.ask(router) == "from two"
    assert house.asked()[0] == tried + 1, "one probe, and no retry of it"

    house.now += RESTS_FOR
    house.one.default = Answer("well again")
    assert await house.ask(router) == "well again"
    assert await house.ask(router) == "well again"


async def test_while_the_probe_runs_others_go_elsewhere(house: House) -> None:
    router = house.router()
    house.one.default = BUSY
    while house.asked()[0] < TRIPS_AT:
        await house.ask(router)
    house.now += RESTS_FOR
    house.one.default = Answer("well again")
    both = await asyncio.gather(house.ask(router), house.ask(router))
    assert sorted(both) == ["from two", "well again"]


async def test_when_all_routes_rest_nobody_is_asked_and_the_wait_is_told(house: House) -> None:
    router = house.router()
    house.one.default = house.two.default = BUSY
    for _ in range(TRIPS_AT):
        await house.fail(router)
    asked = house.asked()
    error = await house.fail(router)
    assert error.code == "provider_unavailable"
    assert 1 <= (error.retry_after or 0) <= RESTS_FOR
    assert house.asked() == asked


async def test_a_route_without_credentials_is_skipped(house: House) -> None:
    async with Http() as http:
        house.providers["one"] = OpenAI(Credentials(None, house.one.openai_base_url), http)
        assert await house.ask(house.router()) == "from two"
        house.providers["two"] = house.providers["one"]
        assert (await house.fail(house.router())).code == "provider_not_configured"
