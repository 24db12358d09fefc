"""A stream without its last event has no result, even if the server ends it without an error."""

from __future__ import annotations

import io
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

    async def download(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for text in texts:
            yield text.encode()

    server = grpc.aio.server()
    for service, method, handler in (
        ("TaskService", "StreamTask", stream_task),
        ("MediaService", "DownloadMedia", download),
    ):
        handlers = {method: grpc.unary_stream_rpc_method_handler(handler)}
        generic = grpc.method_handlers_generic_handler(f"pomelo.v1.{service}", handlers)
        server.add_generic_rpc_handlers((generic,))
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


@pytest.mark.parametrize("kind", KINDS)
async def test_a_download_without_a_message_is_incomplete(kind: str) -> None:
    file = io.BytesIO()
    async with serve() as target:
        client = make_client(kind, target, "any-key", retries=0)
        with pytest.raises(IncompleteStream):
            await client.download("media_1", file)
        assert not file.getvalue()
        await client.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stream_is_opened_before_it_is_read(kind: str) -> None:
    client = make_client(kind, "127.0.0.1:1", "any-key")
    with pytest.raises(RuntimeError, match="Open the stream with"):
        async for _ in client.stream("gpt-4", "Hi"):
            pass
    await client.close()
