"""A real receiver of alerts, which verifies their signatures."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from tests.web_server import serve_application


class Receiver:
    """Answers with the statuses of `answers` in turn, then 200. `received` are the bodies of valid alerts, with their
    ids; `attempts` counts all requests."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self.url = ""
        self.answers: list[int] = []
        self.attempts = 0
        self.headers: list[dict[str, str]] = []
        self.received: list[dict[str, Any]] = []
        self._keys = keys

    async def answer(self, request: web.Request) -> web.Response:
        self.attempts += 1
        body = await request.read()
        headers = {name: request.headers[f"webhook-{name}"] for name in ("id", "timestamp", "signature")}
        signed = f"{headers['id']}.{headers['timestamp']}.".encode() + body
        expected = [
            "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode() for key in self._keys
        ]
        assert headers["signature"].split() == expected
        self.headers.append(headers)
        status = self.answers.pop(0) if self.answers else 200
        if status == 200:
            self.received.append({"id": headers["id"], **json.loads(body)})
        return web.Response(status=status, headers={"Location": "/elsewhere"} if status == 302 else None)

    def of_type(self, event: str) -> list[dict[str, Any]]:
        """Returns the data of the alerts of a type."""
        return [alert["data"] for alert in self.received if alert["type"] == event]


@asynccontextmanager
async def open_receiver(keys: Sequence[bytes]) -> AsyncIterator[Receiver]:
    """Serves a receiver on loopback, at a path that is a secret."""
    receiver = Receiver(keys)
    app = web.Application()
    app.router.add_post("/{path:.*}", receiver.answer)
    async with serve_application(app) as url:
        receiver.url = f"{url}/secret-path"
        yield receiver
