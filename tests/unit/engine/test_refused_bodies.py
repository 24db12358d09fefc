"""Requests whose body is refused: they count toward the minute's limit, and take nothing else."""

from __future__ import annotations

from pomelo.errors import PomeloError, invalid
from tests.calls import call_of
from tests.unit.engine.apps import EngineApp


async def test_a_body_that_can_not_be_read_counts_as_a_request_until_the_limit(engine: EngineApp) -> None:
    account = await engine.account("limited")
    for left in (4, 3, 2, 1, 0):
        call = call_of(account.key)
        visit = await engine.app.services.access.admit(call)
        assert (await visit.refuse(PomeloError("payload_too_large"))).code == "payload_too_large"
        visit.close()
        assert call.response_headers["X-RateLimit-Remaining"] == str(left)
        used = await engine.used(account)
        assert (used.requests, used.concurrency) == (5 - left, 0)
    call = call_of(account.key)
    visit = await engine.app.services.access.admit(call)
    error = await visit.refuse(PomeloError("payload_too_large"))
    visit.close()
    assert error.code == "rate_limit_exceeded"
    assert 0 < (error.retry_after or 0) <= 60
    assert call.response_headers["X-RateLimit-Remaining"] == "0"
    assert (await engine.used(account)).requests == 5
    assert (await engine.balance(account)).held == 0
    assert not await engine.records(account)


async def test_a_small_task_with_a_wrong_field_does_not_count(engine: EngineApp) -> None:
    account = await engine.account("limited")
    call = call_of(account.key)
    visit = await engine.app.services.access.admit(call)
    error = await visit.refuse_task(invalid("temperature", "a number from 0 to 2"))
    visit.close()
    assert (error.code, error.field) == ("invalid_parameter", "temperature")
    assert (await engine.used(account)).requests == 0
