"""grpc.health.v1: tells balancers and probes whether to send calls here.

Made by `pomelo.server.main`. Unlike grpcio's own servicer it ends its watches when the server drains, so
that a watcher does not hold up the shutdown.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

SERVICE = "grpc.health.v1.Health"

_Status = health_pb2.HealthCheckResponse


class HealthServicer:
    """Health of the whole server (the empty name) and of each service: all serve, or none."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = ("", *services)
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """From now on everything is NOT_SERVING; watchers are told, and their calls end."""
        self._draining.set()

    def _response(self) -> Any:
        return _Status(status=_Status.NOT_SERVING if self._draining.is_set() else _Status.SERVING)

    async def Check(self, request: Any, context: Any) -> Any:
        """The health of one service."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "No such service")
        return self._response()

    async def List(self, request: Any, context: Any) -> Any:
        """The health of all services."""
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(self._services, self._response()))

    async def Watch(self, request: Any, context: Any) -> None:
        """The health of one service, now and when it changes."""
        if request.service not in self._services:
            await context.write(_Status(status=_Status.SERVICE_UNKNOWN))
            await self._draining.wait()
            return
        await context.write(self._response())
        if not self._draining.is_set():
            await self._draining.wait()
            await context.write(self._response())
