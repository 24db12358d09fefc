"""The client of grpc.health.v1: whether a server takes calls, asked without a key."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pomelo.server.remote.channel import Tls, open_channel
from pomelo.status import from_rpc_error


@asynccontextmanager
async def open_health(
    target: str, *, tls: Tls | None = None, options: Mapping[str, Any] | None = None
) -> AsyncIterator[Callable[[float], Awaitable[bool]]]:
    """Yields a function that asks the gRPC server at `target` whether it serves, within so many seconds.
    `tls` and `options` as of `open_remote`. The function raises PomeloError.

    Raises:
        OSError: a TLS file can't be read.
    """
    async with open_channel(target, tls.credentials() if tls else None, options) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def check(seconds: float) -> bool:
            try:
                response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=seconds)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error
            serving: bool = response.status == health_pb2.HealthCheckResponse.SERVING
            return serving

        yield check
