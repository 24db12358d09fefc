"""The options of a gateway, and the state that its request handlers share."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network

from aiohttp import web

from gateway.connections.connection import Connection
from gateway.parsing.body import BodyRate, ParseQueue
from gateway.types.base import Link
from pomelo.call import Call
from pomelo.in_flight import InFlight
from pomelo.service import Services, Visit

MIB = 1024 * 1024
INLINE_LIMIT = MIB
"""Bytes of audio up to which a gateway passes it inline instead of uploading it."""

IDLE_TIMEOUT = 75.0

PROXY_IDLE_TIMEOUT = 650.0
"""Longer than the default idle timeouts of load balancers: 600 s at Google, 60 s at AWS and nginx."""


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """The options of a gateway; sizes in bytes, times in seconds.

    `public_url` is the URL by which callers reach this gateway, used in media links (empty: its own
    address). `json_limit` bounds a JSON body and a form without its file, `upload_limit` a file; audio in
    base64 is passed inline up to `inline_limit` and uploaded beyond it. `keep_alive` is the silence after
    which a stream sends a comment. `cors_origins` are the origins whose pages may call, or only `*`.

    `head_timeout` limits the time for a request's head, `read_timeout` the time between two pieces of its
    body. `read_rate` is the minimum rate of the body, in bytes a second, after `read_grace`.
    `write_timeout` is the period over which a client must read part of a response, `idle_timeout` the time
    between two requests, `proxy_idle_timeout` the same on connections from `trusted_proxies`. An idle
    connection is closed `idle_slack` after that time, so that a client with the same timeout closes it
    first. `linger_timeout` is how long the rest of a refused body is discarded, so that its sender can read
    the error response. `drain_timeout` is how long running requests may continue when the gateway closes.

    `max_connections` limits the connections of all clients together (lowered to half of the files that the
    process may open). Each address keeps `max_untrusted` connections without a valid key; of its older
    ones, slow ones end after `untrusted_grace`. Every connection without a valid key ends after
    `untrusted_timeout`. `max_downloads` limits the concurrent downloads by signed links; one address may
    have half of them.
    """

    public_url: str = ""
    cors_origins: tuple[str, ...] = ()
    json_limit: int = 8 * MIB
    upload_limit: int = 50 * MIB
    inline_limit: int = INLINE_LIMIT
    keep_alive: float = 15.0
    head_timeout: float = 10.0
    read_timeout: float = 30.0
    read_rate: int = 1024
    read_grace: float = 10.0
    write_timeout: float = 30.0
    idle_timeout: float = IDLE_TIMEOUT
    proxy_idle_timeout: float = PROXY_IDLE_TIMEOUT
    idle_slack: float = 5.0
    trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = ()
    max_connections: int = 4096
    max_untrusted: int = 64
    untrusted_grace: float = 1.0
    untrusted_timeout: float = 8.0
    max_downloads: int = 512
    linger_timeout: float = 10.0
    drain_timeout: float = 2.0


@dataclass(slots=True)
class Gateway:
    """What the request handlers share.

    `link` maps media links to the address by which callers reach this gateway. `openapi` is the OpenAPI
    description as JSON. `parse_queue` queues large bodies, `downloads` counts the downloads by signed
    links. `healthy` returns whether a load balancer should send requests here. `task_types` caches the task
    types of models.
    """

    services: Services
    options: GatewayOptions
    link: Link
    openapi: bytes
    body_rate: BodyRate
    parse_queue: ParseQueue
    downloads: InFlight
    healthy: Callable[[], bool]
    task_types: dict[str, int] = field(default_factory=dict)

    async def admit(self, request: web.Request, call: Call) -> Visit:
        """Checks the key, admits the call and marks its connection as trusted. The caller must close the
        returned visit.

        Raises:
            PomeloError: invalid_api_key, concurrency_limit_exceeded, overloaded, store_unavailable.
        """
        visit = await self.services.access.admit(call)
        trust_connection(request, account_of(call))
        return visit


def account_of(call: Call) -> Hashable:
    """Returns what an admitted call is counted by: its account, or a hash of the key if only the remote
    server knows the account."""
    principal = call.principal
    return principal.account if principal is not None else hash(call.api_key)


def trust_connection(request: web.Request, owner: Hashable) -> None:
    """Marks the connection of a request as trusted, because the request is authenticated as `owner`."""
    connection = request.protocol
    if isinstance(connection, Connection):
        connection.trust(owner)


def address_of(request: web.Request) -> str:
    """Returns the client's IPv4 address or IPv6 /64, by which its requests are counted."""
    connection = request.protocol
    return str(connection.slot.group) if isinstance(connection, Connection) else ""
