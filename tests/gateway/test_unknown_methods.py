"""Methods that aiohttp's parser does not know."""

from __future__ import annotations

import json
import re

import pytest

from tests.gateway.gateway_app import GatewayApp
from tests.gateway.requests import HI, raw_task

REST = b" /api/v1/models?x=%ff HTTP/1.1\r\nHost: x\r\nOrigin: https://a.example\r\n\r\n"


@pytest.mark.parametrize("method", [b"BREW", b"post", b"Get", b"X-1"])
async def test_an_unknown_method_is_not_allowed(gateway: GatewayApp, method: bytes) -> None:
    head, _, body = (await gateway.exchange(method + REST)).partition(b"\r\n\r\n")
    assert head.split(b" ", 2)[1] == b"405"
    assert b"\r\nAllow: GET, HEAD, POST\r\n" in head
    assert json.loads(body)["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("data", [raw_task(HI, close=False) + b"garbage", b"BREW\r\n\r\n", b"B(W" + REST])
async def test_what_is_no_request_line_has_no_unknown_method(gateway: GatewayApp, data: bytes) -> None:
    received = await gateway.exchange(data)
    assert re.findall(rb"HTTP/1.\d (\d+)", received)[-1] == b"400"
    assert b"invalid_body" in received
