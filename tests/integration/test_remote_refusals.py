"""Calls with an invalid key or header: the services over a channel refuse them as the local ones do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pomelo.app import App
from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.gen.v1.account_service_pb2 import ListUsageRequest, SumUsageRequest
from pomelo.gen.v1.model_service_pb2 import Model
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.service import Services, list_all_models
from tests.calls import call_of, error_parts, refusal
from tests.conftest import Keys
from tests.integration.scripted_services import KEY, ScriptedServices
from tests.integration.test_remote import events_of
from tests.integration.test_remote_services import ends
from tests.tasks import text_task


@pytest.mark.parametrize("key", [None, "junk", "schlüssel", "\udcff\udcfe", "x" * 7000, "tab\there"])
async def test_no_invalid_key_breaks_the_channel(
    key: str | None, remote: Services, app: App, keys: Keys
) -> None:
    await _assert_one_error(app.services, remote, api_key=key)


async def test_a_repeated_key_is_reported_as_such(remote: Services, app: App) -> None:
    error = "Authorization was given twice."
    assert error in await _assert_one_error(app.services, remote, key_error=error)


async def _assert_one_error(*all_services: Services, **values: Any) -> str:
    """Asserts that calls with these values have the same error of their key. Returns its message."""
    errors = []
    for services in all_services:
        call = replace(call_of(None), **values)
        errors.append(error_parts(await refusal(services.tasks.run_task(text_task(), TaskOptions(), call))))
        errors.append(error_parts(await refusal(events_of(services, text_task(), call))))
    assert len(set(errors)) == 1
    assert errors[0][0] == "invalid_api_key"
    return str(errors[0][1])


@pytest.mark.parametrize(
    "header", [{"x_request_timeout": "soon"}, {"idempotency_key": "x" * 256}, {"idempotency_key": "\udcff"}]
)
async def test_an_invalid_header_is_reported_after_an_invalid_key_and_before_the_task(
    remote: Services, app: App, keys: Keys, header: dict[str, Any]
) -> None:
    for services in (app.services, remote):
        for key, code in [(keys.test, "invalid_parameter"), (keys.revoked, "invalid_api_key")]:
            for ask in _every_way(services):
                call = call_of(key, **header)
                assert call.header_error is not None
                assert (await refusal(ask(call))).code == code
                assert ("X-Pomelo-Mode" in call.response_headers) == (key == keys.test)


def _every_way(services: Services) -> list[Callable[[Call], Any]]:
    bad = text_task(model="nope")
    return [
        lambda call: services.tasks.run_task(bad, TaskOptions(), call),
        lambda call: events_of(services, bad, call),
        lambda call: list_all_models(services.models, call),
        lambda call: services.models.get_model("nope", call),
        lambda call: services.accounts.get_account(call),
        lambda call: services.accounts.list_usage(ListUsageRequest(page_size=-1), call),
        lambda call: services.accounts.sum_usage(SumUsageRequest(page_size=-1), call),
    ]


async def test_a_wrong_header_takes_precedence_over_a_model_that_the_key_may_not_use() -> None:
    class Forbidding(ScriptedServices):
        async def get_model(self, model_id: str, call: Call) -> Model:
            raise PomeloError("model_not_allowed")

    async with ends(Forbidding()) as opened:
        call = call_of(KEY, idempotency_key="two words")
        assert await refusal(opened.services.models.get_model("m", call)) is call.header_error


async def test_an_invalid_key_is_not_reported_to_the_server_again() -> None:
    async with ends(ScriptedServices()) as opened:
        visit = await opened.services.access.admit(call_of(KEY))
        before = len(opened.scripted.calls)
        error = PomeloError("invalid_api_key")
        assert await visit.refuse(error) is error
        assert len(opened.scripted.calls) == before
