"""The way in for a call: its key is looked at before anything else of its request.

`gateway.app` admits the call of every route that needs a key, `media` that of a download without a signature.
"""

from collections.abc import Hashable

from aiohttp import web

from gateway.connection import Connection
from gateway.state import Gateway
from pomelo.call import Call
from pomelo.service import Visit


async def admit(gateway: Gateway, request: web.Request, call: Call) -> Visit:
    """Admits the call, whose connection is trusted from then on. Close what it returns.

    Raises:
        PomeloError: what `AccessService.admit` raises.
    """
    visit = await gateway.services.access.admit(call)
    trust(request, owner_of(call))
    return visit


def owner_of(call: Call) -> Hashable:
    """Who shares what one account may have: the account, or the key where only a remote server knows it."""
    principal = call.principal
    return principal.account if principal is not None else hash(call.secret)


def trust(request: web.Request, owner: Hashable) -> None:
    """Trusts the connection of a request."""
    connection = request.protocol
    if isinstance(connection, Connection):
        connection.trust(owner)


def address_of(request: web.Request) -> str:
    """What counts as the address that a request came from."""
    connection = request.protocol
    return str(connection.slot.group) if isinstance(connection, Connection) else ""
