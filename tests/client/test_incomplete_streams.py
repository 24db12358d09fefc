"""A stream without its last event has no result, even if the server ends it without an error."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from pomelo.client import IncompleteStream
from pomelo.gen.v1.task_pb2 import TaskEvent
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse
from pomelo.gen.v1.text_pb2 import TextDelta
from tests.client.clients import KINDS, make_client, read


@asynccontextmanager
async def serve(*texts: str) -> AsyncIterator[str]:
    """Serves streams of these texts, without an event `completed`; yields the address."""

    async def stream_task(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for text in texts:
            event = TaskEvent(text_delta=TextDelta(text=text))
            yield StreamTaskResponse(event=event).SerializeToString()

    handlers = {"StreamTask": grpc.unary_stream_rpc_method_handler(stream_task)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("pomelo.v1.TaskService", handlers),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@pytest.mark.parametrize("texts", [(), ("one ", "two")], ids=["empty", "cut off"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_stream_without_its_last_event_has_no_result(kind: str, texts: tuple[str, ...]) -> None:
    async with serve(*texts) as target:
        client = make_client(kind, target, "any-key", retries=0)
        stream = client.stream("gpt-4", "Hi")
        pieces: list[str] = []
        with pytest.raises(IncompleteStream):
            await read(stream, pieces)
        assert tuple(pieces) == texts
        with pytest.raises(IncompleteStream):
            _ = stream.result
        await client.close()
