"""The options of a gateway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

from gateway.openapi.schema import Models
from pomelo.telemetry.events import Observer

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
    address). `page` is whether the page for developers is served. `json_limit` bounds a JSON body and a form
    without its file, `upload_limit` a file; audio in base64 is passed inline up to `inline_limit` and
    uploaded beyond it. `keep_alive` is the silence after which a stream sends a comment. `cors_origins` are
    the origins whose pages may call, or only `*`.

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
    have half of them. `observers` get reports of calls. `models` returns the models that the OpenAPI
    description lists for callers without a key; empty if they are unknown.
    """

    public_url: str = ""
    page: bool = True
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
    observers: Sequence[Observer] = ()
    models: Callable[[], Models] = dict
