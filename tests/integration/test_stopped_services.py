"""Services that drain and stop: what they refuse, and calls that end slowly."""

from __future__ import annotations

import asyncio

from pomelo.app import App
from pomelo.gen.v1.account_service_pb2 import ListUsageRequest
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.runtime.draining import Draining
from pomelo.service import list_all_models
from tests.calls import call_of, refusal
from tests.conftest import Keys
from tests.tasks import text_task


async def test_every_call_is_refused_while_draining(app: App, keys: Keys) -> None:
    draining = Draining()
    services = draining.guard(app.services)
    draining.drain()
    call = call_of(keys.test)
    for awaitable in (
        services.access.admit(call),
        services.tasks.run_task(text_task(), TaskOptions(), call),
        services.tasks.stream_task(text_task(), TaskOptions(), call).__aenter__(),
        list_all_models(services.models, call),
        services.models.get_model("gpt-4", call),
        services.media.download_media("media_x", "", call).__aenter__(),
        services.accounts.get_account(call),
        services.accounts.list_usage(ListUsageRequest(), call),
    ):
        assert (await refusal(awaitable)).code == "shutting_down"


async def test_services_can_be_stopped_again_while_a_call_cleans_up() -> None:
    running, cleaning, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            cleaning.set()
            await go_on.wait()

    draining = Draining()
    task = asyncio.ensure_future(draining.counted(work)())
    async with asyncio.timeout(20):
        await running.wait()
        draining.stop()
        await cleaning.wait()
        draining.stop()
        assert len(draining.scopes) == 1
        go_on.set()
        assert (await refusal(task)).code == "shutting_down"
        await draining.idle()
