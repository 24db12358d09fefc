"""Requests to the paths of OpenAI's API for images and audio, and what their responses say."""

from __future__ import annotations

from typing import Any

from tests.gateway.gateway_app import GatewayApp
from tests.gateway.requests import Sending

STRICT = {"Prefer": "handling=strict"}


def post(gateway: GatewayApp, path: str, body: Any = None, **more: Any) -> Sending:
    """Posts to a path below /v1; `body` is sent as JSON."""
    headers = gateway.headers | more.pop("headers", {})
    if body is not None:
        more["json"] = body
    return gateway.http.post(f"{gateway.url}/v1/{path}", headers=headers, **more)


async def error_of(sending: Sending) -> tuple[int, str, str | None]:
    """Returns the status, the code and the parameter of an error, whose message has to name the parameter."""
    async with sending as response:
        error = (await response.json())["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["param"] is None or error["param"] in error["message"]
        return response.status, error["code"], error["param"]
