"""What a gateway knows of a request's model and its account."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.app import make_gateway
from gateway.options import GatewayOptions
from gateway.state import TYPES_CACHED, Gateway, account_of
from pomelo.call import Call, Principal
from pomelo.errors import PomeloError
from pomelo.gen.v1.model_service_pb2 import Model
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.service import Services
from pomelo.telemetry.readiness import Readiness
from tests.calls import call_of
from tests.gateway.requests import KEY
from tests.unit.loop import iterations
from tests.unit.refusals import refused

CALL = call_of(KEY)


class Models:
    """Models of one task type. `asked` are those that were looked up."""

    def __init__(self) -> None:
        self.task_type = TaskType.TASK_TYPE_IMAGE
        self.asked: list[str] = []

    async def get_model(self, model_id: str, call: Call) -> Model:
        self.asked.append(model_id)
        return Model(id=model_id, task_type=self.task_type)


def gateway_of(models: Any) -> Gateway:
    return make_gateway(Services(models, models, models, models, models), GatewayOptions(), Readiness())


class AdjustableLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock is `ahead` of the real one, in seconds."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


async def test_a_model_is_looked_up_once_until_the_cache_is_full() -> None:
    models = Models()
    state = gateway_of(models)
    for name in ("m0", "first") * 2:
        assert await state.task_type(name, CALL) == TaskType.TASK_TYPE_IMAGE
    assert models.asked == ["m0", "first"]
    for number in range(1024):
        await state.task_type(f"m{number}", CALL)
    assert await state.task_type("first", CALL) == TaskType.TASK_TYPE_IMAGE
    assert models.asked.count("first") == 2


def test_a_model_whose_type_was_changed_by_a_reload_gets_its_new_type() -> None:
    async def test() -> None:
        models = Models()
        state = gateway_of(models)
        for task_type in (TaskType.TASK_TYPE_TEXT, TaskType.TASK_TYPE_IMAGE, TaskType.TASK_TYPE_TEXT):
            models.task_type = task_type
            assert await state.task_type("our-model", CALL) == task_type
            loop.ahead += TYPES_CACHED
            await iterations()

    loop = AdjustableLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(test())


def test_calls_are_counted_by_their_account_and_by_their_key_if_the_account_is_not_known() -> None:
    def counted(key: str, account: str = "") -> object:
        call = call_of(key)
        call.principal = Principal(account, key, live=False) if account else None
        return account_of(call)

    assert counted("one", "acme") == counted("two", "acme") != counted("one", "other")
    assert counted("one") == counted("one") != counted("two")


@pytest.mark.parametrize(
    ("known", "mode", "owners"), [(True, "", ["ann"]), (False, "test", [hash(KEY)]), (False, "", [])]
)
async def test_a_connection_is_trusted_also_if_its_account_has_too_many_calls(
    known: bool, mode: str, owners: list[object]
) -> None:
    trusted: list[object] = []
    call = call_of(KEY)

    async def admit(call: Call) -> None:
        if known:
            call.principal = Principal("ann", KEY, live=False)
        if mode:
            call.response_headers["X-Pomelo-Mode"] = mode
        raise PomeloError("concurrency_limit_exceeded")

    state = gateway_of(SimpleNamespace(admit=admit))
    request: Any = SimpleNamespace(connection=SimpleNamespace(trust=trusted.append))
    with refused("concurrency_limit_exceeded"):
        await state.admit(request, call)
    assert trusted == owners
