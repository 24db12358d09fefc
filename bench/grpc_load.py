"""Callers over gRPC: coroutines on one channel of grpc.aio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc

from bench.http_load import Callers, Load
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from tests.calls import bearer


class GrpcCallers(Callers):
    """Coroutines that make calls."""

    def __init__(self, ask: Callable[[], Awaitable[None]], callers: int) -> None:
        self._ask = ask
        self._callers = callers

    async def run(self, seconds: float) -> Load:
        """Asks for so long, and waits for the last answers."""
        load, until = Load(), time.monotonic() + seconds
        await asyncio.gather(*[self._call(load, until) for _ in range(self._callers)])
        return load

    async def _call(self, load: Load, until: float) -> None:
        while True:
            began = time.monotonic()
            try:
                await self._ask()
            except (grpc.aio.AioRpcError, ValueError) as error:
                load.fail(str(error))
            else:
                load.latencies.append(time.monotonic() - began)
            if time.monotonic() >= until:
                return


@asynccontextmanager
async def open_grpc(
    address: str, key: str, spec: TaskSpec, callers: int, chunks: int
) -> AsyncIterator[GrpcCallers]:
    """Opens a channel. With `chunks`, the callers stream, and an answer with fewer events has failed."""
    metadata = bearer(key)
    own_connection = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, own_connection) as channel:
        stub = TaskServiceStub(channel)

        async def whole() -> None:
            await stub.RunTask(RunTaskRequest(spec=spec), metadata=metadata)

        async def stream() -> None:
            events = 0
            async for _ in stub.StreamTask(StreamTaskRequest(spec=spec), metadata=metadata):
                events += 1
            if events < chunks:
                raise ValueError(f"{events} events of {chunks}")

        yield GrpcCallers(stream if chunks else whole, callers)
