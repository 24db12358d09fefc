"""Admits calls: the API key is checked before the rest of the request.

`gateway.app` admits the calls of every route that needs a key, `media` those of downloads without a
signature.
"""

from __future__ import annotations

from collections.abc import Hashable

from aiohttp import web

from gateway.connection import Connection
from gateway.state import Gateway
from pomelo.call import Call
from pomelo.service import Visit


async def admit(gateway: Gateway, request: web.Request, call: Call) -> Visit:
    """Admits the call, and trusts its connection from then on. The caller must close the returned
    visit.

    Raises:
        PomeloError: what `AccessService.admit` raises.
    """
    visit = await gateway.services.access.admit(call)
    trust(request, owner_of(call))
    return visit


def owner_of(call: Call) -> Hashable:
    """The owner that calls are counted by: the account, or a hash of the key if only the remote
    server knows the account."""
    principal = call.principal
    return principal.account if principal is not None else hash(call.api_key)


def trust(request: web.Request, owner: Hashable) -> None:
    """Trusts the connection of a request."""
    connection = request.protocol
    if isinstance(connection, Connection):
        connection.trust(owner)


def address_of(request: web.Request) -> str:
    """The client's IPv4 address, or its IPv6 /64, as text by which requests are counted."""
    connection = request.protocol
    return str(connection.slot.group) if isinstance(connection, Connection) else ""
