"""The table of REST routes, and the handlers that are one step long.

`gateway.app` registers the table; a handler is called with the gateway, the request and its `Call`.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from aiohttp import web
from pydantic_core import to_json

from gateway import account, media, openapi, render, task
from gateway.reply import json_reply
from gateway.state import Gateway
from pomelo.call import Call
from pomelo.errors import PomeloError

Handler = Callable[[Gateway, web.Request, Call], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """One way in. A GET answers HEAD, too."""

    method: str
    path: str
    handler: Handler


async def list_models(gateway: Gateway, request: web.Request, call: Call) -> web.StreamResponse:
    """The models that the key may use."""
    models = await gateway.services.models.list_models(call)
    return json_reply(call, to_json({"object": "list", "data": [render.model(m) for m in models]}))


async def get_model(gateway: Gateway, request: web.Request, call: Call) -> web.StreamResponse:
    """One model."""
    name = request.match_info["name"]
    try:
        name.encode()
    except UnicodeEncodeError:
        await gateway.services.models.list_models(call)
        raise PomeloError("unsupported_model", field="model") from None
    return json_reply(call, to_json(render.model(await gateway.services.models.get_model(name, call))))


async def get_media(gateway: Gateway, request: web.Request, call: Call) -> web.StreamResponse:
    """A picture or a sound, by its signed link or to its owner."""
    return await media.download(gateway.services.media, request, call)


async def get_openapi(gateway: Gateway, request: web.Request, call: Call) -> web.StreamResponse:
    """The description of all this for programs."""
    return json_reply(call, gateway.description)


ROUTES = (
    Route("POST", "/api/v1/task", task.run),
    Route("GET", "/api/v1/models", list_models),
    Route("GET", "/api/v1/models/{name}", get_model),
    Route("GET", "/api/v1/account", account.get_account),
    Route("GET", "/api/v1/usage", account.list_usage),
    Route("GET", "/media/{media_id}", get_media),
    Route("GET", "/openapi.json", get_openapi),
)
"""Every path there is; all others are not_found."""


def describe(public_url: str) -> bytes:
    """The OpenAPI description as JSON."""
    document: Mapping[str, object] = openapi.document(public_url)
    return to_json(document)
