"""Uploads whose deadline passes while their chunks arrive leave nothing in the server's memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import grpc

from pomelo.gen.v1.media_service_pb2 import UploadMediaHeader, UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from tests.load.process_usage import MIB, resident
from tests.load.server import open_server

CHUNK = UploadMediaRequest(chunk=bytes(MIB))
UPLOADS = 300


def chunks() -> Iterator[UploadMediaRequest]:
    yield UploadMediaRequest(header=UploadMediaHeader(content_type="audio/mpeg"))
    for _ in range(20):
        yield CHUNK


async def test_uploads_that_end_at_their_deadline_leave_no_memory(tmp_path: Path) -> None:
    async with open_server(tmp_path, 1) as server:
        upload = MediaServiceStub(server.channels[0]).UploadMedia
        late = before = 0
        for number in range(UPLOADS):
            if number == UPLOADS // 3:
                before = resident(server.served.pid)
            try:
                await upload(chunks(), metadata=server.metadata, timeout=random.uniform(0.002, 0.025))
            except grpc.aio.AioRpcError as error:
                late += error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        grown = resident(server.served.pid) - before
        assert late > UPLOADS // 4
        assert grown < 16 * MIB
