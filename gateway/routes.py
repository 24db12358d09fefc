"""The table of REST routes, and the handlers of models, the OpenAPI description and health checks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic_core import to_json

from gateway.account import get_account, list_usage
from gateway.connections.connection import HEALTH_PATH
from gateway.media import get_media
from gateway.responses import json_response
from gateway.state import Gateway
from gateway.task import run_task
from gateway.types import type_name
from pomelo import money
from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.gen.v1.model_service_pb2 import Model, PriceUnit
from pomelo.service import Visit, get_task_model, list_all_models

Handler = Callable[[Gateway, web.Request, Call, Visit], Awaitable[web.StreamResponse]]
OpenHandler = Callable[[Gateway, web.Request, Call], Awaitable[web.StreamResponse]]
"""Handlers return the response to a request, or raise PomeloError; the visit is what admitted the call."""


async def list_models(gateway: Gateway, request: web.Request, call: Call, visit: Visit) -> web.StreamResponse:
    models = await list_all_models(gateway.services.models, call)
    return json_response(call, to_json({"object": "list", "data": [render_model(model) for model in models]}))


async def get_model(gateway: Gateway, request: web.Request, call: Call, visit: Visit) -> web.StreamResponse:
    name = request.match_info["name"]
    try:
        name.encode()
    except UnicodeEncodeError:
        raise await visit.refuse(PomeloError("unsupported_model", field="model")) from None
    # Over REST an unknown model has one error, whether it is looked up or named by a task.
    model = await get_task_model(gateway.services.models, name, call)
    return json_response(call, to_json(render_model(model)))


async def get_openapi(gateway: Gateway, request: web.Request, call: Call) -> web.StreamResponse:
    return json_response(call, gateway.openapi)


async def get_health(gateway: Gateway, request: web.Request, call: Call) -> web.StreamResponse:
    """Responds with 200 if a load balancer should send requests here.

    Raises:
        PomeloError: shutting_down.
    """
    if not gateway.healthy():
        raise PomeloError("shutting_down")
    return json_response(call, b'{"status":"ok"}')


def render_model(model: Model) -> dict[str, Any]:
    """Returns a model as a JSON object, with prices in credits as decimal text."""
    limits = {f.name: value for f, value in model.limits.ListFields()}
    members = {
        "id": model.id,
        "object": "model",
        "type": type_name(model.task_type),
        "limits": limits,
        "price": _prices(model.prices),
        "price_version": model.price_version,
        "available": model.available,
        "deprecated": _date(model.deprecate_time),
        "retires": _date(model.retire_time),
    }
    if model.price_tiers:
        members["price_tiers"] = [
            {"from_input_tokens": tier.min_input_tokens, "price": _prices(tier.prices)}
            for tier in model.price_tiers
        ]
    return members


def _prices(lines: Any) -> dict[str, str]:
    return {_unit_name(price.unit): money.format_credits(price.amount_micros) for price in lines}


def _date(time: Timestamp) -> str | None:
    return time.ToDatetime().date().isoformat() if time.seconds else None


def _unit_name(unit: int) -> str:
    descriptor: Any = PriceUnit
    value = descriptor.DESCRIPTOR.values_by_number.get(unit)
    return value.name.removeprefix("PRICE_UNIT_").lower() if value is not None else f"unit_{unit}"


ROUTES: Mapping[tuple[str, str], Handler] = {
    ("POST", "/api/v1/task"): run_task,
    ("GET", "/api/v1/models"): list_models,
    ("GET", "/api/v1/models/{name}"): get_model,
    ("GET", "/api/v1/account"): get_account,
    ("GET", "/api/v1/usage"): list_usage,
}
"""The routes that require a key, by method and path; GET also handles HEAD."""

OPEN_ROUTES: Mapping[str, OpenHandler] = {
    "/media/{media_id}": get_media,
    "/openapi.json": get_openapi,
    HEALTH_PATH: get_health,
}
"""The GET routes that require no key: they are cheap, or check their caller themselves."""
