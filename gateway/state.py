"""The state that the request handlers of a gateway share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from gateway.cors import Cors
from gateway.openapi.schema import Models
from gateway.options import GatewayOptions
from gateway.parsing.body import ParseQueue
from gateway.request import Request
from gateway.types.base import Link
from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.runtime.in_flight import InFlight
from pomelo.service import Services, Visit, get_task_model
from pomelo.telemetry.readiness import Readiness

_MAX_CACHED_TYPES = 1024

TYPES_CACHED = 5.0
"""Seconds after which the cached task types of models are looked up again: a reload may change them."""


@dataclass(slots=True)
class Gateway:
    """What the request handlers share.

    `link` maps media links to the address by which callers reach this gateway. `openapi` returns the OpenAPI
    description as JSON; its argument adds models (name to task type) to those that everyone may know.
    `parse_queue` queues large bodies, `downloads` counts the downloads by signed links. `readiness` is what
    health checks report. `cors` is None if browsers may not read responses.
    """

    services: Services
    options: GatewayOptions
    link: Link
    openapi: Callable[[Models], bytes]
    parse_queue: ParseQueue
    downloads: InFlight
    readiness: Readiness
    cors: Cors | None = None
    _task_types: dict[str, int] = field(default_factory=dict)

    async def admit(self, request: Request, call: Call) -> Visit:
        """Checks the key, admits the call and marks its connection as trusted. The caller must close the
        returned visit.

        Raises:
            PomeloError: invalid_api_key, concurrency_limit_exceeded, overloaded, store_unavailable.
        """
        try:
            visit = await self.services.access.admit(call)
        except PomeloError:
            # A valid key of an account that has too many calls. A server elsewhere reports only its mode.
            if call.principal is not None or "X-Pomelo-Mode" in call.response_headers:
                request.connection.trust(account_of(call))
            raise
        request.connection.trust(account_of(call))
        return visit

    async def task_type(self, model: str, call: Call) -> int:
        """Returns the task type of a model, from the cache if possible.

        Raises:
            PomeloError: unsupported_model, model_not_allowed; what the service raises.
        """
        cached = self._task_types.get(model)
        return cached if cached is not None else await self.fetch_task_type(model, call)

    async def fetch_task_type(self, model: str, call: Call) -> int:
        """Returns the task type of a model that the key may use. Raises as `task_type`."""
        # From the service, not a catalogue: a remote server may know models that this gateway does not.
        task_type = (await get_task_model(self.services.models, model, call)).task_type
        if len(self._task_types) >= _MAX_CACHED_TYPES:
            self._task_types.clear()
        if not self._task_types:
            asyncio.get_running_loop().call_later(TYPES_CACHED, self._task_types.clear)
        self._task_types[model] = task_type
        return task_type


def account_of(call: Call) -> Hashable:
    """Returns what an admitted call is counted by: its account, or a hash of the key if only the remote
    server knows the account."""
    principal = call.principal
    return principal.account if principal is not None else hash(call.api_key)
