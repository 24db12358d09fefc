"""Clients that ping every 10 s, a common setting with load balancers, keep their connections."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import grpc
import pytest

from pomelo.gen.v1.model_service_pb2 import ListModelsRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from tests.calls import bearer
from tests.serving import serve_interpreter
from tests.tasks import text_task

pytestmark = pytest.mark.skipif("LOAD_CALLS" not in os.environ, reason="takes two minutes; make load")

PINGING = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.use_local_subchannel_pool", 1),
]


@pytest.mark.timeout(240)
async def test_pings_every_10_s_do_not_close_a_busy_or_an_idle_connection(tmp_path: Path) -> None:
    async with serve_interpreter(tmp_path) as served:
        address = f"{served.host}:{served.grpc_port}"
        async with (
            grpc.aio.insecure_channel(address, PINGING) as busy,
            grpc.aio.insecure_channel(address, PINGING) as idle,
        ):
            # A call with a key: a connection without one is closed after some seconds.
            models = ModelServiceStub(idle)
            await models.ListModels(ListModelsRequest(), metadata=bearer(served.key))
            began = time.monotonic()
            closed: list[float] = []

            async def wait_closed() -> None:
                await idle.wait_for_state_change(grpc.ChannelConnectivity.READY)
                closed.append(time.monotonic() - began)

            watching = asyncio.ensure_future(wait_closed())
            request = RunTaskRequest(spec=text_task("[[delay:130]] Hello"))
            answer = await TaskServiceStub(busy).RunTask(request, metadata=bearer(served.key), timeout=200)
            assert answer.result.text.message.content[0].text
            watching.cancel()
            assert not closed
            listed = await models.ListModels(ListModelsRequest(), metadata=bearer(served.key))
            assert listed.models
