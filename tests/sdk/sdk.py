"""What the tests of OpenAI's SDKs share: the callers, a client, and small requests."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from tests.app import Account, RunningApp

CALLERS = pytest.mark.parametrize(
    ("protocol", "mode"), [("rest", "test"), ("rest", "live"), ("remote", "test"), ("remote", "live")]
)
"""A gateway in the server's process and one elsewhere; the sandbox and a played vendor."""

SANDBOX = pytest.mark.parametrize("protocol", ["rest", "remote"])
"""The same, for the sandbox alone."""

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]
CHAT: dict[str, Any] = {"model": "gpt-4", "messages": MESSAGES}
PNG = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000a49444154789c6300010000050001"
        "0d0a2db40000000049454e44ae426082"
    )
).decode()
"""An image of one pixel."""

_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "kelvin"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER: Any = {"name": "weather", "description": "The weather in a city.", "parameters": _PARAMETERS}
"""A tool."""


@asynccontextmanager
async def sdk(
    app: RunningApp, account: Account, protocol: str = "rest", mode: str = "live", **options: Any
) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of OpenAI's SDK that does not retry, unless the options say so."""
    app.upstream.reset()
    key = account.live if mode == "live" else account.test
    options = {"base_url": f"{app.urls[protocol]}/v1", "api_key": key, "max_retries": 0, **options}
    async with openai.AsyncOpenAI(**options) as client:
        yield client
