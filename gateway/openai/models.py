"""`GET /v1/models` and `GET /v1/models/{id}`: the models as OpenAI's SDKs list them."""

from __future__ import annotations

from typing import Any

from pydantic_core import to_json

from gateway.request import Request
from gateway.responses import Response, json_response
from gateway.state import Gateway
from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.gen.v1.model_service_pb2 import Model
from pomelo.service import Visit, list_all_models


async def list_models(gateway: Gateway, request: Request, call: Call, visit: Visit) -> Response:
    models = await list_all_models(gateway.services.models, call)
    return json_response(call, to_json({"object": "list", "data": [_render(model) for model in models]}))


async def get_model(gateway: Gateway, request: Request, call: Call, visit: Visit) -> Response:
    """Responds with one model. An unknown one is a 404, as OpenAI's SDKs expect; a task of an unknown model
    has the same error on every path.

    Raises:
        PomeloError: model_not_found, model_not_allowed, store_unavailable, or of a header.
    """
    name = request.path_value
    try:
        name.encode()
        model = await gateway.services.models.get_model(name, call)
    except UnicodeEncodeError:
        raise await visit.refuse(_not_found()) from None
    except PomeloError as error:
        raise _not_found() if error.code == "model_not_found" else error from None
    return json_response(call, to_json(_render(model)))


def _not_found() -> PomeloError:
    return PomeloError("model_not_found", "There is no such model. See GET /v1/models", field="model")


def _render(model: Model) -> dict[str, Any]:
    # When a model was made is not known; SDKs require a number.
    return {"id": model.id, "object": "model", "created": 0, "owned_by": "pomelo"}
