"""A failed call is freed with its request when it ends: no reference cycle keeps it until garbage is collected."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from pomelo.app import App
from pomelo.call import Call
from pomelo.engine.reservation import Reservation
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.service import Services, list_all_models
from tests.calls import call_of, refusal
from tests.conftest import Keys
from tests.integration.both_ends import both_ends
from tests.tasks import text_task
from tests.waiting import until


async def run_task(services: Services, spec: TaskSpec, call: Call) -> None:
    await services.tasks.run_task(spec, TaskOptions(), call)


async def stream_task(services: Services, spec: TaskSpec, call: Call) -> None:
    async with services.tasks.stream_task(spec, TaskOptions(), call) as events:
        async for _ in events:
            pass


async def upload(services: Services, spec: TaskSpec, call: Call) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"RIFF"

    await services.media.upload_media("audio/wav", chunks(), call)


async def list_models(services: Services, spec: TaskSpec, call: Call) -> None:
    await list_all_models(services.models, call)


Run = Callable[[Services, TaskSpec, Call], Coroutine[Any, Any, None]]


def in_memory() -> list[Any]:
    """The calls to a server and the tasks in memory, garbage included."""
    return [each for each in gc.get_objects() if issubclass(type(each), grpc.aio.Call | Reservation)]


@contextmanager
def uncollected() -> Iterator[Callable[[], bool]]:
    """Collects garbage before the body, and none in it. Yields a function that returns whether all calls and
    tasks of the body are freed."""
    gc.collect()
    earlier = in_memory()
    gc.disable()
    try:
        yield lambda: len(in_memory()) == len(earlier)
    finally:
        gc.enable()


async def code_of(failing: Coroutine[Any, Any, None]) -> str:
    """The code of the error of a call. A variable with the error would keep the call in memory."""
    return (await refusal(failing)).code


@pytest.mark.parametrize("run", [run_task, stream_task, upload, list_models])
async def test_a_call_that_the_server_refuses_is_freed_at_the_gateway(run: Run, app: App) -> None:
    async with both_ends(app.services) as (_, remote):
        with uncollected() as freed:
            assert await code_of(run(remote, text_task(), call_of("pml_test_wrong"))) == "invalid_api_key"
            await until(freed)


@pytest.mark.parametrize("trigger", ["[[error:provider_failed]]", "[[cut]]"])
@pytest.mark.parametrize("run", [run_task, stream_task])
async def test_a_task_that_fails_is_freed_at_both_ends(run: Run, trigger: str, app: App, keys: Keys) -> None:
    async with both_ends(app.services) as (_, remote):
        for services in (app.services, remote):
            with uncollected() as freed:
                failed = await code_of(run(services, text_task(trigger), call_of(keys.test)))
                assert failed == "provider_failed"
                await until(freed)
