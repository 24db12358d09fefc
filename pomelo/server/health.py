"""grpc.health.v1: reports to load balancers and probes whether to send calls to this server.

It needs no key and no other part of Pomelo, so it also answers while other calls are refused. Watches end
when the server drains, so that they do not delay the shutdown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from grpc_health.v1 import health_pb2

from pomelo.errors import PomeloError
from pomelo.server.calls import keyless
from pomelo.server.rpc import Rpc

SERVICE = "grpc.health.v1.Health"

_Status = health_pb2.HealthCheckResponse


class HealthServicer:
    """Reports the health of the server (the empty name) and of each service, which is the same for all."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = ("", *services)
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """Reports NOT_SERVING from now on, and ends the watches after they have received it."""
        self._draining.set()

    def _response(self) -> Any:
        return _Status(status=_Status.NOT_SERVING if self._draining.is_set() else _Status.SERVING)

    @keyless
    async def Check(self, rpc: Rpc) -> Any:
        request = await rpc.small_message(health_pb2.HealthCheckRequest, health=True)
        if request.service not in self._services:
            raise PomeloError("not_found", "This service does not exist. Check its name")
        return self._response()

    @keyless
    async def List(self, rpc: Rpc) -> Any:
        await rpc.small_message(health_pb2.HealthListRequest, health=True)
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(self._services, self._response()))

    @keyless
    async def Watch(self, rpc: Rpc) -> None:
        await rpc.admit_if_known()
        with rpc.without_key():
            request = await rpc.small_message(health_pb2.HealthCheckRequest)
            if request.service not in self._services:
                await rpc.send(_Status(status=_Status.SERVICE_UNKNOWN))
                await self._draining.wait()
                return
            first = self._response()
            await rpc.send(first)
            if first.status == _Status.SERVING:  # the server may have started to drain during the write
                await self._draining.wait()
                await rpc.send(self._response())
