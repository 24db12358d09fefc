"""How a server distinguishes a caller who has left from a call that something within it has cancelled."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from pomelo.server.calls import _is_abandoned

PATH = "/test.Service/Method"


@pytest.mark.parametrize("accepted", [False, True])
@pytest.mark.parametrize("leaves", [False, True])
async def test_grpc_shows_whether_the_caller_of_a_cancelled_call_has_left(
    leaves: bool, accepted: bool
) -> None:
    started = asyncio.Event()
    found: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def handle(messages: Any, context: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        if accepted:
            await context.send_initial_metadata(())
        started.set()
        try:
            if not leaves:
                task.cancel()
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            found.set_result(_is_abandoned())
            if leaves:
                raise
            task.uncancel()

    server = grpc.aio.server()
    server.add_registered_method_handlers(
        "test.Service", {"Method": grpc.stream_stream_rpc_method_handler(handle)}
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with asyncio.timeout(20), grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_stream(PATH)(b"")
        await started.wait()
        if leaves:
            call.cancel()
        assert await found == leaves
    await server.stop(None)
