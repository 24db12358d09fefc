"""grpc.health.v1: reports to load balancers and probes whether to send calls to this server.

It needs no key, and reads nothing but the readiness of the process, so it also answers while other calls are
refused. Watches end when the server drains, so that they do not delay the shutdown.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from grpc_health.v1 import health_pb2

from pomelo.errors import PomeloError
from pomelo.server.calls import keyless
from pomelo.server.rpc import Rpc
from pomelo.telemetry.readiness import Readiness

SERVICE = "grpc.health.v1.Health"

_Status = health_pb2.HealthCheckResponse


class HealthServicer:
    """Reports the health of the server (the empty name) and of each service, which is the same for all: every
    service needs what `readiness` follows."""

    def __init__(self, services: Iterable[str], readiness: Readiness) -> None:
        self._services = ("", *services)
        self._readiness = readiness

    def _response(self) -> Any:
        return _Status(status=_Status.NOT_SERVING if self._readiness.code else _Status.SERVING)

    @keyless
    async def Check(self, rpc: Rpc) -> Any:
        if rpc.trusted:
            rpc.signed()  # the connection of a gateway may stay open, also while it has no other calls
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
        rpc.count_without_key()
        request = await rpc.small_message(health_pb2.HealthCheckRequest)
        known = request.service in self._services
        reported = None
        await rpc.send_metadata()  # otherwise a first response that is not read could not be ended
        while True:
            # Read before the write, during which the state may change.
            change, draining = self._readiness.next_change(), self._readiness.draining
            response = self._response() if known else _Status(status=_Status.SERVICE_UNKNOWN)
            if response != reported:
                reported = response
                await rpc.send(response)
            if draining:
                return
            await change.wait()
