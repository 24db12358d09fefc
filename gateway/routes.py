"""The table of REST routes, and the handlers of models, the OpenAPI description and health checks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import NamedTuple

from pydantic_core import to_json

from gateway.account import get_account, list_usage
from gateway.connections.connection import HEALTH_PATH
from gateway.media import get_media
from gateway.objects import render_model
from gateway.openai import models as openai_models
from gateway.openai.chat import ChatParameters
from gateway.openai.images import ImageParameters
from gateway.openai.parameters import run_task as run_openai_task
from gateway.openai.responses import ResponseParameters
from gateway.openai.speech import SpeechParameters
from gateway.openai.transcriptions import TranscriptionParameters
from gateway.openapi.schema import KnownModel, Models
from gateway.page import get_page
from gateway.queries import check_no_parameters
from gateway.reference import get_reference
from gateway.request import Request
from gateway.responses import Response, json_response
from gateway.state import Gateway
from gateway.task import run_task
from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.service import Visit, get_task_model, list_all_models

Handler = Callable[[Gateway, Request, Call, Visit], Awaitable[Response | None]]
OpenHandler = Callable[[Gateway, Request, Call], Awaitable[Response | None]]
"""Handlers return the response to a request, None if they sent it, or raise PomeloError. The visit is what
admitted the call."""


async def list_models(gateway: Gateway, request: Request, call: Call, visit: Visit) -> Response:
    await check_no_parameters(request, visit)
    models = await list_all_models(gateway.services.models, call)
    return json_response(call, to_json({"object": "list", "data": [render_model(model) for model in models]}))


async def get_model(gateway: Gateway, request: Request, call: Call, visit: Visit) -> Response:
    await check_no_parameters(request, visit)
    name = request.path_value
    try:
        name.encode()
    except UnicodeEncodeError:
        raise await visit.refuse(PomeloError("unsupported_model", field="model")) from None
    # Over REST an unknown model has one error, whether it is looked up or named by a task.
    model = await get_task_model(gateway.services.models, name, call)
    return json_response(call, to_json(render_model(model)))


async def get_openapi(gateway: Gateway, request: Request, call: Call) -> Response:
    """Responds with the OpenAPI description. With a key, it also lists the models that the operator has added
    and that the key may use.

    Raises:
        PomeloError: invalid_api_key, concurrency_limit_exceeded, overloaded, store_unavailable.
    """
    added: Models = {}
    if call.api_key is not None:
        visit = await gateway.admit(request, call)
        try:
            models = await list_all_models(gateway.services.models, call)
            added = {model.id: KnownModel(model.task_type, model.limits.max_characters) for model in models}
        finally:
            visit.close()
    return json_response(call, gateway.openapi(added))


async def get_health(gateway: Gateway, request: Request, call: Call) -> Response:
    """Responds with 200 if a load balancer should send requests here.

    Raises:
        PomeloError: why not: shutting_down, store_unavailable, server_unavailable.
    """
    if code := gateway.readiness.code:
        raise PomeloError(code)
    return json_response(call, b'{"status":"ok"}')


ROUTES: Mapping[tuple[str, str], Handler] = {
    ("POST", "/api/v1/task"): run_task,
    ("GET", "/api/v1/models"): list_models,
    ("GET", "/api/v1/models/{name}"): get_model,
    ("GET", "/api/v1/account"): get_account,
    ("GET", "/api/v1/usage"): list_usage,
}
"""The routes that require a key, by method and path; GET also handles HEAD."""

OPENAI_ROUTES: Mapping[tuple[str, str], Handler] = {
    ("POST", "/v1/chat/completions"): partial(run_openai_task, ChatParameters),
    ("POST", "/v1/images/generations"): partial(run_openai_task, ImageParameters),
    ("POST", "/v1/audio/speech"): partial(run_openai_task, SpeechParameters),
    ("POST", "/v1/audio/transcriptions"): partial(run_openai_task, TranscriptionParameters),
    ("POST", "/v1/responses"): partial(run_openai_task, ResponseParameters),
    ("GET", "/v1/models"): openai_models.list_models,
    ("GET", "/v1/models/{id}"): openai_models.get_model,
}
"""The routes of the OpenAI-compatible API, which require a key, too."""

OPEN_ROUTES: Mapping[str, OpenHandler] = {
    "/media/{media_id}": get_media,
    "/openapi.json": get_openapi,
    "/docs": get_reference,
    "/docs/{file}": get_reference,
    HEALTH_PATH: get_health,
    "/": get_page,
    "/page/{name}": get_page,
}
"""The GET routes that require no key: they are cheap, or check their caller themselves."""


class Route(NamedTuple):
    """A route's handler: a `Handler` if it requires a key, else an `OpenHandler`. `name` is its method and
    path."""

    handler: Callable[..., Awaitable[Response | None]]
    requires_key: bool
    name: str


def _by_path() -> dict[str, dict[str, Route]]:
    """Returns the routes by path, without its variable part, and by method."""
    routes = [
        (method, path, Route(handler, True, f"{method} {path}"))
        for (method, path), handler in {**ROUTES, **OPENAI_ROUTES}.items()
    ]
    routes += [("GET", path, Route(handler, False, f"GET {path}")) for path, handler in OPEN_ROUTES.items()]
    paths: dict[str, dict[str, Route]] = {}
    for method, path, route in routes:
        methods = ("GET", "HEAD") if method == "GET" else (method,)
        paths.setdefault(path.partition("{")[0], {}).update(dict.fromkeys(methods, route))
    return paths


_BY_PATH = _by_path()
_BY_TARGET = {
    (method, path): route
    for path, methods in _BY_PATH.items()
    if path == "/" or not path.endswith("/")
    for method, route in methods.items()
}

_PATHS_WITH_KEY = frozenset(path for _, path in (*ROUTES, *OPENAI_ROUTES) if "{" not in path)
_PREFIXES = ("", "/v1", "/api", "/api/v1")
"""What is often left out of a path."""


def find_route(request: Request, call: Call) -> Route:
    """Returns the route of a request, and sets its `path_value`.

    Raises:
        PomeloError: not_found, method_not_allowed.
    """
    route = _BY_TARGET.get((request.method, request.target))
    if route is not None:
        return route  # the target is a path without a variable part, a query or escapes, as most are
    path = request.url.path_safe
    start = path.rfind("/") + 1
    value = path[start:]
    methods = None
    if path == "/" or (value and "{" not in value and "}" not in value):
        methods = _BY_PATH.get(path)
        if methods is None and start > 1:  # a path of one part is not that of `/` with a value
            methods = _BY_PATH.get(path[:start])
            # What a URL escapes so that it does not separate parts, or begin an escape.
            request.path_value = value.replace("%2F", "/").replace("%25", "%")
    if methods is None:
        raise _not_found(path)
    if request.method not in methods:
        allowed = call.response_headers["Allow"] = ", ".join(sorted(methods))
        raise PomeloError("method_not_allowed", f"The path does not take this method. Use {allowed}")
    return methods[request.method]


def _not_found(path: str) -> PomeloError:
    """Returns the error for an unknown path, with the one that it probably stands for. Takes little time: no
    key was checked."""
    spelling = "".join(f"/{part}" for part in path.lower().split("/") if part)
    without_api = spelling.removeprefix("/api")
    for candidate in (*[prefix + spelling for prefix in _PREFIXES], without_api):
        if candidate in _PATHS_WITH_KEY:
            return PomeloError("not_found", f"Not found. Use {candidate}")
    return PomeloError("not_found")
