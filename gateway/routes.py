"""The table of REST routes, and the handlers that are one step long.

`gateway.app` registers the tables; a handler is called with the gateway, the request and its `Call`, and with
the `Visit` that admitted it where the route needs a key.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from aiohttp import web
from pydantic_core import to_json

from gateway import account, media, openapi, render, task
from gateway.connection import HEALTH
from gateway.reply import json_reply
from gateway.state import Gateway
from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.service import Visit

Handler = Callable[[Gateway, web.Request, Call, Visit], Awaitable[web.StreamResponse]]
OpenHandler = Callable[[Gateway, web.Request, Call], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """A route for callers with a key. GET also answers HEAD."""

    method: str
    path: str
    handler: Handler


@dataclass(frozen=True, slots=True)
class OpenRoute:
    """A route that needs no key: it is cheap, or checks its caller itself. GET also answers
    HEAD."""

    method: str
    path: str
    handler: OpenHandler


async def list_models(gateway: Gateway, request: web.Request, call: Call, visit: Visit) -> web.StreamResponse:
    """The models that the key may use."""
    models = await gateway.services.models.list_models(call)
    return json_reply(call, to_json({"object": "list", "data": [render.model(m) for m in models]}))


async def get_model(gateway: Gateway, request: web.Request, call: Call, visit: Visit) -> web.StreamResponse:
    """One model."""
    name = request.match_info["name"]
    try:
        name.encode()
    except UnicodeEncodeError:
        raise await visit.refuse(PomeloError("unsupported_model", field="model")) from None
    return json_reply(call, to_json(render.model(await gateway.services.models.get_model(name, call))))


async def get_media(gateway: Gateway, request: web.Request, call: Call) -> web.StreamResponse:
    """A picture or a sound, by its signed link or to its owner."""
    return await media.download(gateway, request, call)


async def get_openapi(gateway: Gateway, request: web.Request, call: Call) -> web.StreamResponse:
    """The description of all this for programs."""
    return json_reply(call, gateway.description)


async def get_health(gateway: Gateway, request: web.Request, call: Call) -> web.StreamResponse:
    """Reports whether a load balancer should send requests here."""
    if not gateway.healthy():
        raise PomeloError("shutting_down")
    return json_reply(call, b'{"status":"ok"}')


ROUTES = (
    Route("POST", "/api/v1/task", task.run),
    Route("GET", "/api/v1/models", list_models),
    Route("GET", "/api/v1/models/{name}", get_model),
    Route("GET", "/api/v1/account", account.get_account),
    Route("GET", "/api/v1/usage", account.list_usage),
)
"""The paths that need a key."""

OPEN_ROUTES = (
    OpenRoute("GET", "/media/{media_id}", get_media),
    OpenRoute("GET", "/openapi.json", get_openapi),
    OpenRoute("GET", HEALTH, get_health),
)
"""The paths that need no key. All other paths are not_found."""


def describe(public_url: str) -> bytes:
    """The OpenAPI description as JSON."""
    document: Mapping[str, object] = openapi.document(public_url)
    return to_json(document)
